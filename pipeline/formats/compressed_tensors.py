"""compressed-tensors: layers of several kinds side by side, each described by a config group.

Integers whose inputs are left alone lie packed ("pack-quantized"), and so do floats of 4 bits ("nvfp4-pack-quantized",
"mxfp4-pack-quantized"); other weights, such as INT8 ones whose inputs are quantized too, as plain elements
("int-quantized", "float-quantized", "naive-quantized"). Written from the format's description; vLLM, SGLang and
transformers (with the compressed-tensors package) load it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription

from ..errors import listing
from .act_order import gather_codes, read_order
from .base import (
    GENAI_BUILDER,
    ON_GPUS,
    WITH_AMX,
    Examination,
    Facts,
    Format,
    Loading,
    Reason,
    SchemeRules,
    groups_of,
    is_packed_integer,
    middle_code,
    require,
    some,
)  # fmt: skip
from .names import NameRules, patterns_of

_ORDER = "weight_g_idx"
_ZEROS = "weight_zero_point"
_INPUTS = ("input_scale", "input_zero_point")  # of static activations
_CACHE = "kv_cache_scheme"
_SCATTERED = ("group", "dynamic")  # values of actorder, one the other's alias, with which groups need weight_g_idx
_IN_PLACE = (None, "weight", "static")  # with these, the members of a group lie side by side
_WITHOUT_EFFECT = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # on what is computed once it is stored
_VERSION = "0.15.0"  # of the layout: the oldest release whose readers take what is written here
_PACKED = "pack-quantized"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
_DENSE = "dense"  # no layer is quantized, and the key-value cache is
_GLOBAL = "weight_global_scale"
# What floats of 4 bits are called, by their strategy and group size, with the tensors of a layer: its name here -> the
# suffix in the files.
_FLOAT4: Mapping[tuple[str, int | None], tuple[str, Mapping[str, str]]] = {
    ("group", 32): ("mxfp4-pack-quantized", {"codes": "weight_packed", "scales": "weight_scale"}),
    ("tensor_group", 16): (
        "nvfp4-pack-quantized",
        {"codes": "weight_packed", "scales": "weight_scale", "global_scale": _GLOBAL},
    ),
}
_VLLM_EMBEDDINGS: Reason = (
    "unknown",
    "quantized embeddings: vLLM 0.32 knows them in some architectures (Qwen 2), not in others (Llama, Mixtral), and "
    "on a CPU has no kernel for them",
)
_FLOATS = ("bfloat16", "float16", "float32")  # dtypes of scales that readers may round
_MARLIN_BITS = (4, 8)
_PER_WORD = 32


class CompressedTensors(Format):
    """Packed: weight_packed int32 [out, ceil(in * bits / 32)], weight_scale [out, groups], weight_shape int64 [2];
    weight_zero_point int32 [ceil(out * bits / 32), groups] where asymmetric. weight_g_idx int32 [in], where actorder
    was "group", is read and never written: newer readers know it no more.

    Floats of 4 bits: weight_packed uint8 [out, in / 2], the even input in the low half; weight_scale, uint8 (E8M0)
    [out, in / 32] or float8_e4m3fn [out, in / 16], the latter with weight_global_scale float32 [1], which divides them.

    Plain: weight [out, in] of int8, float8 or another dtype, weight_scale, weight_zero_point where there are any.

    Early versions stored zero points beside symmetric weights, too, all of them 0 (until May 2024), and zero points of
    packed weights as int8 [out, groups] (until April 2025). Both are read."""

    name = "compressed-tensors"
    rank = 20
    quant_method = "compressed-tensors"
    tags: ClassVar[tuple[str, ...]] = (_PACKED, *_PLAIN, *(name for name, _ in _FLOAT4.values()), _MIXED, _DENSE)
    hf_methods = ("compressed-tensors",)
    marker = "weight_scale"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", _ZEROS, _ORDER, _GLOBAL, "weight", *_INPUTS)
    holds_embeddings = True
    convertible = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if _is_packed(scheme) or _float4(scheme) or _has_elements(scheme):
            return []
        return [
            f"{self.name} holds weight-only integers, and weights whose elements are plain numbers, not {scheme.name}"
        ]

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        kinds = scheme.weight.layout((32, scheme.weight.description().group_size or 32))["scales"][1]
        return dtype if dtype in kinds else kinds[0]

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert qtensor.order is None, "holds_order says that this format has no place for it"
        scheme = qtensor.scheme
        if packed_float := _float4(scheme):
            return {packed_float[1][name]: tensor.contiguous() for name, tensor in qtensor.tensors()}
        if not _is_packed(scheme):
            plain = scheme.weight.elements(qtensor.shape, dict(qtensor.tensors()))
            assert plain is not None, "problems() refuses weights that have no plain elements"
            elements, scales, zeros = plain
            tensors = {"weight": elements, "weight_scale": scales}
            tensors |= {} if zeros is None else {"weight_zero_point": zeros}
            return tensors | {name: qtensor.extra[name] for name in (scheme.static.layout() if scheme.static else ())}
        tensors = {
            "weight_packed": qtensor.codes.contiguous(),
            "weight_scale": qtensor.scales,
            "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
        }
        if qtensor.zeros is not None:
            tensors["weight_zero_point"] = pack(qtensor.zeros.t(), qtensor.scheme.bits).t().contiguous()
        return tensors

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        if "weight" not in tensors and _is_packed(scheme):
            return _read_packed(scheme, tensors)
        if packed_float := _float4(scheme):
            return _read_float4(scheme, tensors, packed_float[1])
        stray = sorted(tensors.keys() & {*_INPUTS} - {*(scheme.static.layout() if scheme.static else ())})
        require(not stray, f"{', '.join(stray)} does not belong to a layer of {scheme.name}")
        packed = sorted({"weight_packed", "weight_shape", _ORDER, _GLOBAL} & tensors.keys())
        require(not packed, f"{', '.join(packed)} does not belong to a layer of plain elements")
        return _read_plain(scheme, tensors)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """A config group for each scheme. One scheme for all decoder layers goes by their class; several, or a head or
        an embedding among them, by patterns of which exactly one matches each layer."""
        distinct = list(dict.fromkeys(schemes.values()))
        by_class = len(distinct) == 1 and all(any(part.isdecimal() for part in name.split(".")) for name in schemes)
        kinds = {_kind(scheme) for scheme in distinct}
        groups = {}
        for number, scheme in enumerate(distinct):
            layers = [layer for layer, own in schemes.items() if own == scheme]
            others = [layer for layer in (*schemes, *kept) if schemes.get(layer) != scheme]
            group = {
                "targets": ["Linear"] if by_class else [f"re:{pattern}" for pattern in patterns_of(layers, others)],
                "weights": _weights(scheme),
                "input_activations": _inputs(scheme),
                "output_activations": None,
            }
            groups[f"group_{number}"] = group | ({"format": _kind(scheme)} if len(kinds) > 1 or scheme.joined else {})
        return {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else _MIXED if kinds else _DENSE,
            "quantization_status": "compressed",
            "version": _VERSION,
            "global_compression_ratio": None,
            _CACHE: None,
            "ignore": list(kept),
            "config_groups": groups,
        }

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        require(isinstance(config.get(_CACHE) or {}, dict), f"{_CACHE} is {config.get(_CACHE)!r}, expected an object")
        require(not config.get("transform_config"), "transform_config is not supported")
        sparsity = config.get("sparsity_config") or {}
        kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        require(kind in (None, "dense"), f"sparsity_config has the format {kind!r}, only 'dense' is read")
        if self.only_cache(config):
            return NameRules()
        rules = _groups(config)
        known = {id(group): _scheme(group, str(group.get("format") or config.get("format"))) for group in _each(rules)}
        return NameRules(
            known[id(rules.otherwise)] if rules.otherwise else None,
            {name: known[id(group)] for name, group in rules.names.items()},
            [(pattern, known[id(group)]) for pattern, group in rules.patterns],
        )

    def kept(self, config: dict[str, Any]) -> list[str]:
        ignore = config.get("ignore")
        return [entry for entry in ignore if isinstance(entry, str)] if isinstance(ignore, list) else []

    def cache_scheme(self, config: dict[str, Any]) -> dict[str, Any] | None:
        return config.get(_CACHE) or None

    def cache_section(self, cache: Mapping[str, Any]) -> dict[str, Any]:
        return {_CACHE: dict(cache)}

    def only_cache(self, config: dict[str, Any]) -> bool:
        return bool(config.get(_CACHE)) and not config.get("config_groups")

    def missing_tensors(self, config: dict[str, Any], layers: Iterable[str], names: Iterable[str]) -> str | None:
        if self.only_cache(config):
            return None
        rules, present = _groups(config), set(names)
        scattered = (
            layer for layer in layers if ((rules.get(layer) or {}).get("weights") or {}).get("actorder") in _SCATTERED
        )
        lost = [name for layer in scattered if (name := f"{layer}.{_ORDER}") not in present]
        return f"actorder is 'group', and these tensors are missing:\n{listing(lost)}" if lost else None

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        faults: list[str] = []
        notes: list[str] = []
        if (scales := [name for name in seen.scale_dtypes if name in _FLOATS]) not in ([], [seen.dtype]):
            dtypes = " and ".join(scales)
            notes.append(f"scales are {dtypes}: a runtime that computes in {seen.dtype} rounds them to it")
        ignored: NameRules[bool] = NameRules(False)
        try:
            for entry in self.kept(seen.config):
                ignored.add(entry, True)
            targets = _groups(seen.config, alone=False)
        except ValueError:
            return faults, notes  # patterns that are not run: what they match is not known
        if left := [name for name in seen.kept if not ignored.get(name) and targets.get(name)]:
            faults.append(
                f"{some(left)}: neither quantized nor in the config's ignore, so runtimes look for packed weights there"
            )
        if denied := [name for name in seen.layers if ignored.get(name)]:
            faults.append(
                f"{some(denied)}: quantized, and in the config's ignore, so runtimes look for {denied[0]}.weight"
            )
        return faults, notes

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        experts, ordered = bool(facts.experts), facts.ordered
        readable = facts.by_scheme(lambda scheme: _transformers(scheme, ordered, experts))
        transformers = Loading(readable, "compressed-tensors")
        if not all(scheme.symmetric for scheme in facts.schemes.values()):
            transformers = replace(
                transformers,
                arguments="quantization_config=CompressedTensorsConfig(dequantize=True)",
                imports="CompressedTensorsConfig",
            )
        embeddings: list[Reason] = [_VLLM_EMBEDDINGS] if facts.embeddings else []
        on_cuda: Reason = ("limited", "its builder reads compressed-tensors for CUDA alone (-e cuda)")
        several: list[Reason] = []
        if len(set(facts.schemes.values())) > 1:
            several.append(("no", "its converter reads one config group only"))
        caches = _caches(facts.cache) if facts.cache else {}
        if facts.cache:
            transformers = replace(transformers, reasons=[*transformers.reasons, caches["transformers"]])
        vllm = [*embeddings, *facts.by_scheme(lambda scheme: _vllm(scheme, experts, ordered))]
        sglang = facts.by_scheme(lambda scheme: _sglang(scheme, ordered))
        llamacpp = [*several, *facts.by_scheme(lambda scheme: _llamacpp(scheme, ordered))]
        for name, reasons in (("vLLM", vllm), ("SGLang", sglang), ("llama.cpp", llamacpp)):
            reasons += [caches[name]] if name in caches else []
        return {
            "transformers": transformers,
            "vLLM": Loading(vllm),
            "SGLang": Loading(sglang),
            "llama.cpp": Loading(llamacpp),
            "MLX": Loading([("no", "mlx-lm does not know the names of compressed-tensors' tensors")]),
            "ORT GenAI": Loading([on_cuda], serve=GENAI_BUILDER.format(device="cuda")),
            "TensorRT-LLM": Loading([("unknown", "its documents do not name compressed-tensors")]),
        }

    def fast_kernel(self, scheme: Scheme) -> bool:
        return is_packed_integer(scheme) and (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric))

    def input_multiple(self, scheme: Scheme, cut: bool) -> int:
        return _PER_WORD if cut and is_packed_integer(scheme) else 1


@cache
def _is_packed(scheme: Scheme) -> bool:
    """Whether a layer's codes lie packed: as those of int8-dynamic, whose inputs are quantized, too, do not."""
    return is_packed_integer(Scheme(scheme.weight)) and (scheme.activations is None or scheme.joined)


