"""Ctrl-C, a request to end, a terminal that closes: one line, and one exit code."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT, as shells have it
_SENTENCE = "interrupted; run the same command again to go on"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what happens from now on. What is ignored, as nohup and shells arrange, stays ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _say() -> None:
    show_cursor = b"\x1b[?25h\r" if os.isatty(2) else b""  # a bar may have hidden it
    os.write(2, show_cursor + _SENTENCE.encode() + b"\n")


def end_now(number: int, frame: FrameType | None) -> None:
    """A handler: the process ends at once. Nothing is lost: files are whole or not there."""
    _say()
    os._exit(INTERRUPTED)


def end() -> NoReturn:
    """End a program that has closed what it had open, after one more or none of these signals.

    Python itself would end it by SIGINT again, if that had hit it while a library was imported.
    """
    handle(signal.SIG_IGN)
    _say()
    sys.stdout.flush()
    atexit.register(os._exit, INTERRUPTED)
    sys.exit(INTERRUPTED)
