"""INT8 inputs, for each token (row of x) a scale and, if they are asymmetric, a zero point, computed as they come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 of each row: x [..., in] -> codes int8 [..., in] in -127..127, scales float32 [..., 1].

    scale = absmax / 127, so that the largest entry of a row is exact; a row of zeros gets scale 1. A row with NaN or
    infinity has such a scale too, so that it shows in the output.
    """
    scales = x.abs().amax(-1, keepdim=True).to(torch.float32).div_(127)
    # A subnormal scale is too coarse: entries could reach beyond 127 times it. Such rows count as zero.
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return (x.to(torch.float32) / scales).round_().to(torch.int8), scales


def quantize_rows_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric INT8 of each row: x [..., in] -> codes int8 [..., in], scales float32 [..., 1], zeros int8 [..., 1].

    scale = (max - min) / 255, of a range that holds 0, and zero = -128 - min / scale, rounded: an entry is about
    scale * (code - zero). A row of zeros gets scale 1; one with NaN or infinity has such a scale too.
    """
    wide = x.to(torch.float32)
    low, high = wide.amin(-1, keepdim=True).clamp_(max=0), wide.amax(-1, keepdim=True).clamp_(min=0)
    scales = (high - low).div_(255)
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)  # see quantize_rows
    zeros = (-128 - low / scales).round_().clamp_(-128, 127)
    codes = (wide / scales).round_().add_(zeros).clamp_(-128, 127)
    return codes.to(torch.int8), scales, zeros.to(torch.int8)


@dataclass(frozen=True)
class Int8Token:
    """Each row of the layer's input is rounded to INT8 by `quantize_rows`."""

    rank: ClassVar[int] = 10
    name: ClassVar[str] = "int8-token"
    symmetric: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    schemes: ClassVar[dict[str, str]] = {"int8-dynamic": "int8-channel"}
    suffix: ClassVar[str] = "int8-dynamic"
    statistics: ClassVar[tuple[type, ...]] = ()
    observers: ClassVar[tuple[str, ...]] = ()
    tried: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def goes_with(weight_type: str, bits: int) -> bool:
        """Integers of fewer bits: W4A8 and its kin."""
        return weight_type == "int" and bits < 8

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Self | None":
        # Readers leave out `symmetric`, which is true by default, and `type`, which is "int".
        facts = {"type": "int", "symmetric": True, **description}
        own = cls().description()
        return cls() if {key: facts.get(key) for key in own} == own else None

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": self.symmetric, "strategy": "token", "dynamic": True}

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        return *quantize_rows(x), None

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales = quantize_rows(x)
        return codes.to(torch.float32) * scales

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        return

    def tensors(self, statistics: Mapping[type, Any], observer: str) -> dict[str, Tensor]:
        return {}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Int8TokenAsymmetric(Int8Token):
    """Each row is rounded by `quantize_rows_asymmetric`: its range is no wider than the row, which a massive activation
    makes up to half as wide."""

    rank: ClassVar[int] = 11
    name: ClassVar[str] = "int8-token-asym"
    symmetric: ClassVar[bool] = False
    schemes: ClassVar[dict[str, str]] = {"int8-dynamic-asym": "int8-channel"}
    suffix: ClassVar[str] = ""

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        return quantize_rows_asymmetric(x)

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales, zeros = quantize_rows_asymmetric(x)
        return (codes.to(torch.float32) - zeros.to(torch.float32)) * scales


PLUGINS = (Int8Token, Int8TokenAsymmetric)
