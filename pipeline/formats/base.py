"""What every on-disk format says about itself, and the writer of those that lie in safetensors files."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.packing import words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription

from ..errors import ConfigError
from ..storage import files
from ..storage.checkpoint import INDEX, Checkpoint
from ..storage.fingerprint import MANIFEST
from ..storage.tensor_info import TensorInfo
from .names import NameRules

SECTIONS = ("quantization_config", "quantization")  # keys of config.json that say how a model is quantized
# Suffixes of tensors that may lie beside a layer's own, and that servers read: scales of a key-value cache.
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "output_scale")
LEVELS = ("yes", "limited", "unknown", "no")  # how a runtime loads a checkpoint; the worst of all reasons counts
Reason = tuple[str, str]  # one of LEVELS, and a sentence
HEAD_IS_ROUNDED: Reason = (  # by ONNX Runtime GenAI's builder
    "limited",
    "its builder also rounds the head and the embeddings; `bitpress convert --to onnx` has it leave them alone",
)
GENAI_BUILDER = (  # its command, by what the model is to run on
    "python -m onnxruntime_genai.models.builder -i {{folder}} -o {{folder}}-onnx -p int4 -e {device} "
    "--extra_options nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
)
ON_GPUS: Reason = ("yes", "on GPUs: on a CPU, vLLM 0.32 stops, as it has no kernel for it there")
WITH_AMX: Reason = ("yes", "on GPUs: on a CPU, vLLM 0.32 stops unless the processor has AMX, which was not tried")
SchemeRules = NameRules[Scheme]  # .get(layer's name in the files) -> its scheme; None where the config gives it none


@dataclass(frozen=True)
class Facts:
    """What it depends on whether a runtime loads a checkpoint.

    schemes: of each quantized layer. ordered: whether some layer has act-order. shapes: layer -> (out, in features).
    split: layer -> "column" or "row" as tensor parallelism cuts it, None for a layer that is whole on every GPU; None
    in all where no plan is known for the architecture. experts: the layers that are experts. joined_experts: whether
    there are some that transformers knows in one tensor only, all of a block. model_type: of config.json. heads:
    attention heads, and key-value heads. kept: linear layers that are not quantized. auto_class: transformers' class
    that builds its model. blocks: the list of decoder blocks, by transformers' name; "" where it is not known.
    embeddings: the layers that are embeddings. cache: what keys and values are rounded to; None where they are not.
    """

    format: "Format"
    schemes: dict[str, Scheme]
    ordered: bool
    shapes: dict[str, tuple[int, int]]
    split: dict[str, str | None] | None
    experts: frozenset[str] = frozenset()
    joined_experts: bool = False
    model_type: str = ""
    heads: tuple[int, int] = (1, 1)
    kept: frozenset[str] = frozenset()
    auto_class: str = "AutoModelForCausalLM"
    blocks: str = ""
    embeddings: frozenset[str] = frozenset()
    cache: CacheType | None = None

    def by_scheme(self, rule: Callable[[Scheme], Iterable[Reason]]) -> list[Reason]:
        """The reasons that a rule gives for each scheme; the scheme is named where there are several."""
        schemes = list(dict.fromkeys(self.schemes.values()))
        return [
            (level, f"{scheme.name}: {why}" if len(schemes) > 1 and why else why)
            for scheme in schemes
            for level, why in rule(scheme)
        ]


@dataclass(frozen=True)
class Loading:
    """How one runtime loads a checkpoint.

    needs: packages beside the runtime itself, as pip takes them, after commas. arguments: what from_pretrained needs
    beside the name, as code; imports: what that code takes from transformers. serve: the command that serves it, where
    that is not the runtime's usual one; {model} stands for a folder or a Hub id, {folder} for a folder.
    """

    reasons: list[Reason] = field(default_factory=list)
    needs: str = ""
    arguments: str = ""
    imports: str = ""
    serve: str = ""


@dataclass(frozen=True)
class LayerExamination:
    """One quantized layer as the doctor read it. observation: what Format.observe saw."""

    scheme: Scheme
    shape: tuple[int, int]
    scale_dtype: torch.dtype
    ordered: bool
    observation: Any = None


@dataclass
class Examination:
    """A quantized checkpoint as the doctor read it.

    config: its quantization_config. dtype: the model's, such as "bfloat16". kept: linear layers that are not
    quantized, with their shapes; () for a tied head.
    """

    config: dict[str, Any]
    dtype: str
    layers: dict[str, LayerExamination] = field(default_factory=dict)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def ordered(self) -> list[str]:
        return [name for name, layer in self.layers.items() if layer.ordered]

    def unquantized(self, head: str) -> list[str]:
        """The kept layers without the head of this name and gates of one output, which readers leave alone unasked."""
        return [name for name, shape in self.kept.items() if shape[:1] != (1,) and name != head]

    @property
    def scale_dtypes(self) -> list[str]:
        """Names of the dtypes, sorted."""
        dtypes = Counter(layer.scale_dtype for layer in self.layers.values())
        return sorted(dtype_name(dtype) for dtype in dtypes)


class Writer(Protocol):
    """Writes a checkpoint's files, a shard at a time: see SafetensorsWriter, which is the usual one."""

    folder: Path

    def add(self, name: str, value: Tensor | QTensor) -> int: ...
    def cut(self, number: int) -> "Shard": ...
    def adopt(self, line: Mapping[str, Any]) -> None: ...
    def close(
        self, config: Mapping[str, Any], section: dict[str, Any], companions: Iterable[Path]
    ) -> dict[str, dict[str, Any]]: ...


