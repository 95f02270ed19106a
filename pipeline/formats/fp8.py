"""FP8 as DeepSeek-V3 and Qwen3 publish it: `quant_method` fp8, E4M3 weights with the scales that multiply them.

Sources: Fp8Config and Fp8LinearMethod of vLLM; FineGrainedFP8Config and Fp8Dequantize of transformers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription

from ..storage.tensor_info import TensorInfo
from .base import (
    CACHE_SCALES,
    ON_GPUS,
    WITH_AMX,
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
from .names import NameRules, fused_unit

_BLOCK = [128, 128]
_HEAD = "lm_head"
# Scales of weights and of inputs, by the names that programs give them: first those that are written here.
_SQUARES = "weight_scale_inv"  # it multiplies, in spite of its name
_WHOLE = ("weight_scale", _SQUARES, "qscale_weight")
_INPUTS = ("input_scale", "activation_scale", "qscale_act")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
_INPUT_SCHEMES = ("dynamic", "static")
INPUT_TYPES = {  # what `activation_scheme` stands for, by the strategy of the weights
    ("block", "dynamic"): {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    ("tensor", "dynamic"): {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ("tensor", "static"): {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
}
# A key-value cache in FP8, as compressed-tensors describes it.
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


class FP8Layers(Format):
    """weight float8_e4m3fn [out, in], and with it in squares of 128 outputs and 128 inputs weight_scale_inv float32
    [ceil(out / 128), ceil(in / 128)]; or one number for the whole, weight_scale float32 [1], and where inputs are
    rounded by a stored scale input_scale float32 [1].

    Read, too: scales of one number by the names that transformers and Mistral give them, and scales that are stored as
    powers of two (E8M0, "ue8m0")."""

    name = "fp8"
    rank = 60
    quant_method = "fp8"
    tags: ClassVar[tuple[str, ...]] = ()
    hf_methods = ("fp8",)
    marker = _SQUARES
    suffixes = ("weight", *_WHOLE, *_INPUTS)
    convertible = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if _input_scheme(scheme) is None:
            what = "FP8 weights in squares of 128, or with one scale for the whole, and rounds inputs to FP8"
            return [f"{self.name} holds {what}, not {scheme.name}"]
        return []

    def mixture_problems(self, schemes: Mapping[str, Scheme]) -> list[str]:
        return one_scheme_problems(self, schemes)

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def layers(self, names: Iterable[str]) -> list[str]:
        endings = tuple(f".{suffix}" for suffix in _WHOLE)
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(endings)))

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        scheme = qtensor.scheme
        suffix = _SQUARES if scheme.weight.description().strategy == "block" else _WHOLE[0]
        inputs = {name: qtensor.extra[name] for name in (scheme.static.layout() if scheme.static else ())}
        return {"weight": qtensor.codes.contiguous(), suffix: qtensor.scales, **inputs}

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        names = _WHOLE if scheme.weight.description().strategy == "tensor" else (_SQUARES, _WHOLE[0])
        return read_fp8(scheme, tensors, names, _INPUTS)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """vLLM leaves alone the layers that "modules_to_not_convert" names; transformers those whose name begins or
        ends with an entry, too."""
        (scheme,) = set(schemes.values())
        square = scheme.weight.description().strategy == "block"
        head = [] if any(layer.rpartition(".")[2] == _HEAD for layer in schemes) else [_HEAD]
        return {
            "quant_method": self.quant_method,
            "activation_scheme": _input_scheme(scheme),
            "fmt": "e4m3",
            "weight_block_size": _BLOCK if square else None,
            "modules_to_not_convert": list(dict.fromkeys([*(n for n in kept if not n.startswith("re:")), *head])),
        }

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        _left_alone(config)  # refuses what is no list of names
        kind, block = config.get("fmt", "e4m3"), config.get("weight_block_size")
        require(kind == "e4m3", f"fmt {kind!r} is not supported, only 'e4m3'")
        require(block in (None, _BLOCK), f"weight_block_size {block!r} is not supported, only {_BLOCK}")
        inputs = config.get("activation_scheme", _INPUT_SCHEMES[0])
        require(inputs in _INPUT_SCHEMES, f"activation_scheme {inputs!r} is not supported, only {_INPUT_SCHEMES}")
        strategy = "block" if block else "tensor"
        described = INPUT_TYPES.get((strategy, inputs))
        require(described is not None, f"activation_scheme {inputs!r} beside weight_block_size is not supported")
        require(config.get("expert_dtype", "fp8") == "fp8", f"expert_dtype {config.get('expert_dtype')!r} is not fp8")
        weights = WeightDescription("float", 8, strategy, 128 if block else None)
        return NameRules(Scheme.from_description(weights, described))

    def unsupported(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
        square = bool(config.get("weight_block_size"))
        for name, info in tensors.items():
            if info.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or not name.endswith(".weight"):
                continue
            layer, shape = name.removesuffix(".weight"), info.shape
            scales = [tensors[each] for suffix in _WHOLE if (each := f"{layer}.{suffix}") in tensors]
            if info.dtype != torch.float8_e4m3fn or len(shape) != 2:
                return f"{name} is {info.dtype} of shape {list(shape)}, where an E4M3 matrix is read"
            if len(scales) != 1:
                return f"{name} has {len(scales)} tensors of scales"
            grid = tuple(-(-size // _BLOCK[0]) for size in shape) if square else ()
            if [size for size in scales[0].shape if size != 1] != [size for size in grid if size != 1]:
                return f"{scales[0].name} has shape {list(scales[0].shape)}, which is not that of the config's blocks"
            if config.get("activation_scheme") != "static" and any(f"{layer}.{name}" in tensors for name in _INPUTS):
                return f"{layer} has a scale for its inputs, and the config does not say activation_scheme static"
            if scales[0].dtype not in _SCALE_DTYPES:
                return f"{scales[0].name} is {scales[0].dtype}, which is no dtype of scales"
        if lost := [layer for layer in self.layers(tensors) if f"{layer}.weight" not in tensors]:
            return f"{lost[0]} has scales and no weight"
        return unscaled_cache(self.cache_scheme(config), tensors)

    def kept(self, config: dict[str, Any]) -> list[str]:
        return _left_alone(config)

    def cache_scheme(self, config: dict[str, Any]) -> dict[str, Any] | None:
        scheme = config.get("kv_cache_scheme")
        return fp8_cache(scheme) if isinstance(scheme, dict) else FP8_CACHE if scheme else None  # AutoFP8: "static"

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        entries = _left_alone(seen.config)
        faults = []
        if hidden := [layer for layer in seen.layers if _listed(layer, entries)]:
            faults.append(
                f"{some(hidden)}: quantized, and the config's modules_to_not_convert matches, so runtimes look for a "
                "plain weight there"
            )
        if entries and (unlisted := [name for name in seen.unquantized(_HEAD) if not _listed(name, entries)]):
            faults.append(
                f"{some(unlisted)}: neither quantized nor in the config's modules_to_not_convert, so runtimes look for "
                "FP8 weights there"
            )
        return faults, []

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        return {
            "transformers": Loading(list(_transformers(facts)), needs="accelerate, kernels"),
            "vLLM": Loading(list(_vllm(facts))),
            "SGLang": Loading([("yes", "on GPUs from compute capability 8.9")]),
            "llama.cpp": Loading([("limited", "its converter dequantizes the layers")]),
            "MLX": Loading([("unknown", "whether mlx-lm dequantizes such files was not tried")]),
            "ORT GenAI": Loading([("no", "its builder does not read FP8")]),
            "TensorRT-LLM": Loading([("unknown", "its documents name FP8 in blocks; files like these were not tried")]),
        }


def read_fp8(scheme: Scheme, tensors: dict[str, Tensor], names: Sequence[str], inputs: Sequence[str]) -> QTensor:
    """The FP8 layer of these tensors, its scales as float32 where they are stored as powers of two.

    Args:
        names: what the scales of the weight may be called. inputs: what those of static inputs may be.
    Raises:
        ValueError, KeyError: see Format.read.
    """
    weight = tensors["weight"]
    require(weight.dim() == 2, f"weight has shape {list(weight.shape)}, expected two dimensions")
    scale = next((name for name in names if name in tensors), None)
    if scale is None:
        raise KeyError(names[0])
    own = {scale, "weight"}
    extra: dict[str, Tensor] = {}
    for name in scheme.static.layout() if scheme.static else ():
        stored = next((each for each in inputs if each in tensors), None)
        if stored is None:
            raise KeyError(name)
        own.add(stored)
        extra[name] = tensors[stored].reshape(-1)
    stray = sorted(tensors.keys() - own)
    require(not stray, f"{', '.join(stray)} does not belong to a layer of {scheme.name}")
    shape = (weight.shape[0], weight.shape[1])
    elements = scheme.weight.from_elements(shape, weight, _float_scales(tensors[scale]), None)
    return QTensor.of(scheme, shape, {**elements, **extra})


def fp8_cache(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A kv_cache_scheme with what those of FP8 leave out."""
    return {**FP8_CACHE, **scheme} if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else dict(scheme)


