"""What can go wrong, and the exit code of each kind. A message says what, got, expected, and what to do."""

import difflib
from collections.abc import Iterable


class BitpressError(Exception):
    """A problem that the user can act on; printed without a traceback."""

    exit_code = 1


class ConfigError(BitpressError):
    """A config, an option or an output folder that cannot be used as asked."""

    exit_code = 2


class CheckpointError(BitpressError):
    """An input checkpoint or artifact that is broken, unsafe or unsupported."""

    exit_code = 3


class NumericsError(BitpressError):
    """NaN or infinite values, text that cannot be used, or results that do not match."""

    exit_code = 4


class DiskError(BitpressError):
    """No space, no permission, or an I/O failure while writing."""

    exit_code = 5


class HubError(BitpressError):
    """The Hugging Face Hub could not be reached or refused."""

    exit_code = 6


class LockedError(BitpressError):
    """Another run holds the output folder."""

    exit_code = 7


class GateError(BitpressError):
    """A quantized model that misses what the config's gates ask for; everything is written."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the known word closest to `name`; "" if none is close."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def listing(problems: list[str], limit: int = 20) -> str:
    """Problems as indented lines, the excess counted."""
    shown = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  … and {len(problems) - limit} more")
    return "\n".join(shown)
