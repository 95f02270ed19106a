"""The last boundary: an error that nobody expected becomes one sentence, and its traceback goes into a log file."""

import os
import tempfile
import traceback
from datetime import datetime, timezone
from pathlib import Path

from bitpress.kernels.user_cache import user_cache

from ..errors import BitpressError
from .redact import redact

LOG = "errors.log"
_NO_GPU_MEMORY = "OutOfMemoryError"  # torch's, which takes seconds to import


def unexpected(error: BaseException, folder: Path | None = None) -> BitpressError:
    """What to tell of an error that is a bug, or want of memory: one sentence, its cause the error itself.

    A BitpressError, which somebody expected, is told as it is.

    Args:
        folder: of the run, whose log gets the traceback; None for the user's cache.
    """
    if isinstance(error, BitpressError):
        return error
    if type(error).__name__ == _NO_GPU_MEMORY:
        result = BitpressError(
            f"the GPU's memory is full: {redact(str(error)).splitlines()[0]}; use --device cpu or fewer windows, or "
            "stop other programs on the GPU, and run the same command again: what is finished is kept"
        )
        result.__cause__ = error
        return result
    text = redact("".join(traceback.format_exception(error)))
    last = text.strip().splitlines()[-1]
    try:
        kept = f"its traceback is in {_write(text, folder or _cache())}"
    except OSError as failure:
        kept = f"its traceback could not be kept ({failure.strerror}), --debug shows it"
    result = BitpressError(f"unexpected {last}; {kept}; please report it")
    result.__cause__ = error
    return result


def _cache() -> Path:
    """A folder of the user's for logs that belong to no run."""
    return user_cache() or Path(tempfile.gettempdir()) / "bitpress"


def _write(text: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / LOG
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n{text}\n")
    return path
