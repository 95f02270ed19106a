"""E2M1, a float of 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats, section 5.3.3).

The codes 0 to 7 stand for these values in this order; 8 is added for the negative ones. Two codes lie in a byte, the
first of them in its low half.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Shape, WeightDescription

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

LARGEST = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Ranges that are tried for a group, relative to its own: with 1.5 its largest weight becomes 4 and not 6, between which
# there is nothing.
RATIOS = (1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)

_VALUES = [*MAGNITUDES, *(-value for value in MAGNITUDES)]
_PAIRS = torch.tensor([(low, high) for high in _VALUES for low in _VALUES])  # [256, 2], by byte
_CODES = torch.zeros(13, dtype=torch.uint8)  # of twice the magnitude
_CODES[[int(2 * value) for value in MAGNITUDES]] = torch.arange(8, dtype=torch.uint8)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Round float32 values in place to the nearest ones of E2M1, half-way ones to the even code; those beyond 7 become
    8 or more, and are the caller's to limit.

    Below 2 the steps are 0.5, then 1, from 4 on 2: half of the power of two below the value.
    """
    step = values.abs().clamp_(1, 4)
    step = (step.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5)  # the exponent alone
    return values.div_(step).round_().mul_(step)


def pack_e2m1(values: Tensor) -> Tensor:
    """Values of E2M1, float32 [.., in] -> bytes of two codes, uint8 [.., in / 2]. Zeros get the code 0."""
    codes = _CODES.to(values.device)[(2 * values.abs()).to(torch.int32)]
    codes |= (values < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_e2m1(codes: Tensor) -> Tensor:
    """The inverse of pack_e2m1: uint8 [.., in / 2] -> float32 [.., in]."""
    pairs = torch.index_select(_PAIRS.to(codes.device), 0, codes.flatten().to(torch.int32))
    return pairs.view(*codes.shape[:-1], -1)


class E2M1Grid:
    """See CodeGrid: the codes of weights that are E2M1 values, whatever their scales are."""

    whole: ClassVar[bool] = False

    def limits(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.full_like(scales, -LARGEST), torch.full_like(scales, LARGEST)

    def nearest(self, exact: Tensor) -> Tensor:
        return round_to_e2m1(exact)


class E2M1Weight:
    """See WeightType: what types of E2M1 values with a scale for each `group` of inputs have in common."""

    name: ClassVar[str]
    group: ClassVar[int]
    holds_order: ClassVar[bool] = False
    bits: ClassVar[int] = 4

    @classmethod
    def parse(cls, name: str) -> "Self | None":
        return cls() if name == cls.name else None

    @classmethod
    def from_description(cls, description: WeightDescription) -> "Self | None":
        return cls() if description == cls().description() else None

    def description(self) -> WeightDescription:
        raise NotImplementedError

    def problems(self, shape: Shape) -> list[str]:
        fits = shape[1] % self.group == 0
        return [] if fits else [f"in_features {shape[1]} is not divisible by {self.group}, as {self.name} needs it"]

    def fitted(self, shape: Shape) -> "Self":
        return self

    def elements(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        """None: two codes lie in a byte."""

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        raise ValueError(f"{self.name} has no plain elements")
