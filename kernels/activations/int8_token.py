"""INT8 inputs, a scale for each token (each row of x), computed as they come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 of each row: x [..., in] -> codes int8 [..., in] in -127..127, scales float32 [..., 1].

    scale = absmax / 127, so that the largest entry of a row is exact; a row of zeros gets scale 1. A row with NaN or
    infinity has such a scale too, so that it shows in the output.
    """
    scales = x.abs().amax(-1, keepdim=True).to(torch.float32).div_(127)
    # A subnormal scale is too coarse: entries could reach beyond 127 times it. Such rows count as zero.
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return (x.to(torch.float32) / scales).round_().to(torch.int8), scales


@dataclass(frozen=True)
class Int8Token:
    """Each row of the layer's input is rounded to INT8 by `quantize_rows`."""

    rank: ClassVar[int] = 10
    name: ClassVar[str] = "int8-token"
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
    def from_description(cls, description: Mapping[str, Any]) -> "Int8Token | None":
        # Readers leave out `symmetric`, which is true by default, and `type`, which is "int".
        facts = {"type": "int", "symmetric": True, **description}
        own = cls().description()
        return cls() if {key: facts.get(key) for key in own} == own else None

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

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


PLUGINS = (Int8Token,)
