"""Which parts of long work are finished, and the lock on a folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DiskError, LockedError
from . import files

NAME = "journal.jsonl"


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, allow_nan=False).encode()).hexdigest()[:16]


class Journal:
    """One JSON object a line, sealed by a hash; a line that is whole and synced is a commit, and nothing else is.

    Raises:
        ConfigError: a line is not as it was written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                intact = entry.pop("seal") == _seal(entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                intact = False
            if not intact:
                raise ConfigError(
                    f"{path}: line {number} is not as it was written, so what is finished cannot be told; "
                    f"move {path.parent} away and run again"
                )
            self.entries.append(entry)
        if len(whole) != len(data):  # the tail was torn by a crash: it was never committed
            with files.disk_errors(path):
                os.truncate(path, len(whole))

    def append(self, entry: dict[str, Any]) -> None:
        with files.disk_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                files.write_all(descriptor, json.dumps({**entry, "seal": _seal(entry)}).encode() + b"\n")
                files.fsync(descriptor)
            finally:
                os.close(descriptor)
            files.sync_folder(self.path.parent)
        self.entries.append(entry)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against a second run. flock frees itself when its holder dies, however it dies.

    Raises:
        LockedError: names the process and host that hold it.
    """
    path = folder / files.LOCK
    with files.disk_errors(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LockedError(f"{folder} is in use by {holder}; wait for it, or choose another output") from None
        except OSError as error:
            raise DiskError(f"{path}: cannot be locked: {error.strerror}; choose an output on another disk") from error
        with files.disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
