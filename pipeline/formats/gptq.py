"""GPTQ's format, versions 1 and 2: the layout that AutoGPTQ began and GPTQModel, vLLM, SGLang and transformers load.

Per layer: qweight int32 [ceil(in * bits / 32), out], codes packed along the inputs; qzeros int32
[groups, ceil(out * bits / 32)], zero points packed along the outputs, in version 1 MINUS ONE; scales float16
[groups, out]; g_idx int32 [in], the group of each input feature, which some writers leave out without act-order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import listing
from ..storage.checkpoint import Checkpoint
from .act_order import gather_codes, read_order, scatter_codes, write_groups
from .base import (
    HEAD_IS_ROUNDED,
    ON_GPUS,
    WITH_AMX,
    Examination,
    Facts,
    Format,
    Loading,
    Reason,
    SchemeRules,
    counted,
    integer_scheme,
    is_packed_integer,
    middle_code,
    require,
    some,
)  # fmt: skip
from .names import NameRules, exactly, fused_unit, name_pattern, patterns_of

_BITS = (2, 3, 4, 8)
_MARLIN_BITS = (4, 8)
# of optimum 2.3, gptq/constants.py: how the names of decoder blocks begin
_OPTIMUM_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
)
_PER_WORD = 32  # every bit width packs a multiple of 32 codes into whole words
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a word with a 1 in the place of every code
_SIDE_FILE = "quantize_config.json"
_ORDER = "g_idx"
_HEAD = "lm_head"  # its readers leave it alone unless "lm_head" is true


class GPTQ(Format):
    """Version 1; symmetric only, because a stored zero point of -1 runs into its neighbour's bits."""

    name = "gptq"
    rank = 10
    quant_method = "gptq"
    tags: ClassVar[tuple[str, ...]] = ("gptq",)
    hf_methods = ("gptq",)
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", _ORDER)
    holds_order = True
    exact_scales = True
    convertible = True
    config_copies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        _SIDE_FILE: ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    }
    output_multiple = _PER_WORD
    offset: ClassVar[int] = 1  # what zero points are stored minus

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if not is_packed_integer(scheme) or scheme.bits not in _BITS:
            return [f"{self.name} holds weight-only integers, not {scheme.name}"]
        if self.offset and not scheme.symmetric:
            return [
                f"{self.name} version 1 cannot hold a zero point of 0; use format compressed-tensors"
                " or, for runtimes that read it, gptq-v2"
            ]
        if any(size % _PER_WORD for size in shape):
            return [
                f"{self.name} needs multiples of {_PER_WORD}, got shape {list(shape)}; use format compressed-tensors"
            ]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        assert not (self.offset and qtensor.zeros is not None), "problems() refuses what would wrap around below"
        out_features, in_features = qtensor.shape
        scheme, groups = qtensor.scheme, qtensor.scales.shape[1]
        zeros = torch.full((groups, out_features), middle_code(scheme), dtype=torch.uint8)
        if qtensor.zeros is not None:
            zeros = qtensor.zeros.t()
        return {
            "qweight": scatter_codes(qtensor.codes, qtensor.order, scheme.bits).t().contiguous(),
            "qzeros": pack(zeros - self.offset, scheme.bits),
            "scales": qtensor.scales.t().contiguous(),
            "g_idx": write_groups(qtensor.order, in_features, groups),
        }

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
        g_idx = tensors.get(_ORDER)  # where it is left out, inputs lie as in the model: see missing_tensors
        parts = [qweight, qzeros, scales] if g_idx is None else [qweight, qzeros, scales, g_idx]
        ranks = [tensor.dim() for tensor in parts]
        require(
            ranks == [2, 2, 2, 1][: len(parts)],
            f"{', '.join(self.suffixes)} have {ranks} dimensions, expected [2, 2, 2, 1]",
        )
        out_features = scales.shape[1]
        in_features = qweight.shape[0] * 32 // scheme.bits if g_idx is None else g_idx.numel()
        order = None if g_idx is None else read_order(_ORDER, g_idx, scheme)
        require(qzeros.dtype == torch.int32, f"qzeros has dtype {qzeros.dtype}, expected torch.int32")
        size = (scales.shape[0], words(out_features, scheme.bits))
        require(qzeros.shape == size, f"qzeros has shape {list(qzeros.shape)}, expected {list(size)}")
        zeros = None
        if scheme.symmetric:
            _stored_zero(scheme, qzeros, out_features)
        else:
            zeros = self._zeros(qzeros, scheme.bits, out_features).t().contiguous()
        codes = gather_codes(qweight.t(), order, scheme.bits)  # a view: transposing takes longer than reading
        return QTensor(scheme, (out_features, in_features), codes, scales.t().contiguous(), zeros, order=order)

    def _zeros(self, qzeros: Tensor, bits: int, out_features: int) -> Tensor:
        """uint8 [groups, out]. Version 1's writers subtract from whole words, so a borrow is undone by adding to them.

        3-bit codes straddle words; they were subtracted from one by one.
        """
        if self.offset and bits in _ONES:
            qzeros = qzeros + _ONES[bits]
        zeros = unpack(qzeros, bits, out_features)
        return (zeros + 1) & 7 if self.offset and bits == 3 else zeros

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """The settings of most layers, and under "dynamic" the layers that differ: "-:" is left alone, "+:" has other
        settings. The first pattern that matches counts; vLLM tries them on the names of fused layers."""
        base = Counter(schemes.values()).most_common(1)[0][0]
        head = any(layer.rpartition(".")[2] == _HEAD for layer in schemes)
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.tags[0],
            **_settings(base, ordered),
            "lm_head": head,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["bitpress"]},
        }
        dynamic: dict[str, dict[str, Any]] = {}
        inside = [name for name in kept if name != _HEAD]
        for name in [*inside, *_whole_units(dict.fromkeys(inside, None), schemes)]:
            dynamic[f"-:{name[3:] if name.startswith('re:') else exactly(name)}"] = {}
        every = {*schemes, *kept}
        for scheme in dict.fromkeys(schemes.values()):
            if scheme == base:
                continue
            layers = [layer for layer, own in schemes.items() if own == scheme]
            others = {name for name in every if schemes.get(name) != scheme}
            own = dict.fromkeys(layers, scheme)
            units = _whole_units(own, {name: schemes.get(name) for name in others})
            for pattern in patterns_of([*layers, *units], [*others, *map(fused_unit, others)]):
                dynamic[f"+:{pattern}"] = _settings(scheme, ordered)
        return config | {"dynamic": dynamic} if dynamic else config

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        require(version in self.tags, f"checkpoint_format {version!r} is not supported, only 'gptq' and 'gptq_v2'")
        settings = _layer_settings(config)
        return NameRules(
            _scheme(config),
            {name: _scheme(own) for name, own in settings.names.items()},
            [(pattern, _scheme(own)) for pattern, own in settings.patterns],
        )

    def missing_tensors(self, config: dict[str, Any], layers: Iterable[str], names: Iterable[str]) -> str | None:
        present, every = set(names), list(layers)
        lost = [name for layer in every if (name := f"{layer}.{_ORDER}") not in present]
        if lost and len(lost) < len(every):
            return f"{_ORDER} is missing, which other layers have; get the checkpoint again:\n{listing(lost)}"
        settings = _layer_settings(config)
        for layer in every if lost else ():
            own = settings.get(layer) or {}
            if own.get("desc_act") is True and own.get("group_size") != -1:
                return (
                    f"desc_act is true, and {_ORDER} is missing (of {layer}, for one), which says of what group each "
                    "input is; get the checkpoint again"
                )
        return None

    def kept(self, config: dict[str, Any]) -> list[str]:
        names = [] if config.get("lm_head") is True else [_HEAD]
        for pattern in (key[2:] for key in _dynamic(config) if key.startswith("-:")):
            literal = _literal(pattern)
            names.append(f"re:{pattern}" if literal is None else literal)
        return names

    def observe(self, checkpoint: Checkpoint, layer: str, qtensor: QTensor) -> int | None:
        """The zero point that a symmetric layer stores."""
        if not qtensor.scheme.symmetric:
            return None
        return _stored_zero(qtensor.scheme, checkpoint.read(f"{layer}.qzeros"), qtensor.shape[0]) or 0

    def diagnose(self, seen: Examination) -> tuple[list[str], list[str]]:
        faults, notes = [], []
        wrong = [
            name
            for name, layer in seen.layers.items()
            if layer.observation is not None and layer.observation != middle_code(layer.scheme) - self.offset
        ]
        if wrong:
            faults.append(
                f"tagged {self.tags[0]}, but version {2 if self.offset else 1}'s zero points are in {some(wrong)}: "
                "who goes by the tag computes every weight one step off; bitpress reads them right, and "
                f"`bitpress convert --to {self.name}` writes them right"
            )
        if seen.ordered and seen.config.get("desc_act") is not True:
            faults.append(
                f"the config denies desc_act, but g_idx is out of order in {some(seen.ordered)}: who goes by the "
                f"config pairs weights with other groups' scales; `bitpress convert --to {self.name}` mends that"
            )
        grouped = any(layer.scheme.group_size for layer in seen.layers.values())
        if seen.config.get("desc_act") is True and not seen.ordered and grouped:
            notes.append(
                "the config says desc_act, but every g_idx is in order: vLLM refuses such a config, and elsewhere a "
                "slower kernel may run for nothing; write false there"
            )
        if _HEAD in seen.layers and seen.config.get("lm_head") is not True:
            faults.append("lm_head is quantized, and the config denies it, so runtimes look for lm_head.weight")
        if left := _not_among(seen.unquantized(_HEAD), self.kept(seen.config)):
            faults.append(
                f"{some(left)}: neither quantized nor in the config's dynamic, so runtimes look for packed weights"
                " there"
            )
        if seen.scale_dtypes not in ([], ["float16"]):
            notes.append(f"scales are {' and '.join(seen.scale_dtypes)}, where GPTQ has float16")
        return faults, notes

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        odd = [layer for layer, shape in facts.shapes.items() if any(size % _PER_WORD for size in shape)]
        why = f"features are no multiples of {_PER_WORD}, as many of its kernels need"
        own: list[Reason] = [("limited", counted(why, odd))] if odd else []
        ordered: list[Reason] = []
        if facts.ordered and any(scheme.group_size for scheme in facts.schemes.values()):
            ordered.append(("no", "it refuses act-order (desc_act) with groups since 0.32; older releases read it"))
        several: list[Reason] = []
        if len(set(facts.schemes.values())) > 1:
            several.append(("unknown", "whether it reads the config's dynamic was not tried"))
        return {
            "transformers": Loading([*own, *_optimum(facts)], needs="optimum, gptqmodel"),
            "GPTQModel": Loading(own),
            "vLLM": Loading([*ordered, *facts.by_scheme(lambda scheme: self._vllm(scheme, bool(facts.experts)))]),
            "SGLang": Loading(facts.by_scheme(lambda scheme: self._sglang(scheme, bool(facts.experts)))),
            "llama.cpp": Loading([*several, *facts.by_scheme(self._llamacpp)]),
            "MLX": Loading([("no", "mlx-lm refuses GPTQ files with g_idx, and takes those without it for AWQ's")]),
            "ORT GenAI": Loading([*several, *facts.by_scheme(lambda scheme: self._genai(scheme, facts.ordered))]),
            "TensorRT-LLM": Loading(
                [("unknown", "its documents name GPTQ of 4 bits, and files like these were not tried")]
            ),
        }

    def _vllm(self, scheme: Scheme, experts: bool) -> Iterator[Reason]:
        if not scheme.symmetric or scheme.bits not in _MARLIN_BITS:
            yield (
                "no",
                "its GPTQ loader takes symmetric layers of 4 and 8 bits alone; `bitpress convert --to "
                "compressed-tensors` makes what it loads",
            )
        elif scheme.bits != 4:
            yield ON_GPUS
        elif experts:
            yield WITH_AMX

    def _llamacpp(self, scheme: Scheme) -> Iterator[Reason]:
        if scheme.bits == 3:
            yield "no", "its converter reads GPTQ of 2, 4 and 8 bits"
        elif not scheme.symmetric and self.offset:
            yield "unknown", "whether its converter undoes the borrow of version 1's zero points was not tried"
        else:
            yield "limited", "its converter dequantizes the layers; quantized again, they are other weights than these"

    def _genai(self, scheme: Scheme, ordered: bool) -> Iterator[Reason]:
        if not self.offset:
            yield (
                "no",
                "its builder adds 1 to zero points whatever checkpoint_format says, and every weight is a step off, "
                "without a word" + ("; `bitpress convert --to gptq` writes what it reads" if scheme.symmetric else ""),
            )
        elif scheme.bits == 3:
            yield "no", "its builder reads GPTQ of 2, 4 and 8 bits"
        elif not scheme.symmetric:
            yield "unknown", "whether its builder undoes the borrow of version 1's zero points was not tried"
        else:
            yield HEAD_IS_ROUNDED
        if ordered:
            yield "unknown", "whether its builder follows g_idx was not tried"

    def _sglang(self, scheme: Scheme, experts: bool) -> Iterator[Reason]:
        if not scheme.symmetric and self.offset:
            yield "unknown", "whether it undoes the borrow of version 1's zero points is not documented"
        elif not scheme.symmetric or scheme.bits not in _MARLIN_BITS:
            yield "limited", "only its plain GPTQ kernel runs this, in float16; Marlin's takes symmetric 4 and 8 bits"
        if experts and (not scheme.symmetric or scheme.bits not in _MARLIN_BITS):
            yield "no", "its plain GPTQ kernel has no experts"

    def fast_kernel(self, scheme: Scheme) -> bool:
        return scheme.symmetric and scheme.bits in _MARLIN_BITS

    def input_multiple(self, scheme: Scheme, cut: bool) -> int:
        return _PER_WORD

    def side_files(self, section: dict[str, Any]) -> dict[str, Any]:
        return {_SIDE_FILE: section}


