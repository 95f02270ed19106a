"""A GGUF file of the unquantized model as a template, for architectures that have no table here.

Its metadata and its tokenizer are taken as they are, and its names of tensors: where a tensor of the checkpoint lies is
what the package gguf says of the architecture, and is proven by values. A file that bitpress made so says in its
metadata what lies where.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .architectures import Place, is_generated, permute
from .file import GGUFTensor, read_gguf

PLACES = "bitpress.places"  # in the metadata: JSON, name in the checkpoint -> what differs from a plain Place
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)\.")
_EXACT = 2.0**-7  # relative: both may have been rounded to bfloat16
_ROUNDED = 0.5  # of weights that are quantized on either side; those in another order are apart by 1.4
_OWN_KEYS = ("GGUF.", "general.file_type", "general.quantization_version", "general.quantized_by", "general.alignment")
_OTHER_KEYS = ("quantize.", "split.", "bitpress.")
_HEAD = "output.weight"


@dataclass(frozen=True)
class Places:
    """Where each tensor of a checkpoint lies in a GGUF file; it answers as Architecture does.

    name: llama.cpp's of the architecture. places: by the name of the tensor in the checkpoint.
    """

    name: str
    places: Mapping[str, Place]

    @cached_property
    def _by_gguf_name(self) -> dict[str, list[str]]:
        """The tensors that lie in each tensor of the file, in the order of experts."""
        names: dict[str, list[str]] = defaultdict(list)
        for name, place in sorted(self.places.items(), key=lambda item: item[1].expert or 0):
            names[place.name].append(name)
        return names

    def place(self, name: str, config: Mapping[str, Any]) -> Place | None:
        return self.places.get(name)

    def names(self, gguf_name: str, experts: int) -> list[str] | None:
        return self._by_gguf_name.get(gguf_name)

    def holds(self, gguf_name: str) -> bool:
        return gguf_name in self._by_gguf_name

    def applies_factor(self, name: str, config: Mapping[str, Any], biased: bool) -> bool:
        return False  # which architectures do is known of those that have a table

    def to_json(self) -> str:
        defaults = asdict(Place(""))
        entries = {
            name: {key: value for key, value in asdict(place).items() if value != defaults[key]}
            for name, place in self.places.items()
        }
        return json.dumps(entries)

    @staticmethod
    def of_json(name: str, text: Any, rows: Mapping[str, int]) -> "Places":
        """The inverse of to_json, of a file that is not trusted.

        Args:
            rows: the first dimension of each tensor of the file.
        Raises:
            ValueError: it is none, or it names tensors that the file does not have.
        """
        entries = json.loads(text) if isinstance(text, str) else None
        types = {field.name: field.type for field in fields(Place)}
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(f"{PLACES} is no object of objects")
        experts: dict[str, set[int | None]] = defaultdict(set)
        places = {}
        for own, entry in entries.items():
            place = Place(**entry) if entry.keys() <= types.keys() and "name" in entry else Place("")
            numbers = type(place.expert) in (int, type(None)) and type(place.heads) is int and place.heads >= 0
            flags = isinstance(place.flat, bool) and place.shift in (0, 1) and place.factor is False
            fits = isinstance(place.name, str) and place.name in rows and numbers and flags
            if not fits or place.expert in experts[place.name]:
                raise ValueError(f"{PLACES} has {entry!r:.80} for {own!r:.80}, which is no place in the file")
            experts[place.name].add(place.expert)
            places[own] = place
        for gguf_name, held in experts.items():
            each = {number for number in held if number is not None}
            every = len(each) == len(held) == rows[gguf_name] and min(each) >= 0 and max(each) < len(each)
            if held != {None} and not every:
                raise ValueError(f"{PLACES} leaves experts of {gguf_name} out")
        return Places(name, places)


class Template:
    """A GGUF file whose metadata and names a new one takes over.

    Raises:
        CheckpointError: the file cannot be read. ConfigError: the package gguf does not know its architecture.
    """

    def __init__(self, path: Path):
        import gguf

        self.file = read_gguf(path)
        self.path = path
        self.architecture = str(self.file.metadata.get("general.architecture"))
        known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        blocks = self.file.metadata.get(f"{self.architecture}.block_count")
        if self.architecture not in known or type(blocks) is not int or not 0 < blocks < 1 << 16:
            raise ConfigError(
                f"template {path}: its architecture {self.architecture!r:.40} with {blocks!r:.20} blocks is not known "
                "to the package gguf; use a file that llama.cpp's converter made of the model, or a newer gguf"
            )
        self._names = gguf.get_tensor_name_map(known[self.architecture], blocks)

    @property
    def identity(self) -> str:
        """The SHA-256 of its header, which has nearly all that is taken from it, in hex."""
        with self.path.open("rb") as file:
            return hashlib.sha256(file.read(self.file.data_start)).hexdigest()

    def places(
        self,
        names: Iterable[str],
        rounded: Collection[str],
        config: Mapping[str, Any],
        read: Callable[[str], Tensor],
        tokens: Mapping[str, int],
    ) -> Places:
        """Where each tensor of a checkpoint lies.

        Args:
            names: of the tensors, quantized ones as X.weight. rounded: those that will be quantized.
            read: the values of one of them, [out, in] for weights that will be quantized.
            tokens: of the tokenizer, with their ids.
        Raises:
            ValueError: what does not fit together, all of it, a line each.
        """
        problems: list[str] = []
        places: dict[str, Place] = {}
        heads = {config.get("num_attention_heads"), config.get("num_key_value_heads")}
        orders = sorted(count for count in heads if isinstance(count, int) and count > 0)
        for name in names:
            expert = _EXPERT.search(name)
            own = self._names.get_name(_EXPERT.sub("", name), (".weight", ".bias"))
            if own is None or own not in self.file.tensors:
                problems.append(f"it has no tensor for {name}" + (f", which would be {own}" if own else ""))
                continue
            number = int(expert[1]) if expert else None
            tensor, value = self.file.tensors[own], read(name).to(torch.float32)
            if number is not None and (len(tensor.shape) != 3 or number >= tensor.shape[0]):
                problems.append(f"{own} has shape {list(tensor.shape)} there, and no expert {number}")
                continue
            theirs = self._values(tensor, number)
            place = Place(own, number, wide=tensor.kind.dtype == torch.float32)
            fitting = _fitting(value, theirs, orders, place, turned=name in rounded)
            if fitting is None:
                problems.append(
                    f"{name} has shape {list(value.shape)}, and {own} there {list(theirs.shape)}"
                    + ("; turned, it can lie there quantized" if value.shape == theirs.shape[::-1] else "")
                )
                continue
            place, apart = fitting
            if apart > (_ROUNDED if name in rounded or tensor.kind.dtype is None else _EXACT):
                problems.append(f"the values of {name} are not those of {own}, they are apart by {apart:.1%}")
            places[name] = place
        used = {place.name for place in places.values()}
        left = [own for own in self.file.tensors if own not in used and own not in self.generated]
        if config.get("tie_word_embeddings") and _HEAD in left:  # llama.cpp takes the embeddings where it has none
            left.remove(_HEAD)
        if left and not problems:
            problems.append(f"the model has no tensor for {', '.join(left[:3])}")
        stated = self.file.metadata.get("tokenizer.ggml.tokens")
        theirs_tokens = stated if isinstance(stated, list) else []
        strange = [
            token
            for token, number in tokens.items()
            if number >= len(theirs_tokens) or _plain(str(theirs_tokens[number])) != _plain(token)
        ]
        if strange:
            problems.append(f"{len(strange)} tokens of the tokenizer are others there, such as {strange[0]!r:.40}")
        if problems:
            raise ValueError("\n".join(f"template {self.path.name}: {problem}" for problem in problems))
        return Places(self.architecture, places)

    @property
    def generated(self) -> list[str]:
        """The tensors that are no weights, such as factors of frequencies: they are copied."""
        return [name for name in self.file.tensors if is_generated(re.sub(r"^blk\.\d+\.", "", name))]

    def copies(self) -> dict[str, Tensor]:
        """The tensors that are copied, float32."""
        return {name: self._values(self.file.tensors[name], None) for name in self.generated}

    def add_metadata(self, writer: Any, others: Collection[str]) -> None:
        """Give a gguf.GGUFWriter what the template says but for its own coding, and but for `others`."""
        import gguf

        for field in gguf.GGUFReader(self.path).fields.values():
            if field.name.startswith((*_OWN_KEYS, *_OTHER_KEYS)) or field.name in others:
                continue
            kind, value = field.types[0], field.contents()
            if field.name == "general.architecture" or (kind == gguf.GGUFValueType.ARRAY and not value):
                continue  # the package has written the one, and does not write empty lists
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, kind, sub_type=inner)

    def _values(self, tensor: GGUFTensor, expert: int | None) -> Tensor:
        """The values of a tensor, or of one expert in it, float32."""
        import gguf
        import numpy as np

        shape, nbytes, offset = tensor.shape, tensor.nbytes, tensor.offset
        if expert is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            offset += expert * nbytes
        data = np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=offset)
        if tensor.kind.dtype is not None:
            return torch.from_numpy(data).view(tensor.kind.dtype).reshape(shape).to(torch.float32)
        rows = data.reshape(-1, shape[-1] // tensor.kind.values * tensor.kind.nbytes)
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind.id))).reshape(shape)


def _fitting(
    value: Tensor, theirs: Tensor, orders: Iterable[int], place: Place, turned: bool
) -> tuple[Place, float] | None:
    """The place with which a checkpoint's tensor is the template's, and how far apart, relative, they then are; None
    where the shapes differ.

    Args:
        orders: numbers of heads by which rows may be permuted. turned: whether the tensor may lie there transposed:
            Conv1D of transformers, which is [in, out] until it is quantized.
    """
    candidates: list[tuple[Place, Tensor]] = []
    if value.shape == theirs.shape:
        candidates.append((place, value))
        if value.dim() == 1:
            candidates.append((replace(place, shift=1.0), value + 1))
        candidates += [
            (replace(place, heads=count), permute(value, count)) for count in orders if len(value) % (2 * count) == 0
        ]
    if turned and value.dim() == 2 and value.shape[::-1] == theirs.shape:
        candidates.append((place, value.t()))
    if value.dim() > 1 and value.shape[0] == 1 and value.shape[1:] == theirs.shape:
        candidates.append((replace(place, flat=True), value[0]))
    if not candidates:
        return None
    length = theirs.norm().item() or 1.0
    return min(((own, (ours - theirs).norm().item() / length) for own, ours in candidates), key=lambda each: each[1])


def _plain(token: str) -> str:
    """A token whose spaces are written as SentencePiece has them, or as they are."""
    return token.replace("\u2581", " ")
