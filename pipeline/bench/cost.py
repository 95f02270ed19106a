"""The cost of a process and of all that it starts: wall time, processor time, memory."""

import resource
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

import psutil

from ..system import children

_PERIOD = 0.2  # seconds between looks at memory: looking takes some milliseconds of a core that is being measured


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of processors, and bytes: the highest sum of the processes' resident memory seen."""

    wall: float
    cpu: float
    peak_rss_bytes: int


def measured(command: list[str], log: IO[bytes]) -> tuple[int, Cost]:
    """Run a command in a private folder with its output going to `log`; returns its exit code and its cost.

    Run one at a time: the processor times of all children are counted.
    """
    before, start = _children_seconds(), time.perf_counter()
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    with children.private_folder() as folder, children.start(command, folder, **streams) as process:
        ended, peak = threading.Event(), [0]

        def watch() -> None:
            while not ended.wait(_PERIOD):
                peak[0] = max(peak[0], _resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = process.wait()
        finally:
            wall = time.perf_counter() - start
            ended.set()
            watcher.join()
    return code, Cost(wall, _children_seconds() - before, peak[0])


def _children_seconds() -> float:
    """Processor seconds of all children that have been waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(pid: int) -> int:
    """Bytes of a process and its descendants; pages that they share are counted once for each."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total
