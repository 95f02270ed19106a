"""MXFP4 (OCP Microscaling Formats v1.0): E2M1 values, and a power of two for each group of 32 inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Layout, Shape, WeightDescription
from .e2m1 import LARGEST, E2M1Grid, E2M1Weight, pack_e2m1, round_to_e2m1, unpack_e2m1

GROUP = 32
_BIAS = 127  # a scale v stands for 2^(v - 127): E8M0; 255 is NaN
_LARGEST_SCALE = 252  # with it 6 is 1.5 * 2^127; twice that is beyond float32


def _power(scales: Tensor) -> Tensor:
    """float32 scales of E8M0 ones."""
    return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.to(torch.int32) - _BIAS)


def _exponents(peaks: Tensor) -> Tensor:
    """The E8M0 scale of each largest magnitude (float32): the power of two with which it is 2 to 4 times 2.

    A magnitude with a mantissa of 1.75 or more would be rounded down to 6 by far; it counts as the next power of two,
    as in compressed-tensors (utils/mxfp_utils.py). Groups of zeros get the scale 1.
    """
    mantissa, exponent = torch.frexp(peaks)  # peak = mantissa * 2^exponent, the mantissa from 0.5 to 1
    exponent = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype)
    codes = (exponent - 2 + _BIAS).clamp_(0, _LARGEST_SCALE)
    return torch.where(peaks > 0, codes, _BIAS).to(torch.uint8)


@dataclass(frozen=True)
class _Grid(E2M1Grid):
    """See CodeGrid: the values of MXFP4 weights."""

    ratios: ClassVar[tuple[float, ...]] = (1.0, 2.0, 0.5)
    common: ClassVar[dict[str, Tensor]] = {}

    def parameters(self, reach: Tensor) -> tuple[Tensor, None]:
        return _power(_exponents(reach.abs().amax(-1))), None

    def representable(self, scales: Tensor) -> Tensor:
        return _power(self._nearest_power(scales))

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        return {"codes": pack_e2m1(codes), "scales": self._nearest_power(scales)}

    def _nearest_power(self, scales: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(scales)
        return (exponent - 1 + (mantissa >= 0.75) + _BIAS).clamp_(0, _LARGEST_SCALE).to(torch.uint8)


@dataclass(frozen=True)
class MXFP4(E2M1Weight):
    """A weight is 2^(scale - 127) times an E2M1 value.

    codes: uint8 [out, in / 2], the even input in the low half. scales: uint8 [out, in / 32], E8M0.
    """

    rank: ClassVar[int] = 40
    name: ClassVar[str] = "mxfp4"
    forms: ClassVar[str] = "mxfp4"
    examples: ClassVar[tuple[str, ...]] = ("mxfp4",)
    group: ClassVar[int] = GROUP

    def description(self) -> WeightDescription:
        return WeightDescription("float", self.bits, "group", GROUP)

    def layout(self, shape: Shape) -> Layout:
        return {
            "codes": ((shape[0], shape[1] // 2), (torch.uint8,)),
            "scales": ((shape[0], shape[1] // GROUP), (torch.uint8,)),
        }

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        if bad := int((tensors["scales"] == 255).sum()):
            raise ValueError(f"{bad} scales are 255, which is NaN, expected 0..254")

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        values = unpack_e2m1(tensors["codes"]).unflatten(1, (-1, GROUP))
        return values.mul_(_power(tensors["scales"]).unsqueeze(-1)).view(shape).to(dtype)

    def factored_scales(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        return _power(tensors["scales"]), 1.0

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Each group's scale is set by its largest magnitude; `scale_dtype` does not matter."""
        groups = weight.to(torch.float32).unflatten(1, (-1, GROUP))
        scales = _exponents(groups.abs().amax(-1))
        codes = round_to_e2m1(groups / _power(scales).unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
        return {"codes": pack_e2m1(codes.flatten(1)), "scales": scales}

    def grid(self, weight: Tensor, scale_dtype: torch.dtype) -> _Grid:
        return _Grid()

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        codes = torch.randint(256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator)
        exponents = torch.randint(-3, 0, (shape[0], shape[1] // GROUP), generator=generator)
        return {"codes": codes, "scales": (exponents + _BIAS).to(torch.uint8)}

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {name: tensors[name][ids] for name in ("codes", "scales")}


PLUGINS = (MXFP4,)