class GPTQv2(GPTQ):
    """Version 2: zero points as they are, so asymmetric layers too."""

    name = "gptq-v2"
    rank = 40
    tags = ("gptq_v2",)
    offset = 0


def _stored_zero(scheme: Scheme, qzeros: Tensor, out_features: int) -> int | None:
    """The one zero point that a symmetric layer stores, whatever version its file claims; None without groups.

    Some files are tagged version 1 and hold version 2's zeros, or the reverse. Symmetric zeros are known, so
    either is read right.

    Raises:
        ValueError: they differ, or are neither version's.
    """
    stored = unpack(qzeros, scheme.bits, out_features)
    expected = (middle_code(scheme) - 1, middle_code(scheme))
    limits = [int(limit) for limit in stored.aminmax()] if stored.numel() else []
    if limits not in ([], [expected[0]] * 2, [expected[1]] * 2):
        values = ", ".join(map(str, stored.unique().tolist()[:4]))
        raise ValueError(
            f"qzeros hold {values}, expected {expected[0]} (version 1) or {expected[1]} (version 2) everywhere, "
            "as the scheme is symmetric"
        )
    return limits[0] if limits else None


def _settings(scheme: Scheme, ordered: bool) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "desc_act": ordered,
    }


def _scheme(config: dict[str, Any]) -> Scheme:
    if lost := [key for key in ("bits", "group_size") if key not in config]:
        raise ValueError(f"{' and '.join(lost)} is missing")
    size = config["group_size"]
    return integer_scheme(config["bits"], None if size == -1 else size, config.get("sym", True))


