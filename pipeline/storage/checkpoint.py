"""The only reader of untrusted checkpoints: headers first, every claim checked, tensors read one at a time."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, listing
from .config import data_of
from .dequantized import DequantizedTensors, coding_files, dequantized, without_coding
from .files import SAFETENSORS_DTYPES, sha256_file
from .gguf.file import GGUFFile, read_gguf
from .gguf.view import GGUFTensors
from .tensor_info import TensorInfo as TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_LIMIT = 64 << 20  # bytes; the largest in use, of 92 thousand tensors, has 9 MB
_CONFIG_LIMIT = 4 << 20
_EARLY_SECTION = "compression_config"  # quantization_config in early files of compressed-tensors
_NAME_LIMIT = 255  # bytes of a file name
_SAMPLE = 4096
_FIRST = 128 << 10  # bytes, which hold the header of most files
_FETCHED = 2 << 30  # bytes: what is fetched long before it is used may be gone again by then
_FEW_LAYERS = 256  # so few layers are cheap to build, and some configs have such numbers without using them
_MOST_FUSED_EXPERTS = 1024
_MOST_POSITIONS = 1 << 24
_MOST_LABELS = 1 << 16
_NO_SIZES = ("hash", "base", "chunk")  # in a key: the base of a hash or samples of sound, which no tensor has as a size
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADAPTER = "adapter_config.json"
# files that are written anew, or are about something else than a model that is made of this one
_OTHER_PURPOSES = (
    "config.json", "quantize_config.json", ADAPTER, "metrics.json", "run.json", "report.md", "report.html",
    "publish.json", "sample.json", "compare.json",
)  # fmt: skip
WEIGHT_SUFFIXES = (*_PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".index.json")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys; ValueError names one."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands there twice")
        result[key] = value
    return result


def read_json(path: Path, limit: int = _INDEX_LIMIT) -> dict[str, Any]:
    """Read a JSON object from an untrusted file: its size and depth are bounded, and no key occurs twice.

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
    try:
        target = path.resolve(strict=True)
    except RuntimeError:  # Python up to 3.12
        raise CheckpointError(f"{path} is a link that leads back to itself; get the file again") from None
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
    """The tensors of a safetensors file.

    The safetensors package validates the header (bounds, overlaps, sizes); it is then read again for the offsets, which
    the package does not give.
    """
    try:
        with safe_open(regular_file(path), "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_pairs)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
    except MemoryError:
        raise CheckpointError(f"{path}: {path.stat().st_size / 1e9:.0f} GB do not fit into memory") from None
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
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


def _fetch_headers(paths: list[Path]) -> None:
    """Let the system read the beginnings of all files at once, before each is waited for: of 17 that lie on a disk,
    0.2 s become 0.05. What cannot be read is left to whoever reads it.

    Raises:
        CheckpointError: see regular_file.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError), regular_file(path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, _FIRST, os.POSIX_FADV_WILLNEED)


def _read_into(buffer: Tensor, info: TensorInfo, offset: int) -> None:
    """Fill a buffer of bytes from the tensor's file."""
    view, filled = buffer.numpy().data, 0
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(offset)
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{info.file}: ends within {info.name}; it changed while it was read")
                filled += count
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read any more: {error.strerror}; run again") from error


def _stored_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows of a tensor as they lie in its file; a scalar has one."""
    assert 0 <= start <= stop <= (info.shape[0] if info.shape else 1)
    size = info.nbytes // max(1, info.shape[0] if info.shape else 1)
    try:
        buffer = torch.empty((stop - start) * size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(f"{info.name}: {info.nbytes / 1e9:.0f} GB do not fit into memory") from error
    _read_into(buffer, info, info.offset + start * size)
    return buffer.view(info.dtype).reshape(stop - start, *info.shape[1:])


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: bytes that are none come as halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shard_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"{value!r} is not a file name"
    if any(character in value for character in ("/", "\\", ":", "\0")) or value in ("", ".", ".."):
        return f"{value!r} is not a plain file name in the checkpoint's folder"
    if not value.isprintable() or len(value.encode()) > _NAME_LIMIT:
        return f"{value[:40]!a}… is not a file name"
    if not value.endswith(".safetensors"):
        return f"{value!r} is not a safetensors file"
    return None


def _implausible(config: Any, count: int, widest: int, path: str = "") -> Iterator[str]:
    """Sizes in a config that no model of these files can have; to build it would take all memory, or for ever.

    Args:
        count: of tensors in the files. widest: the largest size that one has.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _implausible(value, count, widest, f"{path}.{key}" if path else key)
    if not isinstance(config, int) or isinstance(config, bool):
        return
    key = path.rpartition(".")[2]
    if any(word in key for word in _NO_SIZES):
        return
    for words, limit, what in (
        (("layers", "n_layer", "blocks"), max(count, _FEW_LAYERS), f"the files hold {count} tensors"),
        (("experts",), max(count, _MOST_FUSED_EXPERTS), f"the files hold {count} tensors"),
        (("size", "dim", "heads", "n_head", "n_embd", "n_inner"), max(widest, 1 << 16), f"no tensor exceeds {widest}"),
        (("position", "n_ctx"), _MOST_POSITIONS, f"at most {_MOST_POSITIONS} is plausible"),
        (("labels",), _MOST_LABELS, f"at most {_MOST_LABELS} is plausible"),
    ):  # fmt: skip
        if any(word in key for word in words):
            if not -1 <= config <= limit:
                yield f"{path}: {config}, but {what}"
            return


class Checkpoint:
    """A folder of safetensors, sharded or not, or of one GGUF file. To open it reads headers only.

    Weights of a model that is published in FP8 or MXFP4 (see the folder sources/) are shown, and read, as the plain
    tensors that they stand for: of all that follows, only `stored` and `dequantization` tell that they are coded.

    Attributes:
        folder: the folder.
        stored: name -> TensorInfo, in file order, of what lies in the files.
        files: the weight files.
    Raises:
        CheckpointError: everything that is wrong with the index and the shards, at once.
    """

    _gguf: GGUFFile | None = None

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; give a local checkpoint folder or a Hub id such as org/name"
            )
        self.stored: dict[str, TensorInfo] = {}
        self.files: list[Path] = []
        if (folder / INDEX).exists():
            self._read_sharded()
            if (folder / SINGLE).exists() and folder / SINGLE not in self.files:
                raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}; remove the one that is not meant")
        elif (folder / SINGLE).exists():
            self.files = [folder / SINGLE]
            self.stored = _header(self.files[0])
        elif len(containers := sorted(folder.glob("*.gguf"))) == 1:
            self._gguf = read_gguf(regular_file(containers[0]))
            self.files, self.stored = containers, self._gguf.stored()
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
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        advice = f"; it holds {', '.join(others[:3])}" if others else ""
        if len(others) == 1:  # as gptq_model-4bit-128g.safetensors of early AutoGPTQ
            advice += f": if that is the whole model, rename it to {SINGLE}"
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}{advice}")

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
        _fetch_headers(self.files)
        for file in self.files:
            for name, info in _header(file).items():
                if name in self.stored:
                    faults.append(f"{name} is in both {self.stored[name].file.name} and {file.name}")
                elif weight_map.get(name) != file.name:
                    faults.append(f"{name} is in {file.name}, the index says {weight_map.get(name, 'nothing')}")
                self.stored[name] = info
        faults += [
            f"{name} is in the index, not in {file}" for name, file in weight_map.items() if name not in self.stored
        ]
        if faults:
            raise CheckpointError(f"{self.folder}: {INDEX} and the files disagree:\n{listing(faults)}")

    @cached_property
    def _config(self) -> dict[str, Any]:
        """config.json as it is."""
        return read_json(self.folder / "config.json", _CONFIG_LIMIT)

    @cached_property
    def _dequantized(self) -> DequantizedTensors | GGUFTensors | None:
        if not (self.folder / "config.json").exists():
            return None
        if self._gguf is not None:
            return GGUFTensors(self._gguf, self._config)
        return dequantized(self.folder, self._config, self.stored, lambda path: read_json(path, _CONFIG_LIMIT))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> TensorInfo, in file order, of the tensors that `read` gives.

        Raises:
            CheckpointError: coded weights and scales that do not fit together.
        """
        return self._dequantized.tensors if self._dequantized else self.stored

    @property
    def dequantization(self) -> str | None:
        """A sentence on coded weights and what they are read as; None where all are read as they lie there."""
        return self._dequantized.sentence if self._dequantized else None

    @property
    def config(self) -> dict[str, Any]:
        """config.json as data alone: without the keys that choose code (see left_out), and without an empty section on
        quantization.

        Raises:
            CheckpointError: it names sizes that the files contradict, or holds what no config may hold.
        """
        return self._data[0]

    @property
    def left_out(self) -> list[str]:
        """The keys of config.json that `config` lacks, such as "auto_map": they choose code, or name a download."""
        return self._data[1]

    @property
    def remarks(self) -> list[str]:
        """Sentences on what lies in the folder and is not part of the checkpoint as bitpress sees it."""
        remarks = []
        if self.left_out:
            remarks.append(
                f"config.json: {', '.join(self.left_out)} left out, which choose code or name a download; "
                "transformers' own code runs"
            )
        if (self.folder / ADAPTER).exists():
            remarks.append(
                f"{ADAPTER} lies in the folder: the adapter is ignored, the weights are those of the folder's own "
                "files; merge the adapter into them first if it is meant"
            )
        return remarks

    @cached_property
    def _data(self) -> tuple[dict[str, Any], list[str]]:
        path = self.folder / "config.json"
        widest = max((size for info in self.tensors.values() for size in info.shape), default=0)
        dtype = self._dequantized.dtype if self._dequantized else None
        read = without_coding(self._config, dtype) if dtype else self._config
        left_out: list[str] = []
        odd: list[str] = []
        try:
            config = data_of(read, left_out, odd)
            implausible = list(_implausible(config, len(self.tensors), widest))
        except RecursionError:
            raise CheckpointError(f"{path}: nested too deeply to be a config") from None
        names = config.get("architectures")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            odd.append(f'architectures: {names!r}, expected a list of names, such as ["LlamaForCausalLM"]')
        if odd:
            raise CheckpointError(f"{path} cannot be used:\n{listing(odd)}")
        if implausible:
            raise CheckpointError(f"{path} does not fit the weight files:\n{listing(implausible)}")
        if config.get("quantization_config", 0) in (None, {}):
            del config["quantization_config"]
        early = config.pop(_EARLY_SECTION, None)
        if isinstance(early, dict) and early and "quantization_config" not in config:
            config["quantization_config"] = {"quant_method": "compressed-tensors", **early}
        return config, left_out

    @classmethod
    def single(cls, file: Path) -> "Checkpoint":
        """A checkpoint of one safetensors file, whatever its name."""
        checkpoint = cls.__new__(cls)
        checkpoint.folder, checkpoint.files, checkpoint.stored = file.parent, [file], _header(file)
        checkpoint._dequantized = None  # a config.json beside it may be about other files
        return checkpoint

    @staticmethod
    def names_in(file: Path) -> list[str]:
        """The tensor names of one safetensors file."""
        return list(_header(file))

    def stored_bytes(self, name: str) -> int:
        """What one of `tensors` takes in the files, with its scales where it is coded."""
        coded = self._dequantized and name in self._dequantized
        return self._dequantized.stored_bytes(name) if coded else self.tensors[name].nbytes  # type: ignore[union-attr]

    def read(self, name: str, digest: "hashlib._Hash | None" = None) -> Tensor:
        """One tensor, copied into memory. `digest` is updated with its bytes."""
        info = self.tensors[name]
        tensor = self._rows(info, 0, info.shape[0] if info.shape else 1).reshape(info.shape)
        if digest is not None:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def read_rows(self, name: str, counts: Iterable[int], first: int = 0) -> Iterator[Tensor]:
        """One tensor in parts along its first dimension.

        Args:
            counts: the rows of each part, one part after the other. first: the row that the first part begins with.
        """
        start = first
        for count in counts:
            yield self._rows(self.tensors[name], start, start + count)
            start += count

    def _rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows of one of `tensors`, copied into memory."""
        if self._dequantized and info.name in self._dequantized:
            return self._dequantized.rows(info.name, start, stop, _stored_rows)
        return _stored_rows(info, start, stop)

    def as_stored(self) -> "Checkpoint":
        """The same checkpoint with its coded weights seen as they lie in the files, for a format that reads them."""
        if self._gguf is not None:  # whose blocks are seen as they lie there already
            return self
        view = type(self).__new__(type(self))
        vars(view).update({key: value for key, value in vars(self).items() if key not in ("tensors", "_data")})
        view._dequantized = None
        return view

    def fetch(self) -> None:
        """Ask the system to read the weight files into its cache in the background, where it can do so."""
        left = _FETCHED if hasattr(os, "posix_fadvise") else 0
        for file in self.files:
            size = min(left, file.stat().st_size)
            if size:
                with file.open("rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
            left -= size

    def identity(self) -> dict[str, str]:
        """File name -> sha256 of everything that an artifact depends on: model_identity, and whole companions."""
        return {path.name: sha256_file(path) for path in self.other_files()} | self.model_identity()

    def model_identity(self) -> dict[str, str]:
        """File name -> sha256 of what makes the model: weights, config.json, and files that describe codings.

        For weight files, the hash is of the header, the size and both ends of each tensor: that tells a retrained
        checkpoint from the one before, without reading all of it.
        """
        self.config  # noqa: B018  (refuses what is no regular file)
        side_files = [self.folder / name for name in coding_files() if (self.folder / name).exists()]
        result = {path.name: sha256_file(path) for path in (self.folder / "config.json", *side_files)}
        tensors_of: dict[Path, list[TensorInfo]] = {}
        for info in self.stored.values():
            tensors_of.setdefault(info.file, []).append(info)
        for file in self.files:
            with file.open("rb") as handle:
                head = handle.read(8 if self._gguf is None else self._gguf.data_start)
                length = int.from_bytes(head, "little") if self._gguf is None else 0
                digest = hashlib.sha256(head + handle.read(length))
                digest.update(str(file.stat().st_size).encode())
                for info in sorted(tensors_of.get(file, []), key=lambda i: i.offset):
                    for start in (0, max(0, info.nbytes - _SAMPLE)):
                        handle.seek(info.offset + start)
                        digest.update(handle.read(min(_SAMPLE, info.nbytes)))
            result[file.name] = digest.hexdigest()
        return result

    def _stat(self) -> dict[str, tuple[int, int, int]]:
        stats = {path.name: path.stat() for path in self.folder.iterdir() if path.is_file()}
        return {name: (value.st_ino, value.st_size, value.st_mtime_ns) for name, value in stats.items()}

    def check_unchanged(self) -> None:
        """Refuse a folder that was written to since the checkpoint was opened.

        Raises:
            CheckpointError: names the files that changed.
        """
        now = self._stat()
        changed = [name for name, value in self._stats.items() if now.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{self.folder}: {', '.join(changed)} changed while it was being read; run again once it is at rest"
            )

    def other_files(self) -> list[Path]:
        """The files of the folder that go with the weights: tokenizer, generation config, licence, …

        Hidden files, code and folders are left out, and so is what an earlier run or a training says of these weights:
        figures, reports, an adapter.

        Raises:
            CheckpointError: one is a link that leads elsewhere, or has a name that no manifest can hold.
        """
        companions = []
        for path in sorted(self.folder.iterdir()):
            name = path.name
            if name.startswith(".") or name.endswith(WEIGHT_SUFFIXES) or path.suffix in (".py", ".so", ".sh"):
                continue
            if not _is_text(name):
                raise CheckpointError(f"{self.folder}: {name!a} is not the name of a file in UTF-8; rename the file")
            if path.is_file() and name not in (*_OTHER_PURPOSES, *coding_files()):
                companions.append(regular_file(path))
        return companions


class CheckpointView(Checkpoint):
    """A checkpoint some of whose tensors are seen as parts, each by a name of its own.

    `whole` is the checkpoint as it is. A kind of view sets `tensors`, and makes the parts.
    """

    def __init__(self, checkpoint: Checkpoint):
        vars(self).update(vars(checkpoint))
        self.whole = checkpoint

    def part(self, name: str) -> Tensor | None:
        """A part, contiguous; None for a tensor that is seen as it is."""
        raise NotImplementedError

    def read(self, name: str, digest: "hashlib._Hash | None" = None) -> Tensor:
        part = self.part(name)
        if part is None:
            return self.whole.read(name, digest)
        if digest is not None:
            digest.update(part.flatten().view(torch.uint8).numpy().data)
        return part

    def read_rows(self, name: str, counts: Iterable[int], first: int = 0) -> Iterator[Tensor]:
        part, start = self.part(name), first
        if part is None:
            yield from self.whole.read_rows(name, counts, first)
            return
        for count in counts:
            yield part[start : start + count]
            start += count