def _transformers(scheme: Scheme, ordered: bool, experts: bool) -> Iterator[Reason]:
    if _float4(scheme):
        yield "limited", "in bfloat16 only; its weights become floats at the first forward, so memory is not saved"
        if experts:
            yield "unknown", "experts of 4-bit floats were not tried"
    elif _is_float(scheme) and scheme.activations is None and not experts:
        yield "yes", "its weights become floats at the first forward, so memory is not saved"
    elif not is_packed_integer(scheme):
        if experts:
            yield "no", "it stops at experts whose elements are plain: it joins their weights, and not their scales"
        elif scheme.activations is None:
            yield "unknown", "whether it reads these plain elements was not tried"
        else:
            yield "yes", "its weights become floats at the first forward, so memory is not saved"
    elif ordered:
        yield "no", "compressed-tensors 0.20 removed actorder 'group'; `bitpress convert` to gptq keeps the weights"
    elif not scheme.symmetric:
        yield (
            "limited",
            "asymmetric: it loads with quantization_config=CompressedTensorsConfig(dequantize=True) only; "
            "without it from_pretrained stops at the shape of the zero points",
        )


def _is_float(scheme: Scheme) -> bool:
    """Whether a layer is stored as plain floats of 8 bits."""
    return _kind(scheme) == "float-quantized"