def _layer_settings(config: dict[str, Any]) -> NameRules[dict[str, Any]]:
    """Each layer's settings: the config's, with what "dynamic" gives it in their place.

    Raises:
        ValueError: "dynamic" is not of its types.
    """
    rules: NameRules[dict[str, Any]] = NameRules(config)
    for pattern, own in _dynamic(config).items():
        if pattern.startswith("-:"):  # the files tell what is not quantized
            continue
        require(isinstance(own, dict), f"dynamic gives {pattern} {own!r}, expected an object")
        rules.add_pattern(pattern.removeprefix("+:"), config | own)
    return rules


def _optimum(facts: Facts) -> Iterator[Reason]:
    """What transformers cannot load, because optimum, which reads GPTQ for it, knows one setting for a whole model.

    Tried with optimum 2.3. Its convert_model makes quantized layers of all linear layers in the decoder blocks, and of
    no others. transformers has experts and their routers as plain parameters: whether those load was not tried.
    """
    if facts.blocks and not facts.blocks.startswith(_OPTIMUM_BLOCKS):
        yield "no", f"optimum finds decoder blocks by their names, and does not know {facts.blocks}"
    if len(set(facts.schemes.values())) > 1:
        yield "no", "optimum does not read the config's dynamic: it takes all layers to have one scheme"
    blocks = {block for layer in facts.schemes if (block := _path_of_blocks(layer))}
    inside = sorted(layer for layer in facts.kept if _path_of_blocks(layer) in blocks)
    if inside and not facts.experts:
        why = "optimum does not read the config's dynamic: layers that are not quantized get random packed weights"
        yield "no", counted(why, inside)
    outside = [layer for layer in facts.schemes if not _path_of_blocks(layer)]
    if blocks and outside:
        yield "no", counted("optimum quantizes layers of the decoder blocks alone", outside)


