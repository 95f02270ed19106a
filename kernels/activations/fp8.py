"""FP8 inputs (E4M3): a scale for each token, or for each 128 features of a token, computed as they come; or one for
all inputs of a layer, calibrated before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .int8_tensor import InputCounts, largest_kept, nonzero

LARGEST = 448.0  # of E4M3
GROUP = 128
_SCALE = "input_scale"


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
    tried: ClassVar[tuple[str, ...]] = ()

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

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        return

    def tensors(self, statistics: Mapping[type, Any], observer: str = "minmax") -> dict[str, Tensor]:
        return {}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Fp8Token(_Fp8):
    """Each row of the layer's input is rounded by `round_to_fp8`."""

    rank: ClassVar[int] = 30
    name: ClassVar[str] = "fp8-token"
    schemes: ClassVar[dict[str, str]] = {"fp8-dynamic": "fp8", "fp8-tensor-dynamic": "fp8-tensor"}

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


@dataclass(frozen=True)
class Fp8Tensor(_Fp8):
    """Every input of a layer is rounded to x = S * E4M3, clamped to +-448 S, with the S that is stored with it.

    Stored: input_scale float32 [1]; float16 and bfloat16 are read, too.
    """

    rank: ClassVar[int] = 32
    name: ClassVar[str] = "fp8-tensor"
    dynamic: ClassVar[bool] = False
    schemes: ClassVar[dict[str, str]] = {"fp8-static": "fp8", "fp8-tensor-static": "fp8-tensor"}
    statistics: ClassVar[tuple[type, ...]] = (InputCounts,)
    # E4M3's steps grow with the value: nothing is won by cutting the largest inputs off, as it is for integers.
    observers: ClassVar[tuple[str, ...]] = ("minmax", "mse", "percentile")
    tried: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Fp8Tensor | None":
        return super().from_description({"dynamic": False, **description})

    def description(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {_SCALE: ((1,), (torch.float32, torch.bfloat16, torch.float16))}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        if not bool((tensors[_SCALE] > 0).all()):
            raise ValueError(f"{_SCALE} is {tensors[_SCALE].item()}, expected a positive number")

    def tensors(self, statistics: Mapping[type, Any], observer: str = "minmax") -> dict[str, Tensor]:
        largest = largest_kept(statistics[InputCounts], observer, _error)
        return {_SCALE: torch.tensor([nonzero(largest / LARGEST)])}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {_SCALE: (torch.rand(1, generator=generator) + 0.5) / 64}

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        scale = tensors[_SCALE].to(torch.float32)
        return (x.to(torch.float32) / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale, None


def _error(values: Tensor, times: Tensor, limit: float) -> float:
    """The squared error of the inputs when they are rounded in a range up to `limit`, summed."""
    scale = nonzero(limit / LARGEST)
    rounded = (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(torch.float32) * scale
    return ((rounded - values).to(torch.float64).square() * times).sum().item()


PLUGINS = (Fp8Token, Fp8Group, Fp8Tensor)