def _vllm(scheme: Scheme, experts: bool, ordered: bool) -> Iterator[Reason]:
    if _float4(scheme):
        if experts:
            yield "unknown", "experts of 4-bit floats with inputs left alone were not tried"
        yield "limited", "by Marlin, inputs left alone (NVFP4 from compute capability 7.5, MXFP4 from 8.0)"
        yield ON_GPUS
    elif _is_float(scheme):
        block = scheme.weight.description().strategy == "block"
        if scheme.activations is None:
            if experts:
                yield "no", "its FP8 experts need inputs in FP8, too"
            yield "limited", "by Marlin: inputs are left alone, and the units for FP8 are not used"
            yield ON_GPUS
        else:
            yield "yes", "on GPUs from compute capability 8.9 in FP8; on 7.5 to 8.8 by Marlin, inputs left alone"
            if block or experts:
                yield WITH_AMX
    elif not is_packed_integer(scheme):
        if scheme.activations is None:
            yield "unknown", "plain elements with inputs left alone are not documented"
        elif _is_packed(scheme):
            yield "limited", "its Humming kernels run this on GPUs from compute capability 7.5; it was not tried"
        elif experts and scheme.static:
            yield "no", "it has no experts whose inputs are rounded by stored scales; it has them of int8-dynamic"
        elif scheme.shifts_inputs:
            if experts:
                yield "unknown", "experts whose inputs have zero points were not tried"
            yield "yes", "on NVIDIA's GPUs and CPUs; its kernel for AMD's GPUs knows no zero points of inputs"
        elif experts:
            yield WITH_AMX
    else:
        if not scheme.symmetric and experts:
            yield "no", "its experts must be symmetric (issue 39980)"
        if ordered:
            yield "no", "it refuses actorder 'group', and act-order in GPTQ's format, too, since 0.32"
        if scheme.bits not in _MARLIN_BITS or (scheme.bits == 8 and not scheme.symmetric):
            yield "yes", "its Humming kernels run this, which older releases do not have"
        if scheme.bits != 4:
            yield ON_GPUS
        elif experts:
            yield WITH_AMX


