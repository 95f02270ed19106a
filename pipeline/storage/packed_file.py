"""A file of tensors that is mapped into memory, beside a checkpoint: what `bitpress optimize` writes.

    magic, zeros up to 128 · tensors, each at a multiple of 128 bytes · header, JSON · where it is, its SHA-256, magic

The header is checked before anything is taken from the file: its hash, and that every tensor lies within the file. What
the tensors hold is checked by `damaged` alone, which reads all of it: to load, whoever uses them must be safe for any
content. A mapping shows what others write to the file later, so only files that nobody else may write to are mapped;
bitpress itself never writes to one, but puts another in its place.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DiskError
from . import files, journal
from .files import SAFETENSORS_DTYPES

FOLDER = ".optimized"  # beside the weights; hidden, so that it is no part of the checkpoint
_MAGIC = b"bitpack1"
_ALIGNMENT = 128  # bytes: a line of the cache, or two
_FOOTER = struct.Struct("<QQ32s8s")  # where the header begins, its bytes, its SHA-256, magic
_GUARDED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no link; and nobody waits for a pipe
_LARGEST_HEADER = 256 << 20  # bytes
_DTYPES = {str(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}


class PackedFileError(Exception):
    """Why a file is not mapped."""


class PackedFile:
    """A file that is mapped, its header checked.

    Attributes:
        header: what was written, "tensors" aside. path: where it is. nbytes: its size.
    Raises:
        PackedFileError: it is none, or not as it was written, or somebody else may write to it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | _GUARDED)
        except OSError as error:
            raise PackedFileError(f"it cannot be opened: {error.strerror}") from error
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PackedFileError("it is no regular file")
            if (hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid())) or status.st_mode & 0o022:
                raise PackedFileError("it is not this user's alone: others could write to it while it is used")
            self.nbytes = status.st_size
            if self.nbytes < _ALIGNMENT + _FOOTER.size:
                raise PackedFileError("it is truncated")
            file.seek(self.nbytes - _FOOTER.size)
            self._end, length, digest, magic = _FOOTER.unpack(file.read(_FOOTER.size))
            if magic != _MAGIC:
                raise PackedFileError("it is truncated, or of another version")
            if length > _LARGEST_HEADER or self._end < _ALIGNMENT or self._end + length + _FOOTER.size != self.nbytes:
                raise PackedFileError("its header lies outside of it")
            file.seek(self._end)
            text = file.read(length)
            if hashlib.sha256(text).digest() != digest:
                raise PackedFileError("its header is damaged")
            # for this process alone: what it writes there stays in its memory
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        try:
            self.header: dict[str, Any] = dict(json.loads(text))
            self._tensors: dict[str, tuple[torch.dtype, list[int], int]] = {}
            for name, (dtype, shape, offset) in self.header.pop("tensors").items():
                if any(type(size) is not int or size < 0 for size in (offset, *shape)) or offset % _ALIGNMENT:
                    raise PackedFileError(f"{name} lies outside of it")
                if offset + math.prod(shape) * _DTYPES[dtype].itemsize > self._end:
                    raise PackedFileError(f"{name} lies outside of it")
                self._tensors[name] = (_DTYPES[dtype], shape, offset)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PackedFileError("its header is not one that bitpress wrote") from error

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file.

        Raises:
            PackedFileError: there is none of that name.
        """
        if name not in self._tensors:
            raise PackedFileError(f"{name} is missing")
        dtype, shape, offset = self._tensors[name]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def names(self, beginning: str) -> list[str]:
        """The tensors whose names begin so, without that beginning."""
        return [name[len(beginning) :] for name in self._tensors if name.startswith(beginning)]

    def whole(self) -> Tensor:
        """All bytes, uint8, as a view of the mapped file."""
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def damaged(self) -> bool:
        """Whether the tensors are others than were written; reads all of the file."""
        digest = hashlib.sha256()
        for start in range(_ALIGNMENT, self._end, files.CHUNK):
            digest.update(memoryview(self._map)[start : min(start + files.CHUNK, self._end)])
        return digest.hexdigest() != self.header.get("sha256")


def write_packed(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write a file of tensors, whole or not at all, and return its bytes.

    Args:
        header: plain values.
    Raises:
        DiskError: the disk is full. LockedError: another process has been writing there for ten minutes.
    """
    files.preflight(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    with journal.locked(path.parent, patience=600):
        written = files.write_file(path, _content(header, tensors))
        path.chmod(path.stat().st_mode & ~0o022)  # or it would not be mapped
    return int(written["bytes"])


def _content(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield _MAGIC.ljust(_ALIGNMENT, b"\0")
    digest, end, places = hashlib.sha256(), _ALIGNMENT, dict[str, list[Any]]()
    for name, tensor in tensors.items():
        places[name] = [str(tensor.dtype), list(tensor.shape), end]
        padding = bytes(-tensor.nbytes % _ALIGNMENT)
        for piece in (files.raw(tensor), padding):
            digest.update(piece)
            yield piece
        end += tensor.nbytes + len(padding)
    text = json.dumps({**header, "sha256": digest.hexdigest(), "tensors": places}).encode()
    yield text
    yield _FOOTER.pack(end, len(text), hashlib.sha256(text).digest(), _MAGIC)


def place_to_write(checkpoint: Path, user_cache: bool = False) -> Path:
    """The folder for packed weights of a checkpoint, which is there now: beside the weights, or in this user's cache.

    Raises:
        ConfigError: it cannot be written to. DiskError: the user has no cache.
    """
    if user_cache:
        files.make_folder(folder := _in_cache(checkpoint))
        return folder
    try:
        files.make_folder(checkpoint / FOLDER)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint} cannot be written to, and packed weights lie beside the weights; write them into your own "
            "cache by --user-cache, or optimize a copy of the folder"
        ) from error
    return checkpoint / FOLDER


def _in_cache(checkpoint: Path) -> Path:
    name = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:16]
    return files.cache_folder("packed") / name


def folders(checkpoint: Path) -> list[Path]:
    """Where packed weights of a checkpoint may lie: beside the weights, and in the user's cache, if there is one."""
    places = [checkpoint / FOLDER]
    with contextlib.suppress(DiskError):
        places.append(_in_cache(checkpoint))
    return places


def packed_files(checkpoint: Path) -> list[Path]:
    """The files of packed weights that a checkpoint's folder has, whether they fit it or not."""
    return [path for folder in folders(checkpoint) for path in sorted(folder.glob("*.packed"))]


def remove_packed(folder: Path) -> list[Path]:
    """Delete the packed weights of a checkpoint, or of all artifacts of a run; returns the folders that were deleted.

    Raises:
        LockedError: they are being written.
    """
    checkpoints = [folder, *(each.parent for deep in ("*", "*/*", "*/*/*") for each in folder.glob(f"{deep}/{FOLDER}"))]
    removed = [place for each in checkpoints for place in folders(each) if place.is_dir() and not place.is_symlink()]
    for place in removed:
        with journal.locked(place):
            files.remove_folder(place)
    return removed
