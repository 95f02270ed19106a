"""What a file was made from, compared field by field."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError, listing
from .checkpoint import read_json

MANIFEST = "bitpress.json"


def check_fingerprint(path: Path, now: dict[str, Any]) -> None:
    """Refuse to go on from, or trust, what was made from something else.

    Raises:
        ConfigError: lists the fields that differ.
    """
    then = read_json(path).get("fingerprint", {})
    differing = [
        f"{key}: was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} was made from something else; choose another output, or move it away:\n{listing(differing)}"
        )