def _caches(cache: CacheType) -> dict[str, Reason]:
    """What runtimes make of a quantized key-value cache."""
    described = cache.description()
    if (described["type"], described["num_bits"]) != ("float", 8) or cache.dynamic:
        why = f"it stops at a key-value cache of {cache.name}: it has 8-bit floats with stored scales"
        vllm: Reason = ("no", why)
    elif described["strategy"] == "attn_head":
        why = "the cache's scales of heads count with FlashAttention alone; on a CPU the largest is for all"
        vllm = ("limited", why)
    else:
        why = "it keeps keys and values in FP8 by the stored scales; on a CPU it cuts bits off, and rounds not"
        vllm = ("yes", why)
    known = "it rounds keys and values by the stored scales, and keeps numbers, as bitpress does"
    unknown = f"whether compressed-tensors rounds a key-value cache to {cache.name} was not tried"
    return {
        "transformers": ("unknown", unknown) if cache.dynamic else ("yes", known),
        "vLLM": vllm,
        "SGLang": ("unknown", "whether it reads the key-value cache's stored scales was not tried"),
        "llama.cpp": ("limited", "its converter leaves the cache's scales out; -ctk and -ctv round by its own rule"),
    }


def _llamacpp(scheme: Scheme, ordered: bool) -> Iterator[Reason]:
    if named := _float4(scheme):
        if len(named[1]) == 2:
            yield "unknown", "its converter moves gpt-oss's MXFP4 as it is; whether it reads this layout was not tried"
        else:
            yield "yes", "its converter moves the codes as they are"
        return
    if is_packed_integer(scheme):
        if scheme.group_size is None:
            yield "no", "its converter reads packed weights in groups, not per channel"
        elif ordered or not scheme.symmetric:
            yield "unknown", "whether its converter reads zero points or actorder 'group' was not tried"
    elif scheme.activations is None:
        yield "unknown", "plain elements with inputs left alone were not tried"
    yield "limited", "its converter dequantizes the layers; quantized again, they are other weights than these"