def unscaled_cache(scheme: Mapping[str, Any] | None, tensors: Iterable[str]) -> str | None:
    """Why a cache that a config describes cannot be followed: servers take 1 where the files have no scales."""
    scaled = not scheme or any(name.rpartition(".")[2] in CACHE_SCALES for name in tensors)
    return None if scaled else "the config has servers quantize the key-value cache, and no scales for it are stored"


def _float_scales(scales: Tensor) -> Tensor:
    """Scales that are stored as powers of two, 2^(v - 127), as float32; others as they are."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.to(torch.float32) if scales.dtype == torch.float8_e8m0fnu else scales


def _input_scheme(scheme: Scheme) -> str | None:
    """The activation_scheme of a scheme that this format holds; None for others."""
    described, inputs = scheme.weight.description(), scheme.activations
    if (described.type, described.num_bits) != ("float", 8) or inputs is None:
        return None
    if described.strategy == "block" and described.group_size != _BLOCK[0]:
        return None
    facts = {"symmetric": True, **inputs.description()}
    for (strategy, name), expected in INPUT_TYPES.items():
        if strategy == described.strategy and facts == {"symmetric": True, **expected}:
            return name
    return None


def _left_alone(config: dict[str, Any]) -> list[str]:
    """The entries of "modules_to_not_convert", or of "ignored_layers", which some programs write."""
    entries = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
    return require_names(entries, "modules_to_not_convert")


def _listed(layer: str, entries: Sequence[str]) -> bool:
    """Whether a reader leaves a layer alone: an entry is its name, the beginning of it up to a dot, or its end."""
    return any(layer == entry or layer.startswith(f"{entry}.") or layer.endswith(entry) for entry in entries)


def _transformers(facts: Facts) -> Iterator[Reason]:
    square = [layer for layer, scheme in facts.schemes.items() if scheme.weight.description().strategy == "block"]
    if not square:
        yield "no", "it looks for one scale per weight under other names, and leaves these unused without an error"
        return
    yield "yes", "on GPUs from compute capability 8.9; elsewhere its weights become bfloat16 as they are loaded"
    cut = [layer for layer in square if any(size % _BLOCK[0] for size in facts.shapes.get(layer, ()))]
    if cut:
        yield (
            "limited",
            counted("where it dequantizes, it takes the squares' size from the shapes, which is wrong here", cut),
        )


def _vllm(facts: Facts) -> Iterator[Reason]:
    yield "yes", "on GPUs from compute capability 8.9 in FP8; on 7.5 to 8.8 by Marlin, inputs left alone"
    if all(scheme.weight.description().strategy == "tensor" for scheme in facts.schemes.values()):
        yield ON_GPUS
        return
    yield WITH_AMX
    parts: dict[str, list[str]] = {}
    for layer in facts.shapes:
        parts.setdefault(fused_unit(layer), []).append(layer)
    odd = [
        unit
        for unit, layers in parts.items()
        if len(layers) > 1 and any(facts.shapes[layer][0] % _BLOCK[0] for layer in layers[:-1])
    ]
    if odd:
        yield "no", counted("it fuses layers whose outputs are no whole squares of 128", odd)


PLUGINS = (FP8Layers(),)
