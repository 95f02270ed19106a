"""Little input must not cost much: what takes too long or too much ends, and what does not is as it is."""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.system.limits import Budget, ChildError, OverBudget, in_child, within

if sys.platform != "linux":
    pytest.skip("limits of memory and forks are Linux's", allow_module_level=True)

LITTLE = Budget(20, 1 << 27)


def loop() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # libraries do this
            continue


def fill() -> None:
    {number: str(number) for number in range(1 << 40)}


def power() -> int:
    return 9**9**9 % 7


def pattern() -> Any:
    return re.match(r"(a+)+$", "a" * 64 + "b")


class TestWithin:
    def test_nothing_changes_for_what_keeps_to_it(self):
        with within(LITTLE):
            total = sum(range(10))
        assert total == 45
        assert threading.active_count() == len(threading.enumerate())
        bytearray(1 << 28)

    def test_time(self):
        start = time.monotonic()
        with pytest.raises(OverBudget, match="more than 0 s of computing"), within(Budget(0.1, 1 << 27)):
            loop()
        assert time.monotonic() - start < 10
        time.sleep(0.3)  # nothing comes afterwards

    @pytest.mark.parametrize("take", [fill, lambda: torch.ones(1 << 30), lambda: bytearray(1 << 30)])
    def test_memory(self, take: Callable[[], Any]):
        with pytest.raises(OverBudget, match=r"more than 0\.1 GB of memory"), within(LITTLE):
            take()

    def test_other_errors_pass(self):
        with pytest.raises(RuntimeError, match="size"), within(LITTLE):
            torch.ones(2) @ torch.ones(3)


class TestInChild:
    def test_value(self):
        kept: list[int] = []
        assert in_child(lambda: kept.append(1) or ["ä", 1.5, None], LITTLE) == ["ä", 1.5, None]
        assert kept == []

    @pytest.mark.parametrize("take", [power, pattern])
    def test_time(self, take: Callable[[], Any]):
        """What nothing stops from within: a power of large numbers, a regular expression."""
        with pytest.raises(OverBudget, match="more than 1 s of computing"):
            in_child(take, Budget(1, 1 << 27))

    @pytest.mark.parametrize("take", [lambda: [0] * (1 << 28), lambda: "x" * (1 << 31)])
    def test_memory(self, take: Callable[[], Any]):
        with pytest.raises(OverBudget, match=r"more than 0\.1 GB of memory"):
            in_child(take, LITTLE)

    def test_errors(self):
        def refuse() -> None:
            raise CheckpointError("no")

        with pytest.raises(CheckpointError, match=r"^no$"):
            in_child(refuse, LITTLE)
        with pytest.raises(ChildError, match=r"division or modulo by zero|division by zero"):
            in_child(lambda: 1 // 0, LITTLE)
        with pytest.raises(ChildError, match=r"ended its process \(SIGABRT"):
            in_child(lambda: [faulthandler.disable(), os.kill(os.getpid(), signal.SIGABRT)], LITTLE)
        with pytest.raises(ChildError, match=r"ended its process \(exit code 3"):
            in_child(lambda: os._exit(3), LITTLE)

    def test_an_interrupt_leaves_no_child(self, monkeypatch: pytest.MonkeyPatch):
        children: list[int] = []
        fork = os.fork
        monkeypatch.setattr(os, "fork", lambda: children.append(child := fork()) or child)
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            in_child(lambda: time.sleep(60), LITTLE)
        with pytest.raises(ProcessLookupError):
            os.kill(children[0], 0)