def _sglang(scheme: Scheme, ordered: bool) -> Iterator[Reason]:
    if _float4(scheme) or (_is_float(scheme) and scheme.activations is None):
        yield "unknown", "floats with inputs left alone are not documented"
        return
    if not is_packed_integer(scheme):
        if scheme.activations is None:
            yield "unknown", "plain elements with inputs left alone are not documented"
        elif scheme.static:
            yield "yes", "it rounds each token's inputs by a scale of their own, and leaves the stored one unused"
        elif scheme.shifts_inputs:
            yield "yes", "it rounds each token's inputs without a zero point"
        return
    if scheme.bits not in _MARLIN_BITS:
        yield "unknown", f"{scheme.bits} bits are not documented"
    if not scheme.symmetric:
        yield "limited", "asymmetric: releases since pull request 25292 (May 2026)"
    if ordered:
        yield "unknown", "actorder 'group' is not documented"


@cache
def _has_elements(scheme: Scheme) -> bool:
    """Whether a weight's elements can be stored as they are, and the scheme read back from the config."""
    weight, shape = scheme.weight, (32, scheme.weight.description().group_size or 32)
    try:
        again = Scheme.from_description(weight.description(), _inputs(scheme))
    except ValueError:
        return False
    return (
        again == scheme and weight.elements(shape, weight.random(shape, torch.Generator().manual_seed(0))) is not None
    )


def _float4(scheme: Scheme) -> tuple[str, Mapping[str, str]] | None:
    """What _FLOAT4 says of weights that are floats of 4 bits, inputs left alone; None for others."""
    described = scheme.weight.description()
    if scheme.activations is not None or (described.type, described.num_bits) != ("float", 4):
        return None
    named = _FLOAT4.get((described.strategy, described.group_size))
    layout = scheme.weight.layout((1, 32))
    fits = named and set(layout) == set(named[1]) and layout["codes"] == ((1, 16), (torch.uint8,))
    return named if fits else None


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    return scheme.activations.description() if scheme.activations else None


