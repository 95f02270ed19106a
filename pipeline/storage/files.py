"""The only writer of run files: every file appears whole or not at all, and survives a power cut once committed."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.eval.report.words import size
from bitpress.kernels.user_cache import user_cache

from ..errors import ConfigError, DiskError

CHUNK = 1 << 22
_HEADER_ALIGNMENT = 8
LOCK = ".lock"
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write(descriptor: int, data: bytes | memoryview) -> int:
    return os.write(descriptor, data)


def fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskError(
                f"{path}: the disk is full ({error.strerror}); free some space and run the same command again: "
                "what is finished is kept"
            ) from error
        raise DiskError(f"{path}: cannot write: {error.strerror}") from error


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[write(descriptor, view) :]


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Small chunks joined, large ones cut: few system calls, at most CHUNK bytes each."""
    pending = bytearray()
    for chunk in chunks:
        if not memoryview(chunk).nbytes:
            continue  # a memoryview of nothing cannot be cast
        view = memoryview(chunk).cast("B")
        if len(pending) + len(view) > CHUNK and pending:
            yield bytes(pending)
            pending.clear()
        if len(view) < CHUNK:
            pending += view
            continue
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
    if pending:
        yield bytes(pending)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file atomically and durably: temporary file, fsync, rename, fsync of the folder.

    Returns:
        {"bytes": size, "sha256": hex digest} of what was written.
    Raises:
        DiskError: the file is left as it was before the call.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest, nbytes = hashlib.sha256(), 0
    with disk_errors(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                for piece in _pieces(chunks):
                    write_all(descriptor, piece)
                    digest.update(piece)
                    nbytes += len(piece)
                fsync(descriptor)
            finally:
                os.close(descriptor)
            replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # half a file must not fill a full disk
            raise
        sync_folder(path.parent)
    return {"bytes": nbytes, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """A JSON file, indented; see write_file."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_file(path, [text.encode()])


def copy_file(source: Path, target: Path) -> dict[str, Any]:
    """A copy of a small file or a large one, a piece at a time; see write_file."""
    with source.open("rb") as file:
        return write_file(target, iter(lambda: file.read(CHUNK), b""))


def shard_name(number: int, total: int) -> str:
    """What transformers calls the number-th, from 0, of so many weight files."""
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def write_text(path: Path, text: str) -> dict[str, Any]:
    return write_file(path, [text.encode()])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, the same bytes for the same tensors: names sorted, one metadata key.

    Written here rather than by the safetensors package, whose files come without fsync, with mode 0600, and (through
    its bytes interface) with two copies of all tensors in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first keeps all aligned
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return write_file(path, itertools.chain([_preamble(header)], (raw(tensors[name]) for name in names)))


def write_rows(
    path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
) -> dict[str, Any]:
    """A safetensors file of one tensor that comes in parts, along its first dimension, and is never held whole."""
    nbytes = math.prod(shape) * dtype.itemsize
    entry = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    preamble = _preamble({"__metadata__": {"format": "pt"}, name: entry})
    written = write_file(path, itertools.chain([preamble], map(raw, parts)))
    assert written["bytes"] == len(preamble) + nbytes, "the parts do not add up to the shape"
    return written


def _preamble(header: dict[str, Any]) -> bytes:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, durably; an empty folder of that name is replaced."""
    with disk_errors(final):
        sync_folder(temporary)
        replace(temporary, final)
        sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that bitpress made and no longer needs."""
    with disk_errors(folder):
        shutil.rmtree(folder)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remove_unused(folder: Path) -> None:
    """Delete an output folder in which nothing was written yet but its lock."""
    if {path.name for path in folder.iterdir()} <= {LOCK}:
        remove_folder(folder)


def is_occupied(path: Path) -> bool:
    """Whether something lies there that a new folder would replace; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def make_folder(folder: Path) -> None:
    """Create an output folder, or say why not.

    Raises:
        ConfigError: it is a file, or there is no permission.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the output folder {folder}: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the output folder {folder} is not writable; choose another")


def cache_folder(name: str) -> Path:
    """A folder of the user's cache; it may not exist yet.

    Raises:
        DiskError: the user has no cache.
    """
    cache = user_cache()
    if cache is None:
        raise DiskError(f"no folder for {name}: there is no home folder, and XDG_CACHE_HOME names none; set it to one")
    return cache / name


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first one above it that there is."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def preflight(folder: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold; `needed` in bytes.

    Raises:
        DiskError: says needed and free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"{folder}: needs about {size(needed)}, {size(free)} are free; free some space or choose another output"
        )
