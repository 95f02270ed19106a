"""Ctrl-C, a request to end, a terminal that closes: one line, and one exit code."""

import os
import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT, as shells have it
SENTENCE = "interrupted; run the same command again to go on"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler: Callable[[int, FrameType | None], None]) -> None:
    """Set what happens from now on. What is ignored, as nohup and shells arrange, stays ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_now(number: int, frame: FrameType | None) -> None:
    """A handler: the process ends at once. Nothing is lost: files are whole or not there."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a bar may have hidden it
    os.write(2, show_cursor + b"\r" * os.isatty(2) + SENTENCE.encode() + b"\n")
    os._exit(INTERRUPTED)
