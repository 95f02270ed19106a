"""What was worked out of a checkpoint's headers, kept in the user's cache for the next command.

To ask transformers for the model of a config.json takes two seconds of imports, and the answer is the same until the
headers, or one of the programs, change. Only plain values are kept, and only what follows from the key.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitpress.kernels.user_cache import user_cache

from ..errors import BitpressError
from ..storage.files import write_json
from .versions import versions

_MOST = 200  # answers that are kept; the oldest go first


def folder() -> Path | None:
    """The folder of the answers, in the user's cache; None where the user has none."""
    cache = user_cache()
    return cache / "headers" if cache else None


@functools.cache
def programs() -> dict[str, Any]:
    """Everything whose change may change an answer: versions, and the state of bitpress's own sources."""
    sources = Path(__file__).parents[2]
    files = [path for top in ("pipeline", "kernels") for path in (sources / top).rglob("*.py")]
    states = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return versions() | {"sources": hashlib.sha256(json.dumps(states).encode()).hexdigest()}


def remembered(
    question: str, key: Mapping[str, Any], answer: Callable[[], dict[str, Any]], keep: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The answer to a question, from the cache, or worked out and put there.

    A file that is damaged is as good as none. Where the folder cannot be written, the next command works it out again.

    Args:
        key: all that the answer depends on, programs aside, in plain values.
        answer: works it out, in plain values. keep: whether an answer may be kept.
    """
    where = folder()
    if where is None:
        return answer()
    described = json.dumps({"key": key, "programs": programs()}, sort_keys=True)
    path = where / f"{question}-{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("key") == described:
            kept: dict[str, Any] = known["answer"]
            return kept
    answered = answer()
    if keep(answered):
        with contextlib.suppress(OSError, BitpressError):
            where.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(path, {"key": described, "answer": answered})
            for old in sorted(where.glob("*.json"), key=lambda each: each.stat().st_mtime_ns)[:-_MOST]:
                old.unlink()
    return answered
