"""FP8 inputs (E4M3): a scale for each token, or for each 128 features of a token, computed as they come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 448.0  # of E4M3
GROUP = 128


def round_to_fp8(x: Tensor) -> Tensor:
    """E4M3 of each row, dequantized again: x [..., in] -> float32 of that shape.

    scale = absmax / 448, so that the largest entry of a row is exact; a row of zeros gets scale 1. A row with NaN or
    infinity has such a scale too, so that it shows in the output.
    """
    wide = x.to(torch.float32)
    scales = wide.abs().amax(-1, keepdim=True).div_(LARGEST)
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return (wide / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(torch.float32).mul_(scales)


class _Fp8:
    """What both types share."""

    dynamic: ClassVar[bool] = True
    statistics: ClassVar[tuple[type, ...]] = ()

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Any:
        own = cls().description()
        facts = {"symmetric": True, **description}
        return cls() if {key: facts.get(key) for key in own} == own else None

    def description(self) -> dict[str, Any]:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Fp8Token(_Fp8):
    """Each row of the layer's input is rounded by `round_to_fp8`."""

    rank: ClassVar[int] = 30
    name: ClassVar[str] = "fp8-token"
    schemes: ClassVar[dict[str, str]] = {"fp8-dynamic": "fp8"}

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return round_to_fp8(x)


@dataclass(frozen=True)
class Fp8Group(_Fp8):
    """Each 128 features of a row are rounded by `round_to_fp8`; the last ones may be fewer."""

    rank: ClassVar[int] = 31
    name: ClassVar[str] = "fp8-group"
    schemes: ClassVar[dict[str, str]] = {"fp8-block": "fp8-b128"}

    def description(self) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "dynamic": True}
        return shared | {"group_size": GROUP}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        padded = F.pad(x, (0, -x.shape[-1] % GROUP))
        return round_to_fp8(padded.unflatten(-1, (-1, GROUP))).flatten(-2)[..., : x.shape[-1]]


PLUGINS = (Fp8Token, Fp8Group)
