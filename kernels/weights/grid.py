"""What a method asks of a weight type when it sets codes one column after the other: a weight is a scale by a code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from .base import WeightType
from .integer import affine_parameters

MakeGrid = Callable[[Tensor, torch.dtype], "CodeGrid"]


class CodeGrid(Protocol):
    """The values that the weights of a layer may take.

    Codes are float32 and centred: 0 stands for 0, whatever bits are stored for it. Scales are float32 numbers that the
    type can store. Both have a shape [.., rows].

    ratios: the ranges that a search of scales tries, relative to a group's own. The first is 1.
    whole: codes are the whole numbers between their limits.
    common: tensors of a layer that all of its rows share.
    """

    @property
    def ratios(self) -> tuple[float, ...]: ...
    @property
    def whole(self) -> bool: ...
    @property
    def common(self) -> Mapping[str, Tensor]: ...

    def parameters(self, reach: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales of groups that reach from reach[..., 0] to reach[..., 1], and their zero points if there are any.

        Raises:
            ValueError: a scale beyond what can be stored.
        """

    def limits(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        """The least and the largest code with each scale."""

    def nearest(self, exact: Tensor) -> Tensor:
        """Round to the nearest codes in place, limits aside."""

    def representable(self, scales: Tensor) -> Tensor:
        """The nearest scales that can be stored, as float32. Those that cannot be are infinite, NaN or not positive."""

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        """The tensors, without `common`, of codes [rows, in] with scales and zero points [rows, groups]."""


@dataclass(frozen=True)
class IntegerGrid:
    """Affine integers, by what their type says of itself; they are packed from their plain elements."""

    weight: WeightType
    scale_dtype: torch.dtype

    ratios: ClassVar[tuple[float, ...]] = tuple(1.0 - 0.04 * step for step in range(16))  # 1 down to 0.4
    whole: ClassVar[bool] = True
    common: ClassVar[Mapping[str, Tensor]] = {}

    @cached_property
    def symmetric(self) -> bool:
        return self.weight.description().symmetric

    @cached_property
    def middle(self) -> int:
        return 1 << (self.weight.description().num_bits - 1)

    @cached_property
    def max_code(self) -> int:
        return (1 << self.weight.description().num_bits) - 1

    def parameters(self, reach: Tensor) -> tuple[Tensor, Tensor | None]:
        scales, zeros = affine_parameters(reach, self, self.scale_dtype)
        return scales.to(torch.float32), zeros

    def limits(self, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        offset = torch.full_like(scales, self.middle) if zeros is None else zeros.to(torch.float32)
        return -offset, self.max_code - offset

    def nearest(self, exact: Tensor) -> Tensor:
        return exact.round_()

    def representable(self, scales: Tensor) -> Tensor:
        return scales.to(self.scale_dtype).to(torch.float32)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        shape, points = (codes.shape[0], codes.shape[1]), None
        if zeros is not None:
            points = zeros.to(torch.int16) - self.middle
            codes = (codes.unflatten(1, (scales.shape[1], -1)) + points.unsqueeze(-1)).flatten(1)
            points = points.to(torch.int8)
        return self.weight.from_elements(shape, codes.to(torch.int8), scales.to(self.scale_dtype), points)


def grid_of(weight: WeightType) -> MakeGrid | None:
    """What makes the grid of a layer: grid(weight [out, in], scale_dtype); None where a type has none.

    A type of integers with a scale per channel or group needs not say how.
    """
    if (own := getattr(weight, "grid", None)) is not None:
        return cast(MakeGrid, own)
    described = weight.description()
    if described.type != "int" or described.strategy not in ("channel", "group"):
        return None
    return lambda _, scale_dtype: IntegerGrid(weight, scale_dtype)
