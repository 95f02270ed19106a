"""Budgets of time and memory for what a checkpoint's small files ask for: little input must not cost much.

What can be stopped from within is: `within` watches a block of this process. Chat templates and tokenizers run other
people's loops and patterns, which nothing stops from within: `in_child` runs them in a child process with limits.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..errors import BitpressError

_PERIOD = 0.2  # seconds between two looks at a block's time
_PATIENCE = 10  # times its seconds that a child may take by the clock: the machine has other work too
_ANSWER_LIMIT = 1 << 30  # bytes
_NO_MEMORY = "can't allocate memory"  # so torch's RuntimeError says it


class OverBudget(Exception):
    """What was tried takes more than its budget; the message says of what: "more than 5 s"."""


class ChildError(Exception):
    """What was tried in a child process failed, or ended the process; the message says how."""


class _TimeIsUp(BaseException):
    """No Exception, so that libraries that go on after any exception do not go on after this one."""


@dataclass(frozen=True)
class Budget:
    """seconds: of computing. nbytes: of memory beyond what the process has at the beginning."""

    seconds: float
    nbytes: int

    @property
    def time_sentence(self) -> str:
        return f"more than {self.seconds:.0f} s of computing"

    @property
    def memory_sentence(self) -> str:
        return f"more than {self.nbytes / 1e9:.1f} GB of memory"


@contextlib.contextmanager
def within(budget: Budget) -> Iterator[None]:
    """A block of this process that ends when its budget does. It must do its work in Python and torch.

    Raises:
        OverBudget: it would have taken more.
    """
    try:
        with _memory_limited(budget.nbytes), _time_limited(budget.seconds):
            yield
    except _TimeIsUp:
        raise OverBudget(budget.time_sentence) from None
    except MemoryError:
        raise OverBudget(budget.memory_sentence) from None
    except RuntimeError as error:
        if _NO_MEMORY in str(error):
            raise OverBudget(budget.memory_sentence) from None
        raise


@contextlib.contextmanager
def _memory_limited(nbytes: int) -> Iterator[None]:
    """Allocations beyond `nbytes` fail, where the system can say how much is taken already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        _limit_memory(nbytes)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory(nbytes: int) -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = min([taken + nbytes, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextlib.contextmanager
def _time_limited(seconds: float) -> Iterator[None]:
    """_TimeIsUp is raised in this thread once it has computed so long, again and again until the block ends."""
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else time.CLOCK_MONOTONIC
    end = time.clock_gettime(clock) + seconds
    ended, sent, lock = threading.Event(), threading.Event(), threading.Lock()

    def watch() -> None:
        while not ended.wait(_PERIOD):
            with lock:
                if not ended.is_set() and time.clock_gettime(clock) > end:
                    sent.set()
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))

    watcher = threading.Thread(target=watch, daemon=True, name="time limit")
    watcher.start()
    try:
        yield
    finally:
        while not ended.is_set():
            with contextlib.suppress(_TimeIsUp), lock:  # it may come in the last moment
                ended.set()
        # One that is on its way comes within a few steps. To call it off by PyThreadState_SetAsyncExc(thread, None)
        # would leave Python 3.11 looking for one at every step, and a profiled or traced program stands still then.
        with contextlib.suppress(_TimeIsUp):
            while sent.is_set():
                sent.clear()


def in_child(function: Callable[[], Any], budget: Budget) -> Any:
    """function(), computed in a child process with limits. It must return what JSON can hold, and use no torch.

    A fork costs milliseconds and has all that this process has loaded. Where a fork is not safe, on macOS, the function
    runs in this process, without limits.

    Raises:
        BitpressError: the function did. OverBudget: it would have taken more. ChildError: it raised something else, or
            ended its process.
    """
    if sys.platform != "linux":
        return function()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads; the child uses none of those
        child = os.fork()
    if not child:
        os.close(reading)
        _child(function, budget, writing)
    os.close(writing)
    try:
        answer = _read(reading, budget.seconds * _PATIENCE)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is None or status == -signal.SIGXCPU:
        raise OverBudget(budget.time_sentence)
    try:
        outcome = json.loads(answer)
    except ValueError:
        raise ChildError(f"it ended its process ({_signal_name(status)})") from None
    if "value" in outcome:
        return outcome["value"]
    if outcome["kind"] == MemoryError.__name__:
        raise OverBudget(budget.memory_sentence)
    if outcome["ours"]:
        raise getattr(errors, outcome["kind"])(outcome["error"])
    raise ChildError(outcome["error"])


def _child(function: Callable[[], Any], budget: Budget, writing: int) -> None:
    """The life of the child: it never returns, and nothing that the parent has prepared for its own end is done."""
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # what the parent is done with is not the child's to finish
        seconds = max(1, round(budget.seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory(budget.nbytes)
        try:
            outcome = {"value": function()}
        except BaseException as error:  # a panic of a library in Rust is no Exception
            kind, ours = type(error).__name__, isinstance(error, BitpressError)
            outcome = {"error": str(error).strip() or kind, "kind": kind, "ours": ours}
        answer = memoryview(json.dumps(outcome).encode())
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _read(descriptor: int, seconds: float) -> bytes | None:
    """All that comes through a pipe until it is closed; None where that takes too long or is too much."""
    pieces: list[bytes] = []
    size, end = 0, time.monotonic() + seconds
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    while (left := end - time.monotonic()) > 0 and size <= _ANSWER_LIMIT:
        if ready.poll(1000 * left):
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
    return None


def _signal_name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
