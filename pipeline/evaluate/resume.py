"""Scores of the windows of a text, kept on the disk, so that an interrupted evaluation goes on where it stopped."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..storage import files, journal
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import Fingerprint, open_work

_SECONDS = 1.0  # of work that may be lost: committing each of many short windows would take longer than they do

Scores = dict[str, Tensor]


class WindowStore(Mapping[int, Scores]):
    """Window's number -> tensors by name: files in a folder, written a few windows at a time, each committed by a line
    of the folder's journal. Tensors are read when they are asked for.

    Raises:
        ConfigError: the folder was made from something else (see `fingerprint`), or its journal is damaged.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint):
        files.make_folder(folder)
        self.folder, self._pending, self._since = folder, dict[int, Scores](), time.monotonic()
        open_work(folder, fingerprint)
        self._journal = journal.Journal(folder / journal.NAME)
        self._files: dict[int, Checkpoint] = {}
        for entry in self._journal.entries:
            path = folder / entry["file"]
            if path.exists() and files.sha256_file(path) == entry["sha256"]:  # else they are computed again
                self._files |= dict.fromkeys(entry["windows"], Checkpoint.single(path))

    def __getitem__(self, number: int) -> Scores:
        if number in self._pending:
            return self._pending[number]
        file = self._files[number]
        prefix = f"{number}."
        return {name.removeprefix(prefix): file.read(name) for name in file.tensors if name.startswith(prefix)}

    def __iter__(self) -> Iterator[int]:
        return iter({*self._files, *self._pending})

    def __len__(self) -> int:
        return len({*self._files, *self._pending})

    def keep(self, number: int, scores: Scores) -> None:
        """Add a window; it is on the disk within a second's work, or after flush()."""
        self._pending[number] = scores
        if time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit the windows that were added."""
        if self._pending:
            path = self.folder / f"windows-{min(self._pending):06d}.safetensors"
            tensors = {f"{number}.{name}": t for number, scores in self._pending.items() for name, t in scores.items()}
            written = files.write_safetensors(path, tensors)
            self._journal.append({"file": path.name, "windows": sorted(self._pending), "sha256": written["sha256"]})
            self._files |= dict.fromkeys(self._pending, Checkpoint.single(path))
            self._pending.clear()
        self._since = time.monotonic()

    def __enter__(self) -> "WindowStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # whatever stopped the work, the windows that were finished are kept
