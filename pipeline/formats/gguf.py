"""GGUF: one file for llama.cpp and its kin, in which lie bitpress's own integers, each as it was quantized.

A block of ggml has one float16 scale, so a group of inputs repeats its scale in each of its blocks. A layer is written
as the smallest type that holds its values exactly: int4 as Q4_0, int8 as Q8_0, int4-asym as Q5_0, whose five bits hold
code - zero point; int3 as Q3_K where groups are multiples of 256, and else, as int2 and all other asymmetric ones, as
Q4_0. Q2_0, of a quarter of an int2 layer's bytes as Q4_0, is not written: the package gguf 0.19 does not know it.

`gguf-q4_1` is the same but for int4-asym, which it has as Q4_1: 5 bits to a weight and not 5.5, for a minimum that
float16 rounds. Scales and codes are exact, so bitpress reads the very weights; what llama.cpp computes with is rounded.

mxfp4 and nvfp4 have types of their own, MXFP4 and NVFP4, into which their codes and scales move as they are. What
divides all scales of an nvfp4 weight, llama.cpp multiplies by: the tensor X.scale is 1 / global_scale, which float32
rounds. The global scales themselves lie in the metadata, in the order of the file's X.scale, so that nothing is lost.

config.json and the tokenizer's files lie beside the file, for bitpress; llama.cpp needs the file alone.
"""

import importlib.util
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import ConfigError
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..storage.gguf import architectures
from ..storage.gguf.architectures import Architecture, Place, permute
from ..storage.gguf.blocks import decode, decode_e2m1, decode_with_minimum, encode, encode_e2m1, encode_with_minimum
from ..storage.gguf.file import BY_NAME
from ..storage.gguf.template import PLACES, Places, Template
from ..storage.gguf.tokenizer import tokenizer_metadata, tokens_of
from ..storage.gguf.view import BLOCKS, DIVISOR, DIVISORS
from ..storage.tensor_info import TensorInfo
from ..system.packages import install
from . import quantization_section, read_config
from .base import (
    Examination,
    Facts,
    Format,
    Loading,
    Reason,
    SafetensorsWriter,
    SchemeRules,
    is_packed_integer,
    middle_code,
    require,
    some,
)
from .names import NameRules, patterns_of

FILE = "model.gguf"
_PACKAGE = "gguf"
_RANK = 90
_NARROW, _WIDE = 32, 256  # values of a block: of Q4_0, Q5_0 and Q8_0, and of Q3_K
_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q3_K": 12, "MXFP4": 38, "NVFP4": 39}  # general.file_type
_FLOATS = {("group", 32): "MXFP4", ("tensor_group", 16): "NVFP4"}  # strategy and group size of E2M1 values -> type
_PLAIN_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # the same, where nothing is quantized
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# tokens that llama.cpp looks for, and stops without, where general.name has "phi3" in it (src/llama-vocab.cpp)
_OF_PHI_3 = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_ALWAYS_FLOAT32 = ("norm.weight", "ffn_gate_inp.weight")  # what llama.cpp computes with in float32


