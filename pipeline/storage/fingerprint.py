"""What a result was made from, compared field by field, so that nothing is taken for what it is not.

A fingerprint is flat: name -> plain value; the name may begin with the stage whose result it is about. It holds what
the result depends on and nothing else. What is worth knowing besides (threads, the machine, exact versions) is recorded
next to it and compared with nothing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError, listing
from . import files, journal
from .checkpoint import read_json

MANIFEST = "bitpress.json"  # of a finished artifact
RECORD = "run.json"  # of work that may be unfinished

Fingerprint = dict[str, Any]


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """A sentence for each field that differs: "field: was …, is …"; an absent field counts as None."""
    return [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def stage(fields: Fingerprint, name: str) -> Fingerprint:
    """The fields of one stage: those whose names begin with its name and a dot."""
    return {key: value for key, value in fields.items() if key.startswith(f"{name}.")}


def refuse(folder: Path, before: Fingerprint, now: Fingerprint) -> None:
    """Raises ConfigError, with the fields that differ, where what lies in `folder` was made from something else."""
    if differing := differences(before, now):
        raise ConfigError(
            f"{folder} was made from something else; choose another output, move it away, or run its config again with "
            f"--redo quantize:\n{listing(differing)}"
        )


def check_fingerprint(path: Path, now: Fingerprint) -> None:
    """Refuse to go on from, or trust, what was made from something else.

    Args:
        path: a JSON file with the key "fingerprint".
    Raises:
        ConfigError: lists the fields that differ; or the fingerprint is none.
    """
    before = read_json(path).get("fingerprint", {})
    if not isinstance(before, dict):
        raise ConfigError(
            f"{path}: the fingerprint is {before!r}, expected an object; the file is damaged: move {path.parent} away"
        )
    refuse(path.parent, before, now)


def open_work(folder: Path, now: Fingerprint) -> None:
    """Record what the work in `folder` is made from, or compare with the record of the work that is continued.

    Raises:
        ConfigError: the fields that differ; or there is a journal, and no record of what it is a journal of.
    """
    path = folder / RECORD
    if path.exists():
        check_fingerprint(path, now)
    elif (folder / journal.NAME).exists():
        raise ConfigError(f"{path} is missing, so it cannot be told what {folder} was made from; move it away")
    else:
        files.write_json(path, {"fingerprint": now})


def digest(fields: Any) -> str:
    """sha256, in hex, of plain values: the same for equal ones, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
