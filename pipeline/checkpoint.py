"""The only reader of untrusted checkpoints: headers first, every claim checked, tensors read one at a time."""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, listing
from .store import SAFETENSORS_DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_JSON_LIMIT = 64 << 20  # the largest tokenizer.json in use is 33 MB
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_SUFFIXES = (*_PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".index.json")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `offset` in bytes from the start of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {duplicate!r} stands there twice")
    return dict(pairs)


def read_json(path: Path, limit: int = _JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from an untrusted file: bounded in size and depth, no duplicate keys.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        if (size := regular_file(path).stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {limit}")
        value = json.loads(path.read_bytes(), object_pairs_hook=_pairs)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it") from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a checkpoint's file") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def regular_file(path: Path) -> Path:
    """`path`, if it is a regular file inside its folder (or in the Hub cache's blobs, which a snapshot links to).

    Raises:
        CheckpointError: it is a pipe, a device or a folder, or a link that leads out.
        FileNotFoundError: there is no such file.
    """
    target = path.resolve(strict=True)
    folder = path.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{path} is a link that leads out of its folder, to {target}; copy the file instead")
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return path


def _header(path: Path) -> dict[str, TensorInfo]:
    """Validated by the safetensors package (bounds, overlaps, sizes), then read for the offsets it does not tell."""
    try:
        with safe_open(regular_file(path), "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_pairs)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt: {error}; download it again") from error
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, which bitpress does not read")
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        infos[name] = TensorInfo(name, path, dtype, tuple(entry["shape"]), 8 + length + begin, end - begin)
    return infos


def _shard_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"{value!r} is not a file name"
    if any(mark in value for mark in ("/", "\\", ":", "\0")) or value in ("", ".", ".."):
        return f"{value!r} is not a plain file name in the checkpoint's folder"
    if not value.endswith(".safetensors"):
        return f"{value!r} is not a safetensors file"
    return None


class Checkpoint:
    """A folder of safetensors, sharded or not. Opening it reads headers only.

    Attributes:
        folder: where it lies.
        tensors: name -> TensorInfo, in file order.
        files: the weight files.
    Raises:
        CheckpointError: everything found wrong with the index and the shards, at once.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; give a local checkpoint folder or a Hub id such as org/name"
            )
        self.tensors: dict[str, TensorInfo] = {}
        if (folder / INDEX).exists():
            self._read_sharded()
        elif (folder / SINGLE).exists():
            self.files = [folder / SINGLE]
            self.tensors = _header(self.files[0])
        else:
            self._refuse_without_safetensors()
        self._stats = self._stat()

    def _refuse_without_safetensors(self) -> None:
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds only pickles ({', '.join(pickles[:3])}), which can run code when read; "
                "convert it with transformers' save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}")

    def _read_sharded(self) -> None:
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX}: no weight_map; download it again")
        problems = {f"{name}: {problem}" for name, file in weight_map.items() if (problem := _shard_problem(file))}
        if problems:
            raise CheckpointError(f"{self.folder / INDEX} is not safe to follow:\n{listing(sorted(problems))}")
        self.files = [self.folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in self.files if not file.exists()]
        if missing:
            raise CheckpointError(f"{self.folder}: files named in {INDEX} are missing:\n{listing(missing)}")
        faults = []
        for file in self.files:
            for name, info in _header(file).items():
                if name in self.tensors:
                    faults.append(f"{name} is in both {self.tensors[name].file.name} and {file.name}")
                elif weight_map.get(name) != file.name:
                    faults.append(f"{name} is in {file.name}, the index says {weight_map.get(name, 'nothing')}")
                self.tensors[name] = info
        faults += [
            f"{name} is in the index, not in {file}" for name, file in weight_map.items() if name not in self.tensors
        ]
        if faults:
            raise CheckpointError(f"{self.folder}: {INDEX} and the files disagree:\n{listing(faults)}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; refused where it wants to run code of its own."""
        config = read_json(self.folder / "config.json")
        if "auto_map" in config:
            raise CheckpointError(
                f"{self.folder / 'config.json'} asks for code of its own (auto_map: {config['auto_map']}), which bitpress "
                "never runs; use a checkpoint of an architecture that transformers has"
            )
        return config

    @classmethod
    def single(cls, file: Path) -> "Checkpoint":
        """One safetensors file by itself, whatever its name."""
        checkpoint = cls.__new__(cls)
        checkpoint.folder, checkpoint.files, checkpoint.tensors = file.parent, [file], _header(file)
        return checkpoint

    @staticmethod
    def names_in(file: Path) -> list[str]:
        """The tensor names of one safetensors file."""
        return list(_header(file))

    def read(self, name: str, digest: "hashlib._Hash | None" = None) -> Tensor:
        """One tensor, copied into memory; `digest` is fed its bytes."""
        info = self.tensors[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            filled = 0
            while filled < info.nbytes:
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{info.file}: ends within {name}; it changed while it was read")
                filled += count
        if digest is not None:
            digest.update(view)
        return buffer.view(info.dtype).reshape(info.shape)

    def identity(self) -> dict[str, str]:
        """File name -> a hash of its header and size: tells checkpoints apart without reading the weights."""
        result = {}
        for file in self.files:
            with file.open("rb") as handle:
                head = handle.read(8)
                head += handle.read(int.from_bytes(head, "little"))
            size = file.stat().st_size
            result[file.name] = hashlib.sha256(head + str(size).encode()).hexdigest()
        return result

    def _stat(self) -> dict[str, tuple[int, int, int]]:
        stats = {file.name: os.stat(file) for file in self.files}
        return {name: (value.st_ino, value.st_size, value.st_mtime_ns) for name, value in stats.items()}

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a weight file was replaced or written since it was opened."""
        now = self._stat()
        changed = [name for name, value in self._stats.items() if now[name] != value]
        if changed:
            raise CheckpointError(
                f"{self.folder}: {', '.join(changed)} changed while it was being read; run again once it is at rest"
            )

    def other_files(self) -> list[Path]:
        """Every non-weight file of the folder that comes along: tokenizer, generation config, licence, …

        Left out: hidden files, code, folders and links that lead elsewhere.
        """
        found = []
        for path in sorted(self.folder.iterdir()):
            name = path.name
            if name.startswith(".") or name.endswith(WEIGHT_SUFFIXES) or path.suffix in (".py", ".so", ".sh"):
                continue
            if path.is_file() and name not in ("config.json", "quantize_config.json"):
                found.append(regular_file(path))
        return found
