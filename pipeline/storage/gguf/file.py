"""Reads a GGUF file's header. The file is not trusted: every length is checked before anything is read by it."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import CheckpointError
from ..tensor_info import TensorInfo

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the file states none
_HEADER_LIMIT = 512 << 20  # bytes; a vocabulary of 256 thousand tokens with its merges takes 12 MB
_MOST_TENSORS = 1 << 20
_MOST_KEYS = 1 << 16
_LONGEST_KEY = 1 << 16  # bytes of a key, or of a tensor's name
_LARGEST_SIZE = 1 << 40  # of one dimension
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class BlockType:
    """How a type of ggml codes a row: `values` of them in every `nbytes` bytes.

    dtype: where each value is a plain number of torch; else None.
    """

    id: int
    name: str
    values: int
    nbytes: int
    dtype: torch.dtype | None = None


_PLAIN = {
    0: ("F32", torch.float32), 1: ("F16", torch.float16), 24: ("I8", torch.int8), 25: ("I16", torch.int16),
    26: ("I32", torch.int32), 27: ("I64", torch.int64), 28: ("F64", torch.float64), 30: ("BF16", torch.bfloat16),
}  # fmt: skip
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
TYPES = {number: BlockType(number, name, 1, dtype.itemsize, dtype) for number, (name, dtype) in _PLAIN.items()}
TYPES |= {number: BlockType(number, *facts) for number, facts in _BLOCKS.items()}
BY_NAME = {kind.name: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file. shape: as torch has it, the inputs last. offset: bytes from the start of the file."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file's header says.

    metadata: key -> value, untrusted. tensors: by name, in file order. data_start: where the header ends, in bytes.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data_start: int

    def stored(self) -> dict[str, TensorInfo]:
        """Name -> TensorInfo as the tensor lies in the file: blocks as bytes, [.., rows, blocks, bytes of a block]."""
        infos = {}
        for tensor in self.tensors.values():
            kind, shape = tensor.kind, tensor.shape
            if kind.dtype is None:
                shape = (*shape[:-1], shape[-1] // kind.values, kind.nbytes)
            dtype = kind.dtype or torch.uint8
            infos[tensor.name] = TensorInfo(tensor.name, self.path, dtype, shape, tensor.offset, tensor.nbytes)
        return infos


class _Reader:
    """Takes values from the front of a file, never past its end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.size = file, min(size, _HEADER_LIMIT), size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"its header asks for {count} bytes where {self.left} are left")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends within its header")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, most: int = _HEADER_LIMIT) -> str:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"a text of {length} bytes, expected at most {most}")
        return self.take(length).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            value = self.number(_NUMBERS[kind])
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 1:
            raise ValueError(f"a value of type {kind}, which GGUF does not have here")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(self._bytes(count, struct.calcsize(f"<{code}")))))
        self._bytes(count, 8)  # a text, or an array within the array, has its length at least
        return [self.value(inner, depth + 1) for _ in range(count)]

    def _bytes(self, count: int, each: int) -> int:
        if count * each > self.left:
            raise ValueError(f"an array of {count} values where {self.left} bytes are left")
        return count * each


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it is none, it is damaged, or it holds a type that bitpress does not read.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size)
    except (ValueError, struct.error, MemoryError) as error:
        raise CheckpointError(f"{path}: no GGUF file that bitpress can read: {error}; get the file again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path, file: BinaryIO, size: int) -> GGUFFile:
    reader = _Reader(file, size)
    if (magic := reader.take(4)) != MAGIC:
        raise ValueError(f"it begins with {magic!r}, expected {MAGIC!r}")
    if (version := reader.number("I")) not in _VERSIONS:
        raise ValueError(f"version {version}, expected 2 or 3, little end first")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    if tensor_count > _MOST_TENSORS or key_count > _MOST_KEYS:
        raise ValueError(f"{tensor_count} tensors and {key_count} keys are too many")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.text(_LONGEST_KEY)
        if key in metadata:
            raise ValueError(f"the key {key!r} stands there twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r}, expected a multiple of 8")
    start = -(-file.tell() // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, offset in infos:
        nbytes = math.prod(shape) // kind.values * kind.nbytes
        if name in tensors:
            raise ValueError(f"the tensor {name!r} stands there twice")
        if offset % alignment or start + offset + nbytes > size:
            raise ValueError(f"{name}: {nbytes} bytes at {offset} do not lie in a file of {size} bytes")
        tensors[name] = GGUFTensor(name, kind, shape, start + offset, nbytes)
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda each: each.offset):
        if tensor.offset < end:
            raise ValueError(f"{tensor.name} and {before} lie over each other")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return GGUFFile(path, metadata, tensors, start)


def _tensor_info(reader: _Reader) -> tuple[str, BlockType, tuple[int, ...], int]:
    """(name, type, shape, offset) of the next tensor."""
    name, rank = reader.text(_LONGEST_KEY), reader.number("I")
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {rank} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    shape = tuple(reader.number("Q") for _ in range(rank))[::-1]
    if not all(1 <= each <= _LARGEST_SIZE for each in shape) or math.prod(shape) > _LARGEST_SIZE:
        raise ValueError(f"{name} has shape {list(shape)}")
    number, offset = reader.number("I"), reader.number("Q")
    if (kind := TYPES.get(number)) is None:
        known = ", ".join(each.name for each in TYPES.values())
        raise ValueError(f"{name} is of type {number}, and bitpress reads {known}")
    if shape[-1] % kind.values:
        raise ValueError(f"{name} is {kind.name}, and its rows of {shape[-1]} are no whole blocks of {kind.values}")
    return name, kind, shape, offset
