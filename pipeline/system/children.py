"""Starts other programs, each in a private folder: nothing from the current one, or from a checkpoint's, gets in."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from .program import clean_environment

_running: set["subprocess.Popen[Any]"] = set()


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new, empty folder that only this user can read or write; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> Iterator["subprocess.Popen[Any]"]:
    """A process that runs in `folder`, with an environment that does not lead to the current one; whatever ends the
    block ends the process and all that it started.

    Ctrl-C, which a terminal sends to all processes, does not reach it: the one that started it decides.

    Args:
        folder: from private_folder(). environment: variables beside this process's own.
        options: further ones of subprocess.Popen.
    Raises:
        OSError: there is no such program.
    """
    # A blocked signal stays blocked in the new process. In this one it waits until the process is in our hands.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(command, cwd=folder, env={**clean_environment(os.environ), **environment}, **options)
        _running.add(process)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            yield process
        finally:
            _kill(process)
            process.wait()
            _running.discard(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def ending(code: int) -> str:
    """How a process ended, by its exit code: "was killed, …"."""
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _kill(process: "subprocess.Popen[Any]") -> None:
    if process.poll() is None:
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            started = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # before those that it may be waiting for
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def kill_all() -> None:
    """Kill every process that is running; for the end of this one.

    A handler of signals may call it at any moment: it takes no lock, which the interrupted code may hold, so it does
    not wait for their end.
    """
    for process in list(_running):
        _kill(process)


def end_with_parent(folder: Path) -> None:
    """End this process when the one that started it ends, however that ends: its end of the pipe on standard input
    closes then.

    What is half done is safe: files appear whole or not at all.

    Args:
        folder: this process's own, which nobody else is left to remove.
    """
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()