def _path_of_blocks(layer: str) -> str:
    """What stands before the first number of a layer's name, such as "model.layers"; "" where there is none."""
    parts = layer.split(".")
    return next((".".join(parts[:place]) for place, part in enumerate(parts) if part.isdecimal()), "")


def _dynamic(config: dict[str, Any]) -> dict[str, Any]:
    dynamic = config.get("dynamic") or {}
    require(isinstance(dynamic, dict), f"dynamic is {dynamic!r}, expected an object")
    return dynamic


def _literal(pattern: str) -> str | None:
    """The only name that a pattern matches; None for other patterns, those that are not read here among them."""
    try:
        return name_pattern(pattern).literal
    except ValueError:
        return None


def _whole_units(own: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The fused layers all of whose parts are among `own`."""
    split = {fused_unit(name) for name in others}
    units = dict.fromkeys(unit for name in own if (unit := fused_unit(name)) != name)
    return [unit for unit in units if unit not in split]


def _not_among(names: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The names that are not listed; [] where a pattern is not of the kinds that are matched here."""
    rules: NameRules[bool] = NameRules(False)
    try:
        for entry in kept:
            rules.add(entry, True)
    except ValueError:
        return []
    return [name for name in names if not rules.get(name)]


PLUGINS = (GPTQ(), GPTQv2())
