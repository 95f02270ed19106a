"""One task in a fresh process, `python -m bitpress.pipeline.evaluate REQUEST.json`, which has nothing but files.

Used so that what is measured is what a user loads, and that its peak memory is its own. The process runs in a private
folder, where its answer lies too: nobody else takes that for its own. It holds the locks of the process that called it,
and ends with it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from bitpress.eval.report.words import size

from .. import errors
from ..errors import BitpressError
from ..formats import open_quantized
from ..storage import files, journal
from ..system import children

REQUEST, ANSWER = "request.json", "answer.json"
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in what getrusage(2) counts memory by


class RemoteError(Exception):
    """What a task raised in its own process: the traceback there, as text."""


def call(task: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a fresh process and return its answer; its progress goes to this process's stderr.

    Raises:
        BitpressError: the one that the task raised, or that the process died. RemoteError: the task raised another one.
    """
    with children.private_folder() as private:
        files.write_json(private / REQUEST, {"task": task, **request})
        command = [sys.executable, "-m", "bitpress.pipeline.evaluate", str(private / REQUEST)]
        with children.start(command, private, stdin=subprocess.PIPE, pass_fds=journal.held()) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:  # what lies there then may be half of an answer
            raise BitpressError(f"the {task} process {_ending(process.returncode, usage.ru_maxrss, request)}")
        answer = json.loads((private / ANSWER).read_text())
    if "error" in answer:
        remote = RemoteError(answer["traceback"])
        if answer["kind"] is None:
            raise remote
        raise getattr(errors, answer["kind"], BitpressError)(answer["error"]) from remote
    return answer


def _ending(code: int, peak: int, request: dict[str, Any]) -> str:
    """How a process ended without an answer. peak: the most memory that it held, as getrusage(2) counts it."""
    if code != -signal.SIGKILL:
        return f"{children.ending(code)}; run the same command again"
    folders = [Path(request[key]) for key in ("artifact", "baseline") if request.get(key)]
    weights = sum(info.nbytes for folder in folders for info in open_quantized(folder).tensors.values())
    return (
        f"{children.ending(code)}: it had taken {size(peak * _RSS_UNIT)}, the weights that it loads have "
        f"{size(weights)}, this machine has {size(psutil.virtual_memory().total)}; free some memory, or use a machine "
        "with more, and run the same command again"
    )
