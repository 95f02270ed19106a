"""Which parts of long work are finished, and the lock on a folder."""

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import lock_descriptor

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
        if not path.is_file():
            raise ConfigError(f"{path} is no file, as the journal is; remove {path.parent} and run again")
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


_held: list[int] = []  # descriptors of the locks of this process
_PATIENCE = 30.0  # seconds that the processes of a dead one have to notice its death


def held() -> tuple[int, ...]:
    """Descriptors of all locks that this process holds. A process that inherits them holds the locks too, until both
    have ended. On Windows no process inherits a lock: there the one that it started ends with it, and that is all."""
    return () if sys.platform == "win32" else tuple(_held)


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder against a second run. The lock lives as long as this process, and as any that inherited it.

    The lock is on a descriptor of our own (flock(2); on Windows LockFileEx of the first byte), so that a process can
    inherit it: one that outlives its parent would else write beside the next run.

    Args:
        patience: seconds to wait for a process that holds it.
    Raises:
        LockedError: names the process and host that hold it.
    """
    path = folder / files.LOCK
    with files.disk_errors(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o666)
        file = open(descriptor, "a+")  # noqa: SIM115 (closed by the block below)
    with file:
        start = time.monotonic()
        while True:
            try:
                if lock_descriptor(descriptor, blocking=False):
                    break
            except OSError as error:
                raise DiskError(
                    f"{path}: cannot be locked: {error.strerror}; choose an output on another disk"
                ) from error
            file.seek(1)
            holder = file.read().strip()
            waited = time.monotonic() - start
            if waited >= (max(patience, _PATIENCE) if _is_dead(holder) else patience):
                raise LockedError(
                    f"{folder} is in use by {holder or 'another process'}; wait for it, or choose another output"
                )
            time.sleep(0.1)
        with files.disk_errors(path):
            file.truncate(0)
            file.write(f" {_this_process()}")  # on Windows nobody else can read the first byte, which is locked
            file.flush()
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.remove(file.fileno())


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_dead(holder: str) -> bool:
    """Whether the process that took a lock is gone, and one that it started still holds it."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        return psutil.Process(int(words[1])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
