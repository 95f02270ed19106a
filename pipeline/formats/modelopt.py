"""NVIDIA's ModelOpt: FP8 and NVFP4 as TensorRT-LLM, vLLM and SGLang load them, described by a `quant_algo`.

Sources: ModelOptQuantConfigBase, QuantKeyScheme and resolve of vLLM (layers/quantization/modelopt.py), which is read as
the specification; modelopt/torch/export of ModelOpt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription

from ..errors import NumericsError
from ..storage.tensor_info import TensorInfo
from .base import (
    ON_GPUS,
    Examination,
    Facts,
    Format,
    Loading,
    Reason,
    SchemeRules,
    counted,
    one_scheme_problems,
    require,
    require_names,
    some,
)
from .fp8 import FP8_CACHE, INPUT_TYPES, fp8_cache, read_fp8, unscaled_cache
from .names import NameRules, fused_unit

_SIDE_FILE = "hf_quant_config.json"
_SCALE, _FACTOR, _INPUT = "weight_scale", "weight_scale_2", "input_scale"
_CACHE, _FP8 = "kv_cache_scheme", "FP8"
_PRODUCER = {"name": "bitpress", "version": "1"}
# quant_algo -> what it says of weights and of inputs, these as compressed-tensors describes them
_ALGORITHMS: Mapping[str, tuple[WeightDescription, dict[str, Any] | None]] = {
    "W4A16_NVFP4": (WeightDescription("float", 4, "tensor_group", 16), None),
    "FP8": (WeightDescription("float", 8, "tensor"), INPUT_TYPES["tensor", "static"]),
    "FP8_PER_CHANNEL_PER_TOKEN": (WeightDescription("float", 8, "channel"), INPUT_TYPES["tensor", "dynamic"]),
    "FP8_PB_WO": (WeightDescription("float", 8, "block", 128), INPUT_TYPES["block", "dynamic"]),
}
# The shape of weight_scale in the files, of scales as the weight type has them, by the strategy of the weights.
_STORED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda scales: scales.reshape(()),
    "channel": lambda scales: scales.reshape(-1),
    "block": lambda scales: scales[:, None, :, None],
    "tensor_group": lambda scales: scales,
}
_READ: Mapping[str, Callable[[Tensor], Tensor]] = {
    "channel": lambda scales: scales.reshape(-1, 1),
    "block": lambda scales: scales[:, 0, :, 0] if scales.dim() == 4 else scales,
}


class ModelOpt(Format):
    """FP8: weight float8_e4m3fn [out, in] and weight_scale float32 of shape [], [out] or
    [ceil(out / 128), 1, ceil(in / 128), 1]; input_scale float32 [] where inputs are rounded by a stored scale.

    NVFP4: weight uint8 [out, in / 2], the even input in the low half; weight_scale float8_e4m3fn [out, in / 16];
    weight_scale_2 float32 [], which multiplies them: the reciprocal of the global scale."""

    name = "modelopt"
    rank = 70
    quant_method = "modelopt"
    tags: ClassVar[tuple[str, ...]] = ()
    marker = _SCALE
    suffixes = ("weight", _SCALE, _FACTOR, _INPUT)
    convertible = True
    side_config = _SIDE_FILE

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if scheme in (known := _schemes()):
            return []
        return [f"{self.name} holds {', '.join(each.name for each in known)}, not {scheme.name}"]

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        return one_scheme_problems(self, schemes)

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn if scheme.bits == 4 else torch.float32

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises NumericsError where the reciprocal of a global scale does not lead back to it."""
        tensors = dict(qtensor.tensors())
        scales = _STORED[qtensor.scheme.weight.description().strategy](tensors["scales"])
        stored = {"weight": tensors["codes"].contiguous(), _SCALE: scales.contiguous()}
        if (divisor := tensors.get("global_scale")) is not None:
            if not torch.equal(divisor.reciprocal().reciprocal(), divisor):
                raise NumericsError(
                    f"{self.name} stores the reciprocal of a global scale, and that of {divisor.item()!r} rounds to a "
                    "number with another reciprocal; keep its format, or quantize the original to this one"
                )
            stored[_FACTOR] = divisor.reciprocal().reshape(())
        if (inputs := tensors.get(_INPUT)) is not None:
            stored[_INPUT] = inputs.to(torch.float32).reshape(())
        return stored

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        described = scheme.weight.description()
        if described.num_bits == 8:
            reshape = _READ.get(described.strategy)
            scale = tensors[_SCALE]
            own = {**tensors, _SCALE: reshape(scale) if reshape and scale.dim() in (1, 4) else scale}
            return read_fp8(scheme, own, (_SCALE,), (_INPUT,))
        require(_INPUT not in tensors, f"{_INPUT} does not belong to a layer of {scheme.name}")
        codes, scales, factor = (tensors[name] for name in ("weight", _SCALE, _FACTOR))
        require(codes.dim() == 2, f"weight has shape {list(codes.shape)}, expected two dimensions")
        require(factor.numel() == 1, f"{_FACTOR} has shape {list(factor.shape)}, expected a single number")
        require(factor.dtype == torch.float32, f"{_FACTOR} has dtype {factor.dtype}, expected torch.float32")
        require(bool(factor > 0) and bool(factor.isfinite()), f"{_FACTOR} is {factor.item()}, expected positive")
        shape = (codes.shape[0], 2 * codes.shape[1])
        own = {"codes": codes, "scales": scales, "global_scale": factor.reshape(1).reciprocal()}
        return QTensor.of(scheme, shape, own)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """Readers leave alone every layer whose name holds an entry of "ignore" anywhere. An entry that the name of a
        quantized layer holds, too, or of what servers fuse it into, is left out."""
        (scheme,) = set(schemes.values())
        size = {"group_size": scheme.weight.description().group_size} if scheme.bits == 4 else {}
        names = {*schemes, *map(fused_unit, schemes)}
        ignore = [name for name in kept if not name.startswith("re:") and not any(name in each for each in names)]
        return {"quant_method": self.quant_method, "quant_algo": _schemes()[scheme], **size, "ignore": ignore}

    def side_files(self, section: dict[str, Any]) -> dict[str, Any]:
        """The section again, by the names that older readers know."""
        old = {
            "quant_algo": section["quant_algo"],
            "kv_cache_quant_algo": _FP8 if section.get(_CACHE) else None,
            **({"group_size": section["group_size"]} if "group_size" in section else {}),
            "exclude_modules": section["ignore"],
        }
        return {_SIDE_FILE: {"producer": _PRODUCER, "quantization": old}}

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        _left_alone(config)  # refuses what is no list of names
        algorithm = str(_section(config).get("quant_algo")).upper()
        known = ", ".join(_ALGORITHMS)
        require(algorithm in _ALGORITHMS, f"quant_algo {algorithm!r} is not read as it lies, only {known}")
        weights, inputs = _ALGORITHMS[algorithm]
        size = _section(config).get("group_size")
        require(
            size is None or weights.num_bits == 8 or size == weights.group_size,
            f"group_size {size!r} is not supported, only {weights.group_size}",
        )
        return NameRules(Scheme.from_description(weights, inputs))

    def unsupported(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
        for layer in self.layers(tensors):
            weight = tensors.get(f"{layer}.weight")
            if weight is not None and len(weight.shape) != 2:
                return f"{layer}.weight has {len(weight.shape)} dimensions: all experts in one tensor"
        return unscaled_cache(self.cache_scheme(config), tensors)

    def kept(self, config: dict[str, Any]) -> list[str]:
        return [entry for entry in _left_alone(config) if "*" not in entry]

    def cache_scheme(self, config: dict[str, Any]) -> dict[str, Any] | None:
        section = _section(config)
        scheme, algorithm = section.get(_CACHE), section.get("kv_cache_quant_algo")
        if isinstance(scheme, dict) and scheme:
            return fp8_cache(scheme)
        return FP8_CACHE if algorithm == _FP8 else {"kv_cache_quant_algo": algorithm} if algorithm else None

    def cache_section(self, cache: Mapping[str, Any]) -> dict[str, Any] | None:
        """vLLM takes it for FP8, one scale for all heads, where it is of 8 bits and floating, and knows no other."""
        return {_CACHE: dict(cache)} if dict(cache) == FP8_CACHE else None

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        entries = _left_alone(seen.config)
        faults = []
        if hidden := [layer for layer in seen.layers if _listed(layer, entries)]:
            faults.append(
                f"{some(hidden)}: quantized, and excluded by the config, so runtimes look for a plain weight there"
            )
        if unlisted := [name for name in seen.kept if not _listed(name, entries)]:
            faults.append(
                f"{some(unlisted)}: neither quantized nor excluded by the config, so runtimes look for quantized "
                "weights there"
            )
        return faults, []

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        return {
            "transformers": Loading([("no", "it does not read ModelOpt's checkpoints")]),
            "vLLM": Loading(list(_vllm(facts))),
            "SGLang": Loading(facts.by_scheme(_sglang)),
            "llama.cpp": Loading(facts.by_scheme(_llamacpp)),
            "MLX": Loading([("no", "mlx-lm does not know the names of ModelOpt's tensors")]),
            "ORT GenAI": Loading([("limited", "its builder reads ModelOpt for CUDA alone (-e cuda)")]),
            "TensorRT-LLM": Loading(facts.by_scheme(_tensorrt)),
        }


@cache
def _schemes() -> dict[Scheme, str]:
    """The schemes that the format holds -> their quant_algo."""
    return {Scheme.from_description(*described): name for name, described in _ALGORITHMS.items()}


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the quantization: the config itself, or a part of it, as in hf_quant_config.json."""
    inner = config.get("quantization", config)
    require(isinstance(inner, dict), f"quantization is {inner!r}, expected an object")
    return inner


def _left_alone(config: Mapping[str, Any]) -> list[str]:
    """Names of layers that are not quantized, or patterns of them as of files."""
    section = _section(config)
    entries = section.get("exclude_modules") or section.get("ignore") or []
    return require_names(entries, "exclude_modules")


def _listed(layer: str, entries: Sequence[str]) -> bool:
    """Whether vLLM leaves a layer alone: it looks for an entry in the name, and for one that matches as of files."""
    return any(entry in layer or ("*" in entry and fnmatchcase(layer, entry)) for entry in entries)


def _vllm(facts: Facts) -> Iterator[Reason]:
    if facts.experts:
        yield "unknown", "experts in this layout were not tried"
    square = {layer for layer, scheme in facts.schemes.items() if scheme.weight.description().strategy == "block"}
    if odd := [layer for layer, shape in facts.shapes.items() if layer in square and shape[1] % 128]:
        yield "no", counted("inputs of FP8_PB_WO must be a multiple of 128", odd)
    if all(scheme.bits == 4 for scheme in facts.schemes.values()):
        yield "limited", "by Marlin from compute capability 7.5, inputs left alone"
    else:
        yield "yes", "on GPUs from compute capability 8.9 in FP8"
    if any(scheme.weight.description().strategy != "channel" for scheme in facts.schemes.values()):
        yield ON_GPUS


def _sglang(scheme: Scheme) -> Iterator[Reason]:
    if scheme.weight.description().strategy == "tensor":
        yield "yes", "on GPUs from compute capability 8.9"
    else:
        yield "unknown", "its documents name FP8 per tensor and NVFP4 with inputs in NVFP4"


def _llamacpp(scheme: Scheme) -> Iterator[Reason]:
    if scheme.bits == 4:
        yield "unknown", "its converter moves NVFP4's codes as they are; files without scales of inputs were not tried"
    else:
        yield "limited", "its converter dequantizes the layers"


def _tensorrt(scheme: Scheme) -> Iterator[Reason]:
    if scheme.bits == 4:
        yield "unknown", "its documents name NVFP4 with inputs in NVFP4, and these inputs are left alone"
    else:
        yield "yes", "by its documents; it was not tried"


PLUGINS = (ModelOpt(),)
