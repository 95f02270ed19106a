"""The fresh process: it ends with its parent, holds its locks, and only what it said before a good end counts."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import BitpressError, LockedError, NumericsError
from bitpress.pipeline.evaluate import measure, worker
from bitpress.pipeline.evaluate.__main__ import perform
from bitpress.pipeline.storage import journal
from bitpress.pipeline.system import children
from bitpress.pipeline.system.unexpected import LOG, unexpected

Script = Callable[[str], None]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """script(lines): the process runs these lines of a shell in Python's place; $3 is its request, and here."""

    def install(lines: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def answer(text: str) -> str:
    return f'echo \'{text}\' > "$(dirname "$3")/answer.json"'


def test_an_answer(script: Script):
    script(answer('{"value": 1}'))
    assert worker.call("measure", {}) == {"value": 1}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("exit 3", "the measure process ended with exit code 3"),
        ("kill -SEGV $$", "the measure process was ended by SIGSEGV"),
        (
            "kill -9 $$",
            r"was killed, as the system .* runs out: it had taken [\d.]+ .B, the weights .* have 0 B, this machine has",
        ),
    ],
)
def test_an_answer_counts_only_after_a_good_end(script: Script, end: str, message: str):
    script(f"{answer('{}')}\n{end}")
    with pytest.raises(BitpressError, match=message):
        worker.call("measure", {})


def test_a_known_error_is_the_same_here(script: Script):
    script(answer('{"error": "NaN", "kind": "NumericsError", "traceback": "Traceback: there"}'))
    with pytest.raises(NumericsError, match="NaN") as caught:
        worker.call("measure", {})
    assert str(caught.value.__cause__) == "Traceback: there"


def test_an_unknown_error_keeps_its_last_line(script: Script, tmp_path: Path):
    script(answer('{"error": "", "kind": null, "traceback": "Traceback: in perform\\\\nKeyError: 5"}'))
    with pytest.raises(worker.RemoteError) as caught:
        worker.call("measure", {})
    reason = unexpected(caught.value, tmp_path)
    assert str(reason) == f"unexpected KeyError: 5; its traceback is in {tmp_path / LOG}; please report it"
    assert "in perform" in (tmp_path / LOG).read_text()


class Panic(BaseException):
    """As PyO3's PanicException, which is no Exception."""


def test_whatever_a_task_raises_is_an_answer(monkeypatch: pytest.MonkeyPatch):
    def panic(request: dict[str, Any]) -> None:
        raise Panic("hf_abcdefghijklmnopqrstuvwxyz")

    monkeypatch.setattr(measure, "measure_task", panic)
    told = perform({"task": "measure"})
    assert told["kind"] is None
    assert told["traceback"].endswith("Panic: <TOKEN>\n")


def ended(pid: int) -> bool:
    """Whether a process ends within seconds; somebody else waits for it."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def pid_in(path: Path) -> int:
    for _ in range(12_000):
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.01)
    raise TimeoutError(f"nobody wrote {path} in two minutes")


ORPHAN = """
import os, sys, time
from pathlib import Path
from typing import Any
from bitpress.pipeline.system.children import end_with_parent
end_with_parent(Path(sys.argv[1]))
Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_it_ends_with_its_parent_and_holds_its_lock_till_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ready = tmp_path / "ready"
    python = sys.executable
    if (parent := os.fork()) == 0:
        with journal.locked(tmp_path), children.private_folder() as folder:
            command = [python, "-c", ORPHAN, str(folder), str(ready)]
            with children.start(command, folder, stdin=-1, pass_fds=journal.held()) as process:
                process.wait()
        os._exit(0)
    orphan = pid_in(ready)
    os.kill(orphan, signal.SIGSTOP)  # it notices nothing for a while
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    monkeypatch.setattr(journal, "_PATIENCE", 0.2)
    with pytest.raises(LockedError, match=f"in use by process {parent}"), journal.locked(tmp_path):
        pass
    os.kill(orphan, signal.SIGCONT)
    monkeypatch.setattr(journal, "_PATIENCE", 30)
    with journal.locked(tmp_path):  # waits for the end of the orphan
        assert ended(orphan)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_while_it_runs(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    which: signal.Signals,
    times: int,
):
    """A terminal sends it to all processes; one of them says so, in one line."""
    ready = tmp_path / "ready"
    script(f"echo $$ > {ready}\nexec sleep 60")
    monkeypatch.setattr(app, "app", lambda **options: worker.call("measure", {}))
    if (command := os.fork()) == 0:
        os.setsid()
        code = 99
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    process = pid_in(ready)
    for _ in range(times):
        os.killpg(command, which)
    assert os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]) == 130
    assert ended(process)
    assert capfd.readouterr().err == "interrupted; run the same command again to go on\n"
