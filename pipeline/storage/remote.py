"""Output on object storage: a run works in a folder of this machine, and fsspec keeps a copy of it at a URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from ..errors import ConfigError, DiskError
from . import files
from .checkpoint import read_json
from .fingerprint import MANIFEST, digest

_RECORD = ".sent.json"  # in the local folder: file -> size and time of what lies at the URL
_UNFINISHED = (
    "states",
    "artifact.tmp",
    "distill.tmp",
)  # folders of work that only the machine that began it goes on with
_LAST = (MANIFEST, "metrics.json")  # what says that the other files of a folder are complete is sent after them


def is_remote(output: str) -> bool:
    """Whether an output is a URL, such as s3://bucket/runs."""
    return "://" in output


def local_output(output: str) -> Path:
    """The folder of this machine that a run works in: the output itself or, for a URL, one in the user's cache.

    Raises:
        DiskError: the output is a URL, and the user has no cache.
    """
    if not is_remote(output):
        return Path(output).expanduser()
    return files.cache_folder("outputs") / digest({"output": output})[:16]


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL and its copy on this machine."""

    url: str
    local: Path

    @contextmanager
    def _storage(self) -> Iterator[tuple[Any, str]]:
        """fsspec's file system, and the folder's path in it.

        Raises:
            ConfigError: no such protocol, or its package is not installed. DiskError: the storage refuses.
        """
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "file"))
            raise ConfigError(
                f"output: {self.url} cannot be used ({error}); expected a folder or a URL that fsspec knows, such as "
                f"{known}, and the package for it installed, such as s3fs or gcsfs"
            ) from error
        try:
            yield system, path.rstrip("/")
        except (ConfigError, DiskError, KeyboardInterrupt):
            raise
        except Exception as error:  # each driver has errors of its own
            raise DiskError(
                f"output: {self.url}: the storage refuses ({type(error).__name__}: {error}); look at the bucket's name "
                f"and your rights, and run the same command again: what is finished is kept in {self.local}"
            ) from error

    def fetch(self) -> int:
        """Bring what lies at the URL and not here; returns how many files came. Work that was begun here is kept."""
        sent, count = self._sent(), 0
        with self._storage() as (system, root):
            remote = system.find(root, detail=True) if system.exists(root) else {}
            for path, info in remote.items():
                name = path.removeprefix(root).lstrip("/")
                here = self.local / name
                if not here.resolve().is_relative_to(self.local.resolve()):
                    raise DiskError(
                        f"output: {self.url} has a file called {name!r}, which would lie outside the folder"
                    )
                unchanged = here.exists() and sent.get(name) == _state(here)
                if here.exists() and not (unchanged and here.stat().st_size != info["size"]):
                    continue
                files.make_folder(here.parent)
                with system.open(path, "rb") as file:
                    files.write_file(here, iter(lambda file=file: file.read(files.CHUNK), b""))  # type: ignore[misc]
                sent[name] = _state(here)
                count += 1
        if count:
            files.write_json(self.local / _RECORD, sent)
        return count

    def send(self) -> int:
        """Copy to the URL what is new or changed here, and delete there what was deleted here; returns how many files
        went. Unfinished work, locks and statistics stay here."""
        sent, count = self._sent(), 0
        names = sorted(self._finished(), key=lambda name: (Path(name).name in _LAST, name))
        changed = [name for name in names if sent.get(name) != _state(self.local / name)]
        gone = [name for name in sent if name not in names]
        if not changed and not gone:
            return 0
        with self._storage() as (system, root):
            for name in gone:
                if system.exists(f"{root}/{name}"):
                    system.rm_file(f"{root}/{name}")
                del sent[name]
            for name in changed:
                state = _state(self.local / name)
                system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                system.put_file(str(self.local / name), f"{root}/{name}")
                sent[name] = state
                count += 1
                files.write_json(self.local / _RECORD, sent)
        return count

    def _finished(self) -> Iterator[str]:
        for path in self.local.rglob("*"):
            parts = path.relative_to(self.local).parts
            if path.is_file() and not any(part.startswith(".") or part in _UNFINISHED for part in parts):
                yield "/".join(parts)

    def _sent(self) -> dict[str, Any]:
        path = self.local / _RECORD
        return read_json(path) if path.exists() else {}


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