class GGUF(Format):
    """X.blocks uint8 [out, blocks, bytes of a block], in the file under llama.cpp's name of the layer; X.global_scale
    float32 [1] where a weight has one.

    While a checkpoint is being written its shards are safetensors; at the end they become one file."""

    name = "gguf"
    rank = _RANK
    quant_method = "gguf"
    tags: ClassVar[tuple[str, ...]] = (FILE,)
    marker = BLOCKS
    suffixes = (BLOCKS, DIVISOR)
    holds_embeddings = True
    exact_scales = True
    convertible = True
    packages = (_PACKAGE,)
    uncuttable = "servers that read GGUF do it by plug-ins, and how these cut layers is not documented"

    def __init__(self, template: Template | None = None):
        """Args:
        template: see Template; `checkpoint_problems` finds the places of a checkpoint's tensors in it.
        """
        self.template = template
        self.places: Places | None = None

    def with_template(self, path: Path) -> "GGUF":
        if importlib.util.find_spec(_PACKAGE) is None:
            raise ConfigError(f"{self.name} is written by the package {_PACKAGE}: {install(_PACKAGE)}")
        return type(self)(Template(path))

    @property
    def options(self) -> dict[str, Any]:
        return {"template": self.template.identity} if self.template else {}

    def architecture(self, config: Mapping[str, Any]) -> Architecture | Places:
        """Where the tensors of a model lie."""
        if self.template is None:
            return architectures.architecture_of(config)
        assert self.places is not None, "checkpoint_problems has found them"
        return self.places

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if kind := float_type(scheme):
            values = BY_NAME[kind].values
            fits = shape[-1] % values == 0
            return [] if fits else [f"{self.name} has blocks of {values} inputs for {scheme.name}, got {shape[-1]}"]
        if not is_packed_integer(scheme):
            return [f"{self.name} holds weight-only integers and floats of 4 bits, not {scheme.name}"]
        if scheme.bits == 8 and not scheme.symmetric:
            return [f"{self.name} has no type of nine bits, which {scheme.name} would take; use int8 without -asym"]
        width = scheme.weight.description().group_size or shape[-1]
        if width % _NARROW or shape[-1] % _NARROW:
            return [
                f"{self.name} has blocks of {_NARROW} inputs with one scale, which groups of {width} are no whole of"
            ]
        return []

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """All experts of a block lie in one tensor of one type."""
        kinds: dict[str, set[str]] = defaultdict(set)
        for layer, scheme in schemes.items():
            before, expert, after = layer.partition(".experts.")
            if expert:
                kinds[f"{before}.experts.*.{after.partition('.')[2]}"].add(scheme.name)
        return [
            f"{self.name} holds all experts of a block in one tensor, of one scheme: {name} has "
            f"{' and '.join(sorted(own))}"
            for name, own in kinds.items()
            if len(own) > 1
        ]

    def checkpoint_problems(self, checkpoint: Checkpoint, layers: Mapping[str, Scheme]) -> list[str]:
        config = checkpoint.config
        if importlib.util.find_spec(_PACKAGE) is None:
            return [f"{self.name} is written by the package {_PACKAGE}: {install(_PACKAGE)}"]
        if self.template is not None:
            return self._problems_of_template(self.template, checkpoint, layers)
        if problems := architectures.problems(config):
            return [
                f"{problem}; --template takes what it lacks from a GGUF file of the unquantized model"
                if config.get("model_type") not in architectures.ARCHITECTURES
                else problem
                for problem in problems
            ]
        architecture = architectures.architecture_of(config)
        names = {name for name in checkpoint.tensors if name.rpartition(".")[0] not in layers}
        names |= {f"{layer}.weight" for layer in layers if not any(n.startswith(f"{layer}.") for n in names)}
        if unknown := sorted(name for name in names if architecture.place(name, config) is None):
            problems.append(f"llama.cpp's {architecture.name} has no tensor for {some(unknown)}")
        divided = [layer for layer, scheme in layers.items() if float_type(scheme) == "NVFP4"]
        biased = {name.removesuffix(".bias") for name in checkpoint.tensors if name.endswith(".bias")}
        if without := [n for n in divided if not architecture.applies_factor(n, config, n in biased)]:
            problems.append(
                f"llama.cpp's {architecture.name} leaves out what the weights of {some(without)} are to be multiplied "
                "by as NVFP4; use mxfp4 there, which has no such factor"
            )
        try:
            tokenizer_metadata({path.name: path for path in checkpoint.other_files()}, config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(
                str(error) if isinstance(error, ValueError) else f"tokenizer.json is no tokenizer: {error!r}"
            )
        return problems

    def _problems_of_template(
        self, template: Template, checkpoint: Checkpoint, layers: Mapping[str, Scheme]
    ) -> list[str]:
        """Find where the checkpoint's tensors lie in the template, and set `places`."""
        if divided := [layer for layer, scheme in layers.items() if float_type(scheme) == "NVFP4"]:
            return [f"{some(divided)}: whether llama.cpp multiplies by NVFP4's factor there is not known; use mxfp4"]
        quantized = {f"{layer}.weight": layer for layer in layers}
        packed = read_config(checkpoint)[0] if quantization_section(checkpoint) is not None else None
        stored = {f"{layer}.{suffix}" for layer in layers for suffix in (packed.suffixes if packed else ("weight",))}
        names = [*quantized, *(name for name in checkpoint.tensors if name not in stored)]

        def read(name: str) -> Tensor:
            if packed is None or name not in quantized:
                return checkpoint.read(name)
            layer = quantized[name]
            present = [suffix for suffix in packed.suffixes if f"{layer}.{suffix}" in checkpoint.tensors]
            tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in present}
            return packed.read(layers[layer], tensors).dequantize()

        try:
            tokens = tokens_of({path.name: path for path in checkpoint.other_files()})
            self.places = template.places(names, quantized, checkpoint.config, read, tokens)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return (
                str(error).splitlines() if isinstance(error, ValueError) else [f"{error!r} in the checkpoint's files"]
            )
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return scheme.weight.layout((1, 64))["scales"][1][0] if float_type(scheme) else torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert qtensor.order is None, "holds_order says that this format has no place for it"
        if floats := float_type(qtensor.scheme):
            blocks = encode_e2m1(floats, qtensor.codes, qtensor.scales.view(torch.uint8))
            return {BLOCKS: blocks, **qtensor.extra}
        kind = self.block_type(qtensor.scheme, qtensor.shape[1])
        zeros = middle_code(qtensor.scheme) if qtensor.zeros is None else qtensor.zeros.to(torch.int16).unsqueeze(-1)
        codes = unpack(qtensor.codes, qtensor.scheme.bits, qtensor.shape[1]).to(torch.int16)
        if kind == "Q4_1":
            assert qtensor.zeros is not None
            times = qtensor.shape[1] // _NARROW // qtensor.scales.shape[1]
            scales, least = (each.repeat_interleave(times, 1) for each in (qtensor.scales, qtensor.zeros))
            return {BLOCKS: encode_with_minimum(codes.to(torch.uint8).unflatten(1, (-1, _NARROW)), scales, least)}
        values = (codes.unflatten(1, (qtensor.scales.shape[1], -1)) - zeros).flatten(1).to(torch.int8)
        values = values.unflatten(1, (-1, BY_NAME[kind].values))
        scales = qtensor.scales.repeat_interleave(values.shape[1] // qtensor.scales.shape[1], 1)
        return {BLOCKS: encode(kind, values, scales)}

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        blocks = tensors[BLOCKS]
        require(blocks.dtype == torch.uint8 and blocks.dim() == 3, f"{BLOCKS} is no tensor of blocks")
        out_features, count, nbytes = blocks.shape
        known = [kind for kind in _FILE_TYPES if BY_NAME[kind].nbytes == nbytes]
        require(bool(known), f"blocks of {nbytes} bytes are of a type that {scheme.name} is never written as")
        in_features = count * BY_NAME[known[0]].values
        require(
            (DIVISOR in tensors) == (known[0] == "NVFP4"), f"{DIVISOR} belongs to blocks of NVFP4, not of {known[0]}"
        )
        if problems := [
            *self.problems(scheme, (out_features, in_features)),
            *scheme.problems((out_features, in_features)),
        ]:
            raise ValueError(problems[0])
        expected = self.block_type(scheme, in_features)
        require(expected == known[0], f"its blocks are {known[0]}, and {scheme.name} is written as {expected}")
        if float_type(scheme):
            codes, floats = decode_e2m1(expected, blocks)
            own = {"codes": codes, "scales": floats.contiguous().view(self.scale_dtype(scheme, torch.float16))}
            divisor = {DIVISOR: tensors[DIVISOR]} if DIVISOR in tensors else {}
            return QTensor.of(scheme, (out_features, in_features), own | divisor)
        groups = scheme.groups(in_features)
        if expected == "Q4_1":
            codes, *each = decode_with_minimum(blocks)
            scales, points = (self._of_groups(tensor, groups, scheme) for tensor in each)
            return QTensor(scheme, (out_features, in_features), pack(codes.flatten(1), scheme.bits), scales, points)
        values, repeated = decode(expected, blocks)
        scales = self._of_groups(repeated, groups, scheme)
        grouped = values.flatten(1).unflatten(1, (groups, -1)).to(torch.int16)
        zeros = None
        if scheme.symmetric:
            codes = grouped + middle_code(scheme)
        else:  # any zero point gives the same weights whose codes are in range
            zeros = (-grouped.amin(-1)).clamp_(min=0)
            codes = grouped + zeros.unsqueeze(-1)
            zeros = zeros.to(torch.uint8)
        low, high = int(codes.min()), int(codes.max())
        require(low >= 0 and high <= scheme.max_code, f"codes are {low}..{high}, expected 0..{scheme.max_code}")
        packed = pack(codes.flatten(1).to(torch.uint8), scheme.bits)
        return QTensor(scheme, (out_features, in_features), packed, scales, zeros)

    def _of_groups(self, repeated: Tensor, groups: int, scheme: Scheme) -> Tensor:
        """[out, groups] of what each block of a group repeats. Raises ValueError where blocks of a group differ."""
        each = repeated.unflatten(1, (groups, -1))
        require(bool((each == each[..., :1]).all()), f"the scales differ within a group of {scheme.name}")
        return each[..., 0].contiguous()

    def block_type(self, scheme: Scheme, in_features: int) -> str:
        """The smallest type of ggml that holds the weights of a scheme exactly."""
        if floats := float_type(scheme):
            return floats
        if scheme.bits == 8:
            return "Q8_0"
        if scheme.bits == 4:
            return "Q4_0" if scheme.symmetric else "Q5_0"
        width = scheme.weight.description().group_size or in_features
        return "Q3_K" if scheme.bits == 3 and scheme.symmetric and width % _WIDE == 0 else "Q4_0"

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """Under "layers" each scheme, and patterns that match its layers and no other's."""
        groups = {}
        for scheme in dict.fromkeys(schemes.values()):
            others = [layer for layer in (*schemes, *kept) if schemes.get(layer) != scheme]
            groups[scheme.name] = patterns_of([layer for layer, own in schemes.items() if own == scheme], others)
        return {"quant_method": self.quant_method, "format": self.tags[0], "layers": groups}

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        groups = config.get("layers")
        require(isinstance(groups, dict), f"layers is {groups!r:.40}, expected an object")
        rules: SchemeRules = NameRules()
        for name, patterns in groups.items():  # type: ignore[union-attr]
            scheme = Scheme.parse(name)
            require(isinstance(patterns, list), f"layers.{name} is {patterns!r:.40}, expected a list")
            for pattern in patterns:
                require(isinstance(pattern, str), f"the pattern {pattern!r:.40} is not a text")
                rules.add_pattern(pattern, scheme)
        return rules

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        dequantized: Reason = ("limited", f'it dequantizes the layers: from_pretrained(…, gguf_file="{FILE}")')
        plug_in: Reason = ("unknown", "GGUF is a plug-in there (vllm-gguf-plugin), which was not tried")
        return {
            "llama.cpp": Loading(serve=f"llama-server -m {{folder}}/{FILE}"),
            "transformers": Loading([dequantized], needs=_PACKAGE, arguments=f'gguf_file="{FILE}"'),
            "vLLM": Loading([plug_in], needs="vllm-gguf-plugin"),
            "SGLang": Loading([("unknown", "it reads GGUF, and files like these were not tried")], needs=_PACKAGE),
            "GPTQModel": Loading([("no", "it reads GPTQ's layout, not GGUF")]),
            "MLX": Loading([("unknown", "whether it reads files like these was not tried")]),
            "ORT GenAI": Loading([("unknown", "its builder reads GGUF, and files like these were not tried")]),
            "TensorRT-LLM": Loading([("no", "its documents do not name GGUF")]),
        }

    def weight_files(self, shards: int) -> list[str]:
        return [FILE]

    def writer(self, folder: Path, dtype: torch.dtype, shards: int) -> "GGUFWriter":
        return GGUFWriter(self, folder, dtype, shards)


def float_type(scheme: Scheme) -> str | None:
    """The type of ggml that has the same E2M1 values and scales as the weights of a scheme; None where none has."""
    described = scheme.weight.description()
    if scheme.activations is not None or (described.type, described.num_bits) != ("float", 4):
        return None
    kind = _FLOATS.get((described.strategy, described.group_size or 0))
    expected = {"MXFP4": {"codes", "scales"}, "NVFP4": {"codes", "scales", DIVISOR}}
    layout = scheme.weight.layout((1, 64))
    fits = kind and set(layout) == expected[kind] and layout["codes"] == ((1, 32), (torch.uint8,))
    return kind if fits else None


class GGUFWithMinimum(GGUF):
    """See the top of this file."""

    name = "gguf-q4_1"
    rank = _RANK + 1
    tags: ClassVar[tuple[str, ...]] = (f"{FILE}, Q4_1",)

    def block_type(self, scheme: Scheme, in_features: int) -> str:
        return "Q4_1" if _has_minimum(scheme) else super().block_type(scheme, in_features)

    def remarks(self, schemes: Iterable[Scheme]) -> list[str]:
        return [
            f"{scheme.name} lies there as Q4_1, whose minimum is float16: what llama.cpp computes with is off by up to "
            "0.8% of a scale, and bitpress itself reads the exact weights; `gguf` has them as Q5_0, half a bit larger"
            for scheme in schemes
            if _has_minimum(scheme)
        ]

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        return [], self.remarks(dict.fromkeys(layer.scheme for layer in seen.layers.values()))


def _has_minimum(scheme: Scheme) -> bool:
    return is_packed_integer(scheme) and scheme.bits == 4 and not scheme.symmetric


@dataclass(frozen=True)
class _Part:
    """One tensor of a shard and its place in the GGUF file."""

    checkpoint: Checkpoint
    info: TensorInfo
    place: Place

    @property
    def kind(self) -> str:
        """The type that it has in the file."""
        if self.info.name.endswith(f".{BLOCKS}"):
            nbytes = self.info.shape[-1]
            return next(kind for kind in _FILE_TYPES if BY_NAME[kind].nbytes == nbytes)
        alone = self.place.wide or len(self.info.shape) - self.place.flat <= 1  # a factor among them
        return "F32" if alone or self.place.name.endswith(_ALWAYS_FLOAT32) else _DTYPES[self.info.dtype]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape, with bytes for values in the last dimension."""
        shape = self.info.shape[1:] if self.place.flat else self.info.shape
        if self.info.name.endswith(f".{BLOCKS}"):
            return (*shape[:-2], shape[-2] * shape[-1])
        return (*shape[:-1], shape[-1] * BY_NAME[self.kind].nbytes)

    def read(self) -> Tensor:
        """Its bytes, in the order of rows that the file has."""
        tensor = self.checkpoint.read(self.info.name)
        if self.place.factor:
            return tensor.reciprocal().view(torch.uint8)
        if self.place.heads:
            tensor = permute(tensor, self.place.heads)
        if self.place.shift:
            tensor = tensor.to(torch.float32) + self.place.shift
        kind = BY_NAME[self.kind]
        return (tensor if kind.dtype is None else tensor.to(kind.dtype)).contiguous().reshape(-1).view(torch.uint8)


class GGUFWriter(SafetensorsWriter):
    """Writes shards as safetensors, which at the end become one GGUF file. Each is deleted when that is on the disk."""

    format: GGUF

    def close(
        self, config: Mapping[str, Any], section: dict[str, Any], companions: Iterable[Path]
    ) -> dict[str, dict[str, Any]]:
        """Write the GGUF file, config.json, and copies of the companions; see SafetensorsWriter.

        Raises:
            ConfigError: experts of a block of which only some are quantized.
        """
        assert not self.pending, "what was added must be cut and written before"
        companions = list(companions)
        parts: dict[str, list[_Part]] = defaultdict(list)
        architecture = self.format.architecture(config)
        for file in sorted(self.lines):
            shard = Checkpoint.single(self.folder / file)
            for name, info in shard.tensors.items():
                layer, _, suffix = name.rpartition(".")
                place = architecture.place(f"{layer}.weight" if suffix in (BLOCKS, DIVISOR) else name, config)
                assert place is not None, "checkpoint_problems refuses other tensors"
                if suffix == DIVISOR:
                    place = place.of_factor()
                parts[place.name].append(_Part(shard, info, place))
        for name, own in parts.items():
            own.sort(key=lambda part: part.place.expert or 0)
            if len({(part.kind, part.byte_shape) for part in own}) > 1:
                raise ConfigError(
                    f"{name}: gguf holds all experts of a block in one tensor, and here some are quantized and others "
                    "not, or by other schemes; name all of them in a rule"
                )
        metadata = self._metadata(config, parts, {path.name: path for path in companions})
        template = self.format.template
        generated = template.copies() if template else architectures.generated_tensors(config)
        written = {FILE: self._write_gguf(metadata, parts, generated)}
        for file in self.lines:
            (self.folder / file).unlink()
        return dict(sorted((written | self.write_small_files(config, section, companions)).items()))

    def _metadata(
        self, config: Mapping[str, Any], parts: Mapping[str, list[_Part]], companions: Mapping[str, Path]
    ) -> dict[str, Any]:
        sizes: Counter[str] = Counter()
        for own in parts.values():
            sizes[own[0].kind] += sum(part.info.nbytes for part in own)
        divisors = [
            float(part.checkpoint.read(part.info.name)) for own in parts.values() for part in own if part.place.factor
        ]
        quantized = {kind: size for kind, size in sizes.items() if kind in _FILE_TYPES}
        most = max(quantized or sizes, key=lambda kind: sizes[kind])
        coding = {
            "general.quantized_by": "bitpress",
            "general.quantization_version": 2,
            "general.file_type": (_FILE_TYPES | _PLAIN_FILE_TYPES)[most],
            **({DIVISORS: divisors} if divisors else {}),
        }
        if self.format.template:
            assert self.format.places is not None
            return {"general.architecture": self.format.places.name, **coding, PLACES: self.format.places.to_json()}
        name = Path(str(config.get("_name_or_path") or "")).name or (config.get("architectures") or ["model"])[0]
        tokenizer = tokenizer_metadata(companions, config)
        if not set(tokenizer["tokenizer.ggml.tokens"]) >= _OF_PHI_3:
            name = re.sub("(?i)phi-?3", "Phi", name)
        return {**architectures.model_metadata(config), "general.name": name, **coding, **tokenizer}

    def _write_gguf(
        self, metadata: Mapping[str, Any], parts: Mapping[str, list[_Part]], generated: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The file, a tensor at a time; returns {"bytes", "sha256"}."""
        import gguf
        import numpy as np

        path, temporary = self.folder / FILE, self.folder / f".{FILE}.tmp"
        writer = gguf.GGUFWriter(temporary, metadata["general.architecture"])
        if self.format.template:
            self.format.template.add_metadata(writer, metadata)
        for key, value in metadata.items():
            if key != "general.architecture":  # the package has written it
                value_type = gguf.GGUFValueType.get_type(value)
                if type(value) is int:
                    value_type = gguf.GGUFValueType.UINT32
                if isinstance(value, list):
                    writer.add_array(key, value)
                else:
                    writer.add_key_value(key, value, value_type)
        for name, tensor in generated.items():
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
        for name, own in parts.items():
            shape = own[0].byte_shape if own[0].place.expert is None else (len(own), *own[0].byte_shape)
            if own[0].place.factor:  # a number for each expert
                shape = (sum(part.info.nbytes for part in own),)
            kind = gguf.GGMLQuantizationType(BY_NAME[own[0].kind].id)
            nbytes = int(np.prod(shape, dtype=np.int64))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), nbytes, kind)
        with files.disk_errors(path):
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in generated.values():
                    writer.write_tensor_data(tensor.numpy())
                for own in parts.values():
                    whole = torch.cat([part.read() for part in own]) if len(own) > 1 else own[0].read()
                    writer.write_tensor_data(whole.numpy())
                writer.close()
                with temporary.open("rb") as file:
                    files.fsync(file.fileno())
                os.replace(temporary, path)
                files.sync_folder(self.folder)
            except BaseException:
                temporary.unlink(missing_ok=True)  # half a file must not fill a full disk
                raise
        return {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}


PLUGINS = (GGUF(), GGUFWithMinimum())
