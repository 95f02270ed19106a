"""NVFP4: E2M1 values, an E4M3 scale for each group of 16 inputs, and one number that divides all scales of a weight.

Source: QuantizationArgs and compressors/quantized_compressors of the package compressed-tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Layout, Shape, WeightDescription
from .e2m1 import LARGEST, RATIOS, E2M1Grid, E2M1Weight, pack_e2m1, round_to_e2m1, unpack_e2m1

GROUP = 16
_LARGEST_SCALE = 448.0  # of E4M3
_SMALLEST_SCALE = 2.0**-9
_LARGEST_DIVISOR = 2.0**126  # the largest power of two whose reciprocal is a normal float32 number


def _global_scale(peak: Tensor) -> Tensor:
    """float32 [1]: with it the group of a weight's largest magnitude gets the scale 448.

    It is the reciprocal of a float32 number that is its reciprocal: files of ModelOpt and GGUF store that one. Rounded
    so twice, a number stays what it is (checked for every mantissa).
    """
    scale = (_LARGEST_SCALE * LARGEST / peak.to(torch.float32)).clamp(max=_LARGEST_DIVISOR)
    return torch.where(peak > 0, scale.reciprocal().reciprocal(), 1.0).reshape(1)


def _stored(scales: Tensor, divisor: Tensor) -> Tensor:
    """The nearest E4M3 scales of float32 ones; none is 0."""
    return (scales * divisor).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)


def _wide(scales: Tensor, divisor: Tensor) -> Tensor:
    """float32 scales of stored ones."""
    return scales.to(torch.float32) / divisor


def _by_peak(peaks: Tensor, divisor: Tensor) -> Tensor:
    """The stored scale of groups of these largest magnitudes; that of a group of zeros is 1."""
    scales = torch.where(peaks > 0, peaks / LARGEST, 1 / divisor)
    return _stored(scales, divisor)


@dataclass(frozen=True)
class _Grid(E2M1Grid):
    """See CodeGrid: the values of NVFP4 weights with this divisor, float32 [1]."""

    divisor: Tensor

    ratios: ClassVar[tuple[float, ...]] = RATIOS

    @property
    def common(self) -> dict[str, Tensor]:
        return {"global_scale": self.divisor}

    def parameters(self, reach: Tensor) -> tuple[Tensor, None]:
        return _wide(_by_peak(reach.abs().amax(-1), self.divisor), self.divisor), None

    def representable(self, scales: Tensor) -> Tensor:
        return _wide(_stored(scales, self.divisor), self.divisor)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        return {"codes": pack_e2m1(codes), "scales": _stored(scales, self.divisor)}


@dataclass(frozen=True)
class NVFP4(E2M1Weight):
    """A weight is an E2M1 value times scale / global_scale.

    codes: uint8 [out, in / 2], the even input in the low half. scales: float8_e4m3fn [out, in / 16], not negative.
    global_scale: float32 [1], 448 * 6 over the largest magnitude.

    Args:
        peak: float32 [], the largest magnitude of all layers that have one global scale in common. None: the layer has
            its own. What a type is called does not depend on it.
    """

    peak: Tensor | None = field(default=None, compare=False, repr=False)

    rank: ClassVar[int] = 50
    name: ClassVar[str] = "nvfp4"
    forms: ClassVar[str] = "nvfp4"
    examples: ClassVar[tuple[str, ...]] = ("nvfp4",)
    group: ClassVar[int] = GROUP

    def description(self) -> WeightDescription:
        return WeightDescription("float", self.bits, "tensor_group", GROUP)

    def fused(self, weights: Iterable[Tensor]) -> "NVFP4":
        """This type with the global scale that these weights have in common: servers multiply by them as by one."""
        return replace(
            self, peak=torch.stack([weight.abs().amax().to(torch.float32).cpu() for weight in weights]).amax()
        )

    def layout(self, shape: Shape) -> Layout:
        return {
            "codes": ((shape[0], shape[1] // 2), (torch.uint8,)),
            "scales": ((shape[0], shape[1] // GROUP), (torch.float8_e4m3fn,)),
            "global_scale": ((1,), (torch.float32,)),
        }

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        if bad := int((tensors["scales"].view(torch.uint8) >= 128).sum()):
            raise ValueError(f"{bad} scales are negative")
        if not (divisor := tensors["global_scale"].item()) > 0:
            raise ValueError(f"global_scale is {divisor}, expected a positive number")

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales = _wide(tensors["scales"], tensors["global_scale"])
        values = unpack_e2m1(tensors["codes"]).unflatten(1, (-1, GROUP))
        return values.mul_(scales.unsqueeze(-1)).view(shape).to(dtype)

    def factored_scales(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        return tensors["scales"].to(torch.float32), 1 / tensors["global_scale"].item()

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Each group's scale is set by its largest magnitude; `scale_dtype` does not matter."""
        groups = weight.to(torch.float32).unflatten(1, (-1, GROUP))
        divisor = self._divisor(groups)
        scales = _by_peak(groups.abs().amax(-1), divisor)
        codes = round_to_e2m1(groups / _wide(scales, divisor).unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
        return {"codes": pack_e2m1(codes.flatten(1)), "scales": scales, "global_scale": divisor}

    def grid(self, weight: Tensor, scale_dtype: torch.dtype) -> _Grid:
        return _Grid(self._divisor(weight))

    def _divisor(self, weight: Tensor) -> Tensor:
        return _global_scale(weight.abs().amax() if self.peak is None else self.peak.to(weight.device))

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        codes = torch.randint(256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator)
        scales = torch.rand(shape[0], shape[1] // GROUP, generator=generator) * 300 + 100
        divisor = _global_scale(torch.tensor(2.688))  # about 1000
        return {"codes": codes, "scales": scales.to(torch.float8_e4m3fn), "global_scale": divisor}

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {name: tensors[name][ids] for name in ("codes", "scales")} | {"global_scale": tensors["global_scale"]}


PLUGINS = (NVFP4,)