def _differences(inputs: Mapping[str, Any], served: Mapping[str, Any]) -> str:
    """The keys of input_activations, and their values, that are not those of the type that would run; "" if none."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    stated = {key: value for key, value in inputs.items() if key not in _WITHOUT_EFFECT and value is not None}
    own = defaults | dict(served)
    odd = {key: value for key, value in (defaults | stated).items() if key not in own or own[key] != value}
    return ", ".join(f"{key} {value!r}" for key, value in odd.items())


def _kind(scheme: Scheme) -> str:
    """What the format is called of a layer of this scheme."""
    described = scheme.weight.description()
    if _is_packed(scheme):
        return _PACKED
    if packed_float := _float4(scheme):
        return packed_float[0]
    if described.num_bits == 8 and described.type in ("int", "float"):
        return f"{described.type}-quantized"
    return "int-quantized" if described.type == "int" else "naive-quantized"


def _weights(scheme: Scheme) -> dict[str, Any]:
    described = scheme.weight.description()
    square = described.strategy == "block"
    weights = {
        "num_bits": described.num_bits,
        "type": described.type,
        "symmetric": described.symmetric,
        "strategy": described.strategy,
        "group_size": None if square else described.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": [described.group_size, described.group_size] if square else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if not _float4(scheme):
        return weights
    (dtype,) = scheme.weight.layout((1, 32))["scales"][1]  # vLLM tells MX formats by it
    return weights | {"scale_dtype": str(dtype)}


def _groups(config: dict[str, Any], alone: bool = True) -> NameRules[dict[str, Any]]:
    """The config group of each layer, by its name. Names and patterns go before classes of modules.

    Args:
        alone: a single group counts for every layer, whatever its targets.
    Raises:
        ValueError: they are not of their types, or a pattern is not of the kinds that are matched here.
    """
    groups = config.get("config_groups") or {}
    require(isinstance(groups, dict) and bool(groups), "config_groups must hold a group at least")
    rules: NameRules[dict[str, Any]] = NameRules()
    for group in groups.values():
        require(isinstance(group, dict) and isinstance(group.get("weights"), dict), "the config group has no weights")
        targets = group.get("targets")
        if alone and len(groups) == 1:
            return NameRules(group)
        require(isinstance(targets, list), f"targets is {targets!r}, expected a list")
        for target in targets:
            require(isinstance(target, str), f"the target {target!r} is not a text")
            if target == "Linear":
                rules.otherwise = rules.otherwise or group
            else:
                rules.add(target, group)
    return rules


def _each(rules: NameRules[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if rules.otherwise:
        yield rules.otherwise
    yield from rules.names.values()
    yield from (group for _, group in rules.patterns)


def _scheme(group: dict[str, Any], kind: str) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    actorder = weights.get("actorder")
    require(actorder in (*_SCATTERED, *_IN_PLACE), f"actorder {actorder!r} is not supported")
    bits, symmetric, strategy = weights["num_bits"], weights.get("symmetric", True), weights.get("strategy")
    size = weights.get("group_size") if strategy in ("group", "tensor_group", "block") else None
    if strategy == "block" and (block := weights.get("block_structure")) is not None:
        require(
            isinstance(block, list) and len(block) == 2 and block[0] == block[1],
            f"block_structure is {block!r}; squares such as [128, 128] are read",
        )
        size = block[0]
    require(type(bits) is int, f"bits is {bits!r}, expected a whole number")
    require(size is None or type(size) is int, f"group_size is {size!r}, expected a whole number")
    require(isinstance(symmetric, bool), f"symmetric is {symmetric!r}, expected true or false")
    require(inputs is None or isinstance(inputs, dict), f"input_activations is {inputs!r}, expected an object")
    require(
        inputs is None or kind == _PACKED or not kind.endswith(_PACKED),
        "quantized activations with packed weights are not supported",
    )
    require(not weights.get("dynamic"), f"weights that are dynamic ({weights.get('dynamic')!r}) are not supported")
    require(not group.get("output_activations"), "quantized outputs (output_activations) are not supported")
    described = WeightDescription(str(weights.get("type", "int")), bits, str(strategy), size, symmetric)
    try:
        scheme = Scheme.from_description(described, inputs)
        if inputs is not None and (other := _differences(inputs, _inputs(scheme) or {})):
            raise ValueError(f"input_activations with {other} are not supported")
        return scheme
    except ValueError as error:
        what = f"weights of type {weights.get('type')!r}, strategy {strategy!r}"
        if kind in _PLAIN:
            what = (
                f"{kind} is read for 8-bit channel weights with dynamic per-token activations, and for the types of "
                f"weights that bitpress has: {what}"
            )
        raise ValueError(f"{what}: {error}") from error


def _read_packed(scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
    stored = tensors["weight_shape"]
    require(
        stored.dtype in (torch.int64, torch.int32) and stored.shape == (2,) and bool((stored > 0).all()),
        f"weight_shape is {stored}, expected two positive whole numbers",
    )
    shape = stored.tolist()
    zeros = None
    if (points := tensors.get(_ZEROS)) is not None:
        zeros = _zero_codes(scheme, points, (shape[0], groups_of(scheme, shape[1])))
        if scheme.symmetric:
            _require_no_zeros(zeros, middle_code(scheme))
            zeros = None
    codes, order = tensors["weight_packed"], None
    if (g_idx := tensors.get(_ORDER)) is not None:
        require(list(g_idx.shape) == shape[1:], f"{_ORDER} has shape {list(g_idx.shape)}, expected {shape[1:]}")
        order = read_order(_ORDER, g_idx, scheme)
        codes = gather_codes(codes, order, scheme.bits)
    return QTensor(scheme, (shape[0], shape[1]), codes, tensors["weight_scale"], zeros, order=order)


def _read_float4(scheme: Scheme, tensors: dict[str, Tensor], names: Mapping[str, str]) -> QTensor:
    extra = sorted(tensors.keys() - set(names.values()))
    require(not extra, f"{', '.join(extra)} does not belong to a layer of {scheme.name}")
    codes = tensors["weight_packed"]
    require(codes.dim() == 2, f"weight_packed has shape {list(codes.shape)}, expected two dimensions")
    shape = (codes.shape[0], 2 * codes.shape[1])
    return QTensor.of(scheme, shape, {name: tensors[suffix] for name, suffix in names.items()})


def _zero_codes(scheme: Scheme, stored: Tensor, size: tuple[int, int]) -> Tensor:
    """The zero points of packed weights as codes, uint8 [out, groups] = size.

    Args:
        stored: int32, packed along the outputs; or as early versions have them, int8 [out, groups], less the middle
            code.
    Raises:
        ValueError: they are neither, or out of range.
    """
    if stored.dtype == torch.int8:
        require(stored.shape == size, f"{_ZEROS} has shape {list(stored.shape)}, expected {list(size)}")
        middle = middle_code(scheme)
        low, high = (int(limit) for limit in stored.aminmax())
        require(-middle <= low and high < middle, f"{_ZEROS} holds {low}..{high}, expected {-middle}..{middle - 1}")
        return (stored.to(torch.int16) + middle).to(torch.uint8)
    packed = (words(size[0], scheme.bits), size[1])
    require(stored.dtype == torch.int32, f"{_ZEROS} has dtype {stored.dtype}, expected torch.int32")
    require(stored.shape == packed, f"{_ZEROS} has shape {list(stored.shape)}, expected {list(packed)}")
    return unpack(stored.t(), scheme.bits, size[0]).t().contiguous()


def _require_no_zeros(zeros: Tensor, nothing: int) -> None:
    """Raise ValueError where zero points beside symmetric weights are not `nothing`: they would shift the weights."""
    if shifted := int((zeros != nothing).sum()):
        raise ValueError(f"{_ZEROS} does not belong to a symmetric scheme: {shifted} of {zeros.numel()} are not zero")


def _read_plain(scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
    weight, zeros = tensors["weight"], tensors.get(_ZEROS)
    require(weight.dim() == 2, f"weight has shape {list(weight.shape)}, expected two dimensions")
    if zeros is not None and scheme.symmetric:
        _require_no_zeros(zeros, 0)
        zeros = None
    shape = (weight.shape[0], weight.shape[1])
    if problems := scheme.problems(shape):
        raise ValueError(problems[0])
    own = scheme.weight.from_elements(shape, weight, tensors["weight_scale"], zeros)
    inputs = {name: tensors[name].reshape(-1) for name in (scheme.static.layout() if scheme.static else ())}
    return QTensor.of(scheme, shape, own | inputs)


PLUGINS = (CompressedTensors(),)