class Format(ABC):
    """How quantized layers lie on the disk, what config.json says of them, and who reads that.

    A format is one file in this folder that lists an instance of it in PLUGINS. See gptq.py for an example.

    name: as configs call it. rank: the place in the order in which `auto` tries formats, the lowest first.
    quant_method, tags: what config.json calls it, `tags` under "checkpoint_format" or "format".
    hf_methods: under which names transformers registers it.
    marker: the suffix of the tensor that every quantized layer has and no other has.
    suffixes: of all tensors that a layer may have, `marker` among them (the bias is not the format's).
    holds_embeddings: whether its readers take quantized embeddings.
    holds_order: whether it can say in what order the inputs were quantized (see QTensor.order).
    joins_experts: whether the experts of a block lie in one tensor, as transformers and vLLM know some architectures.
    exact_scales: whether its readers take scales in `scale_dtype` only.
    convertible: whether `bitpress convert` writes it. read_only: whether nothing writes it: `problems` says so.
    packages: names of the packages, beside bitpress's own requirements, that it takes to write it.
    config_copies: other files that repeat the config, and the keys on which both must agree.
    side_config: another file that counts where config.json has no quantization_config; "" where there is none.
    output_multiple: what the number of output features must be a multiple of for servers' kernels.
    uncuttable: why it is not known how servers cut its layers for several GPUs; None where it is.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    quant_method: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    marker: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    hf_methods: ClassVar[tuple[str, ...]] = ()
    holds_embeddings: ClassVar[bool] = False
    holds_order: ClassVar[bool] = False
    joins_experts: ClassVar[bool] = False
    exact_scales: ClassVar[bool] = False
    convertible: ClassVar[bool] = False
    read_only: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    config_copies: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    side_config: ClassVar[str] = ""
    output_multiple: ClassVar[int] = 1
    uncuttable: ClassVar[str | None] = None

    def with_template(self, path: Path) -> "Format":
        """This format, which takes what else its readers want to know of a model from another file of it.

        Raises:
            ConfigError: it takes none, or the file is none.
        """
        raise ConfigError(f"template is for GGUF files of models that bitpress has no table of; {self.name} takes none")

    @property
    def options(self) -> dict[str, Any]:
        """What an artifact's bytes depend on beside the format's name, in plain values."""
        return {}

    @abstractmethod
    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        """Why a weight [out, in] of this scheme cannot be stored so; [] if it can."""

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Why layers of these schemes cannot lie in one checkpoint, each by itself being fine; [] if they can.

        Args:
            schemes: layer -> its scheme.
        """
        return []

    def remarks(self, schemes: Iterable[Scheme]) -> list[str]:
        """What somebody who has a checkpoint stored so must know, such as what its readers round; [] for nothing."""
        return []

    def checkpoint_problems(self, checkpoint: Checkpoint, layers: Mapping[str, Scheme]) -> list[str]:
        """Why this model or its tokenizer cannot be stored so; [] if it can.

        Args:
            layers: name in the files -> scheme, of those that are, or will be, quantized.
        """
        return []

    @abstractmethod
    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, for a checkpoint of `dtype`; codes are computed from scales so rounded."""

    @abstractmethod
    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """suffix -> tensor, for a checkpoint of `dtype`."""

    @abstractmethod
    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        """The inverse of write.

        Args:
            tensors: untrusted, by suffix: all that the layer has of `suffixes`.
        Raises:
            ValueError, KeyError: the tensors are not a layer of this scheme.
        """

    @abstractmethod
    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """For config.json.

        Args:
            schemes: quantized layer -> its scheme.
            kept: the linear layers that are not quantized, by name; or patterns of names, which begin with "re:".
            dtype: of the checkpoint.
            ordered: whether some layer has act-order.
        """

    @abstractmethod
    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        """Which scheme each layer has that is quantized in the files, by an untrusted quantization_config.

        Raises:
            ValueError: it describes something that bitpress does not read.
        """

    def layers(self, names: Iterable[str]) -> list[str]:
        """The quantized layers of a checkpoint whose tensors are called so, in their order."""
        ending = f".{self.marker}"
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]

    def unsupported(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
        """Why a checkpoint can only be read as a source, dequantized, though `scheme_rules` takes its config; None if
        its layers can be read as they lie in the files.

        Args:
            tensors: of the files, by their headers.
        """
        return None

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint of this format as `layers` and `read` know it: each layer's tensors by themselves."""
        return checkpoint

    def together(self, name: str) -> str:
        """What a tensor or a quantized layer must lie in one file with: all have the same answer, by default alone."""
        return name

    def kept(self, config: dict[str, Any]) -> list[str]:
        """What a quantization_config says is not quantized, as quantization_config takes it ("re:…" for patterns)."""
        return []

    def cache_scheme(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """How servers are to quantize the key-value cache, by a quantization_config; None where it says nothing."""
        return None

    def cache_section(self, cache: Mapping[str, Any]) -> dict[str, Any] | None:
        """The keys of a quantization_config that say what `cache_scheme` returns; None: there is no place for it."""
        return None

    def only_cache(self, config: dict[str, Any]) -> bool:
        """Whether a quantization_config says that the key-value cache is quantized, and no layer."""
        return False

    def missing_tensors(self, config: dict[str, Any], layers: Iterable[str], names: Iterable[str]) -> str | None:
        """What a config says the files have and they do not have; a sentence that begins with the reason."""
        return None

    def observe(self, checkpoint: Checkpoint, layer: str, qtensor: QTensor) -> Any:
        """Something about a layer's files that `diagnose` needs to know and the QTensor does not tell."""
        return None

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        """Faults, which make a checkpoint unsound, and notes: where the config and the files differ."""
        return [], []

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        """How runtimes load such a checkpoint; a runtime that is not named is not known to read it."""
        return {}

    def fast_kernel(self, scheme: Scheme) -> bool:
        """Whether vLLM's and SGLang's fast kernel (Marlin) takes layers of this scheme that are stored so."""
        return False

    def input_multiple(self, scheme: Scheme, cut: bool) -> int:
        """What the number of input features must be a multiple of for servers' other kernels.

        Args:
            cut: of a piece of a layer that is cut along its inputs for several GPUs.
        """
        return 1

    def side_files(self, section: dict[str, Any]) -> dict[str, Any]:
        """File name -> JSON: what readers want beside config.json, whose quantization_config is `section`."""
        return {}

    def weight_files(self, shards: int) -> list[str]:
        """The names of the files that hold the weights, of a checkpoint that is written as so many shards."""
        return [files.shard_name(number, shards) for number in range(shards)]

    def config_keys(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Further keys of config.json that readers want, whose quantization_config is `section`."""
        return {}

    def section_of(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a config.json says of this format under another key, as a quantization_config; None: nothing."""
        return None

    def writer(self, folder: Path, dtype: torch.dtype, shards: int) -> Writer:
        """Writes a checkpoint of this format into a folder."""
        return SafetensorsWriter(self, folder, dtype, shards)


@dataclass(frozen=True)
class Shard:
    """Tensors that are written together, as one file."""

    path: Path
    tensors: dict[str, Tensor]

    def write(self) -> dict[str, Any]:
        """Write the file, synced to the disk; returns {"file", "bytes", "sha256"}. May run in another thread.

        Raises:
            DiskError: nothing of that name was left behind.
        """
        written = files.write_safetensors(self.path, self.tensors)
        self.tensors.clear()
        return {"file": self.path.name, **written}


SHARD_BYTES = 512 << 20  # tensors are grouped into shards of at most this, and held one shard at a time
Item = TypeVar("Item")


def group_by_bytes(items: Iterable[Item], nbytes: Callable[[Item], int], most: int = SHARD_BYTES) -> list[list[Item]]:
    """The items in their order, in groups of at most so many bytes; an item that is larger has a group of its own."""
    groups: list[list[Item]] = []
    held = 0
    for item in items:
        size = nbytes(item)
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size
    return groups


class SafetensorsWriter:
    """Writes safetensors shards, their index, config.json, and the files that come along.

        writer = format.writer(folder, torch.bfloat16, shards=2)
        for number, layers in enumerate(...):
            for name, value in layers:
                writer.add(name, value)
            writer.adopt(writer.cut(number).write())
        written = writer.close(checkpoint.config, section, checkpoint.other_files())

    A shard that an earlier, broken call wrote is adopted by its line, {"file", "bytes", "sha256"}, and not cut.
    """

    def __init__(self, format: Format, folder: Path, dtype: torch.dtype, shards: int):
        self.format, self.folder, self.dtype, self.shards = format, folder, dtype, shards
        self.pending: dict[str, Tensor] = {}
        self.lines: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: Tensor | QTensor) -> int:
        """Put a tensor, or the tensors of a quantized layer, into the next shard; returns how many bytes they take."""
        tensors = {name: value} if isinstance(value, Tensor) else self._stored(name, value)
        self.pending |= tensors
        return sum(tensor.nbytes for tensor in tensors.values())

    def _stored(self, layer: str, qtensor: QTensor) -> dict[str, Tensor]:
        written = self.format.write(qtensor, self.dtype)
        return {f"{layer}.{suffix}": tensor for suffix, tensor in written.items()}

    def cut(self, number: int) -> Shard:
        """What was added since the last cut, as the number-th shard, from 0; not written yet."""
        tensors, self.pending = self.pending, {}
        return Shard(self.folder / files.shard_name(number, self.shards), tensors)

    def adopt(self, line: Mapping[str, Any]) -> None:
        """Count a shard that lies in the folder, by what Shard.write returned."""
        self.lines[line["file"]] = {"bytes": line["bytes"], "sha256": line["sha256"]}

    def close(
        self, config: Mapping[str, Any], section: dict[str, Any], companions: Iterable[Path]
    ) -> dict[str, dict[str, Any]]:
        """Write the index, config.json, the format's side files, and copies of the companions.

        Args:
            config: the source's config.json. section: the quantization_config.
            companions: small files of the source's folder; its manifest is left out, which is about other files.
        Returns:
            file name -> {"bytes", "sha256"} of everything in the folder, sorted.
        """
        assert not self.pending, "what was added must be cut and written before"
        written = dict(self.lines)
        weight_map = {name: file for file in sorted(written) for name in Checkpoint.names_in(self.folder / file)}
        index = {
            "metadata": {"total_size": sum(line["bytes"] for line in written.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        written[INDEX] = files.write_json(self.folder / INDEX, index)
        return dict(sorted((written | self.write_small_files(config, section, companions)).items()))

    def write_small_files(
        self, config: Mapping[str, Any], section: dict[str, Any], companions: Iterable[Path]
    ) -> dict[str, dict[str, Any]]:
        """Write what lies beside the weights: config.json, the format's side files, and copies of the companions."""
        model = {key: value for key, value in config.items() if key not in ("_name_or_path", *SECTIONS)}
        if not model.get("dtype") and not model.get("torch_dtype"):  # null, too: readers guess then, each its own way
            model["dtype"] = dtype_name(self.dtype)
        keys = {"quantization_config": section, **self.format.config_keys(section)}
        contents = {"config.json": model | keys, **self.format.side_files(section)}
        written = {name: files.write_json(self.folder / name, content) for name, content in contents.items()}
        for path in companions:
            if path.name != MANIFEST:
                written[path.name] = files.copy_file(path, self.folder / path.name)
        return written


def is_packed_integer(scheme: Scheme) -> bool:
    """Whether a scheme's weights are affine integers whose codes lie packed in int32 words, inputs left alone."""
    described = scheme.weight.description()
    if scheme.activations is not None or described.type != "int" or described.strategy not in ("channel", "group"):
        return False
    size = described.group_size or 32
    layout = scheme.weight.layout((32, size))
    names = {"codes", "scales"} if described.symmetric else {"codes", "scales", "zeros"}
    return set(layout) == names and layout["codes"] == ((32, words(size, described.num_bits)), (torch.int32,))


def middle_code(scheme: Scheme) -> int:
    """The zero point of symmetric integers that are stored as unsigned codes."""
    return 1 << (scheme.weight.description().num_bits - 1)


def groups_of(scheme: Scheme, in_features: int) -> int:
    """The number of scales of each output channel, of integers in groups or channels."""
    return in_features // (scheme.weight.description().group_size or in_features)


def integer_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """A weight-only integer scheme from a config's values, which may be anything.

    Raises:
        ValueError: they are not of their types, or no scheme.
    """
    require(type(bits) is int, f"bits is {bits!r}, expected a whole number")
    require(group_size is None or type(group_size) is int, f"group_size is {group_size!r}, expected a whole number")
    require(isinstance(symmetric, bool), f"symmetric is {symmetric!r}, expected true or false")
    strategy = "channel" if group_size is None else "group"
    return Scheme.from_description(WeightDescription("int", bits, strategy, group_size, symmetric))


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def counted(reason: str, layers: Sequence[str]) -> str:
    """A reason with the layers that it is about."""
    if not layers:
        return reason
    return f"{reason} ({layers[0]})" if len(layers) == 1 else f"{reason} ({len(layers)} layers, such as {layers[0]})"


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the check of untrusted tensors."""
    if not condition:
        raise ValueError(message)


def require_names(entries: Any, key: str) -> list[str]:
    """The names that a config has under `key`; ValueError unless it is a list of texts that are not empty."""
    names = isinstance(entries, list) and all(isinstance(entry, str) and entry for entry in entries)
    require(names, f"{key} is {entries!r}, expected a list of names")
    return list(entries)


def one_scheme_problems(format: Format, schemes: Mapping[str, Scheme]) -> list[str]:
    """Why a format that describes one scheme cannot hold these layers; [] where all have the same."""
    names = sorted({scheme.name for scheme in schemes.values()})
    several = f"{format.name} holds one scheme for all layers, got {' and '.join(names)}"
    return [f"{several}; use format compressed-tensors"] if len(names) > 1 else []
