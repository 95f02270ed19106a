"""The boundary around libraries that open a checkpoint's files: whatever they throw becomes one sentence."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import BitpressError, CheckpointError
from .limits import OverBudget
from .redact import redact

_LONGEST = 400  # characters of what a library said
_silencing = threading.Lock()


@contextlib.contextmanager
def library_errors(what: str, advice: str, copies: Path | None = None) -> Iterator[None]:
    """Turns anything that a library throws into a CheckpointError "WHAT: what the library said; ADVICE".

    Some throw more than Exception: a panic of tokenizers is a BaseException. The original stays the cause, for --debug.
    OverBudget passes.

    Args:
        copies: a folder of copies that the library was given, whose path says nothing to the user.
    """
    try:
        yield
    except (BitpressError, OverBudget, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {said(error, copies)}; {advice}") from error


def said(error: BaseException, copies: Path | None = None) -> str:
    """What an exception says in its first paragraph, on one line and redacted; its kind where it says nothing."""
    paragraph = redact(str(error)).strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    if copies is not None:
        text = text.replace(f"{copies}/", "").replace(str(copies), "the folder")
    text = text.rstrip(" .;:") or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what a library prints past Python: tokenizers prints a file's unknown keys as they are, to stdout.

    Other threads print nothing meanwhile either.
    """
    with _silencing, contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # what waits there is ours
        nothing = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nothing)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # a program may have been started without it
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, descriptor)
                os.dup2(nothing, descriptor)
        yield
