"""MLX's affine format, which mlx-lm and LM Studio run on Macs.

Per layer: weight uint32 [out, in * bits / 32], codes packed along the inputs; scales and biases [out, groups], of one
floating-point dtype. A weight is scale * code + bias. Ours are scale * (code - zero point), so that a bias is minus the
zero point times its scale.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import NumericsError
from .base import (
    Facts,
    Format,
    Loading,
    Reason,
    SchemeRules,
    integer_scheme,
    is_packed_integer,
    middle_code,
    require,
)
from .names import NameRules

_BITS = (2, 3, 4, 8)
_GROUPS = (32, 64, 128)
_MODE = "affine"
_SECTION = "quantization"  # where MLX looks in config.json
# Keys of our own, in quantization_config: MLX's section has no place for them.
_SYMMETRIC = "symmetric"
_LAYERS = "layers"


class MLXAffine(Format):
    """Integers in groups, each layer by its own scheme; embeddings, too."""

    name = "mlx"
    rank = 60
    quant_method = "mlx"
    tags: ClassVar[tuple[str, ...]] = (_MODE,)
    hf_methods = ("mlx",)
    marker = "biases"
    suffixes = ("weight", "scales", "biases")
    holds_embeddings = True
    convertible = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if not is_packed_integer(scheme) or scheme.bits not in _BITS or scheme.group_size not in _GROUPS:
            sizes = ", ".join(map(str, _GROUPS))
            return [f"{self.name} holds weight-only integers in groups of {sizes}, not {scheme.name}"]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """One of 16 bits: MLX adds products in float32, which holds those of such scales exactly."""
        return dtype if scheme.symmetric and dtype.itemsize == 2 else torch.float16

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Scales beside zero points are stored as float32, which holds their products exactly.

        Raises:
            NumericsError: scales of float32 whose products it does not hold.
        """
        assert qtensor.order is None, "holds_order says that this format has no place for it"
        scales = qtensor.scales
        if qtensor.zeros is None:
            biases = scales * -middle_code(qtensor.scheme)
        else:
            exact = -(qtensor.zeros.to(torch.float64) * scales.to(torch.float64))
            scales, biases = scales.to(torch.float32), exact.to(torch.float32)
            if not torch.equal(biases.to(torch.float64), exact):
                raise NumericsError(
                    f"{self.name} stores zero points times their scales as float32, which rounds some of these: the "
                    "scales are float32 numbers; use format compressed-tensors, or quantize again"
                )
        return {"weight": qtensor.codes.contiguous().view(torch.uint32), "scales": scales, "biases": biases}

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        weight, scales, biases = (tensors[suffix] for suffix in self.suffixes)
        for name, tensor in tensors.items():
            require(tensor.dim() == 2, f"{name} has {tensor.dim()} dimensions, expected 2")
        require(weight.dtype == torch.uint32, f"weight has dtype {weight.dtype}, expected torch.uint32")
        require(scales.is_floating_point(), f"scales have dtype {scales.dtype}, expected a floating-point one")
        same = (scales.shape, scales.dtype) == (biases.shape, biases.dtype)
        require(same, f"biases are {biases.dtype} {list(biases.shape)}, scales {scales.dtype} {list(scales.shape)}")
        shape, zeros = (weight.shape[0], scales.shape[1] * (scheme.group_size or 0)), None
        if scheme.symmetric:
            zero = middle_code(scheme)
            require(torch.equal(biases, scales * -zero), f"biases are not scales times -{zero} everywhere")
        else:
            wide, exact = scales.to(torch.float64), biases.to(torch.float64)
            codes = (-exact / wide).round().nan_to_num(-1)
            whole = bool(((codes >= 0) & (codes <= scheme.max_code) & (exact == -codes * wide)).all())
            require(
                whole, "biases are not whole zero points times their scales, which are the ones that bitpress reads"
            )
            zeros, half = codes.to(torch.uint8), scales.to(torch.float16)
            scales = half if torch.equal(half.to(scales.dtype), scales) else scales
        return QTensor(scheme, shape, weight.view(torch.int32), scales, zeros)

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, ordered: bool = False
    ) -> dict[str, Any]:
        """The settings of most layers, and under "layers" those of layers that differ. The files tell what is kept."""
        base = Counter(schemes.values()).most_common(1)[0][0]
        others = {layer: _settings(scheme) for layer, scheme in schemes.items() if scheme != base}
        config = {"quant_method": self.quant_method, "mode": _MODE, **_settings(base)}
        return config | ({_LAYERS: others} if others else {})

    def config_keys(self, section: Mapping[str, Any]) -> dict[str, Any]:
        layers = {name: _for_mlx(own) for name, own in section.get(_LAYERS, {}).items()}
        return {_SECTION: {**_for_mlx(section), **layers}}

    def section_of(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """MLX's own section, where the other one does not say whose it is."""
        own, other = config.get(_SECTION), config.get("quantization_config")
        if not isinstance(own, dict) or (isinstance(other, dict) and "quant_method" in other):
            return None
        layers = {name: value for name, value in own.items() if isinstance(value, dict)}
        return {"quant_method": self.quant_method, **own, _LAYERS: layers}

    def scheme_rules(self, config: dict[str, Any]) -> SchemeRules:
        layers = config.get(_LAYERS, {})
        require(isinstance(layers, dict), f"{_LAYERS} is {layers!r}, expected an object")
        for name, own in layers.items():
            require(isinstance(own, dict), f"{_LAYERS} gives {name} {own!r}, expected an object")
        return NameRules(_scheme(config), {name: _scheme(config | own) for name, own in layers.items()})

    def runtimes(self, facts: Facts) -> dict[str, Loading]:
        refused: list[Reason] = [("no", "it does not read MLX's format")]
        others = ("transformers", "GPTQModel", "vLLM", "SGLang", "llama.cpp", "ORT GenAI", "TensorRT-LLM")
        return {name: Loading(refused) for name in others} | {"MLX": Loading(facts.by_scheme(_mlx))}


def _mlx(scheme: Scheme) -> Iterator[Reason]:
    if not scheme.symmetric:
        yield "limited", "scales beside zero points are float32, so that they stay exact, and it computes in float32"


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, _SYMMETRIC: scheme.symmetric}


def _for_mlx(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"group_size": settings["group_size"], "bits": settings["bits"], "mode": _MODE}


def _scheme(config: Mapping[str, Any]) -> Scheme:
    mode = config.get("mode", _MODE)
    require(mode == _MODE, f"mode {mode!r} is not supported, only {_MODE!r}")
    require(config.get("group_size") is not None, "group_size is missing")
    return integer_scheme(config.get("bits"), config["group_size"], config.get(_SYMMETRIC, False))


PLUGINS = (MLXAffine(),)
