"""Processes that bitpress starts end with it."""

import signal
import threading

import psutil

from bitpress.pipeline.system import children


def test_all_are_killed_by_a_handler_that_interrupts_their_end():
    """A second Ctrl-C may come while Popen.wait holds its lock, which the handler must not wait for."""
    with children.private_folder() as folder, children.start(["/bin/sh", "-c", "sleep 60; true"], folder) as process:
        while not (started := psutil.Process(process.pid).children()):
            pass
        with process._waitpid_lock:  # type: ignore[attr-defined]
            thread = threading.Thread(target=children.kill_all, daemon=True)
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        assert process.wait() == -signal.SIGKILL
        psutil.wait_procs(started, timeout=10)
        assert not started[0].is_running()
