"""FP8 inputs (E4M3): a scale for each token, or for each 128 features of a token, computed as they come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 448.0  # of E4M3
GROUP = 128


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of each row, and its scale: x [..., in] -> float8_e4m3fn [..., in], float32 [..., 1].

    scale = absmax / 448, so that the largest entry of a row is exact; a row of zeros gets scale 1. A row with NaN or
    infinity has such a scale too, so that it shows in the output.
    """
    wide = x.to(torch.float32)
    scales = wide.abs().amax(-1, keepdim=True).div_(LARGEST)
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return (wide / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


class _Fp8:
    """What both types share."""

    dynamic: ClassVar[bool] = True
    statistics: ClassVar[tuple[type, ...]] = ()
    observers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Any:
        own = cls().description()
        facts = {"symmetric": True, **description}
        return cls() if {key: facts.get(key) for key in own} == own else None

    def description(self) -> dict[str, Any]:
        raise NotImplementedError

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        raise NotImplementedError

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales, _ = self.codes(x, tensors)
        return codes.to(torch.float32).mul_(scales)


@dataclass(frozen=True)
class Fp8Token(_Fp8):
    """Each row of the layer's input is rounded by `round_to_fp8`."""

    rank: ClassVar[int] = 30
    name: ClassVar[str] = "fp8-token"
    schemes: ClassVar[dict[str, str]] = {"fp8-dynamic": "fp8"}

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        return *round_to_fp8(x), None


@dataclass(frozen=True)
class Fp8Group(_Fp8):
    """Each 128 features of a row are rounded by `round_to_fp8`; the last ones may be fewer."""

    rank: ClassVar[int] = 31
    name: ClassVar[str] = "fp8-group"
    schemes: ClassVar[dict[str, str]] = {"fp8-block": "fp8-b128"}

    def description(self) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "dynamic": True}
        return shared | {"group_size": GROUP}

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        padded = F.pad(x, (0, -x.shape[-1] % GROUP))
        codes, scales = round_to_fp8(padded.unflatten(-1, (-1, GROUP)))
        each = scales.expand(codes.shape).flatten(-2)
        return codes.flatten(-2)[..., : x.shape[-1]], each[..., : x.shape[-1]], None


PLUGINS = (Fp8Token, Fp8Group)
