"""Caches of 8 bits with calibrated scales: E4M3 values, or integers.

FP8 has one scale for all keys of a layer and one for all values: what vLLM, and the kernels that it calls, compute
with. E4M3 has 15 exponents, so a head that is smaller than the others loses little by that. Integers have none, and a
scale for each head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import DEFAULTS, SCALE_DTYPES, Codes, check_scale, matches, scale_of

_E4M3, _INT8 = 448.0, 127.0  # the largest codes


@dataclass(frozen=True)
class _Static:
    """Shared by both: stored are k_scale and v_scale, float32 [1], or [heads, 1, 1] where `per_head`."""

    per_head: bool = False

    dynamic: ClassVar[bool] = False
    type: ClassVar[str]
    names: ClassVar[dict[str, bool]]  # name -> per_head

    @classmethod
    def parse(cls, name: str) -> "_Static | None":
        return cls(cls.names[name]) if name in cls.names else None

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "_Static | None":
        kinds = [cls(per_head) for per_head in cls.names.values()]
        return next((kind for kind in kinds if matches(description, kind.description(), DEFAULTS)), None)

    @property
    def name(self) -> str:
        return next(name for name, per_head in self.names.items() if per_head == self.per_head)

    def description(self) -> dict[str, Any]:
        strategy = "attn_head" if self.per_head else "tensor"
        return {"num_bits": 8, "type": self.type, "symmetric": True, "strategy": strategy, "dynamic": False}

    def problems(self, dim: int) -> list[str]:
        return []

    def layout(self, heads: int) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        return ((heads, 1, 1) if self.per_head else (1,)), SCALE_DTYPES

    def check(self, scale: Tensor) -> None:
        check_scale(scale)

    def _scale(self, peaks: Tensor, largest: float) -> Tensor:
        return scale_of(peaks.view(-1, 1, 1) if self.per_head else peaks.amax().view(1), largest)


@dataclass(frozen=True)
class Float8Cache(_Static):
    """x is about S times the E4M3 value nearest to x / S, at most 448."""

    rank: ClassVar[int] = 10
    forms: ClassVar[str] = "fp8 or fp8-head"
    examples: ClassVar[tuple[str, ...]] = ("fp8", "fp8-head")
    type: ClassVar[str] = "float"
    names: ClassVar[dict[str, bool]] = {"fp8": False, "fp8-head": True}

    def scale(self, peaks: Tensor) -> Tensor:
        return self._scale(peaks, _E4M3)

    def encode(self, states: Tensor, scale: Tensor | None) -> Codes:
        assert scale is not None
        values = (states.to(torch.float32) / scale.to(torch.float32)).clamp_(-_E4M3, _E4M3)
        return {"codes": values.to(torch.float8_e4m3fn)}

    def decode(self, codes: Codes, scale: Tensor | None) -> Tensor:
        assert scale is not None
        return codes["codes"].to(torch.float32) * scale.to(torch.float32)


@dataclass(frozen=True)
class Int8Cache(_Static):
    """q = clamp(round(x / S), -128, 127), with an S for each head, by which the largest magnitude becomes 127."""

    per_head: bool = True

    rank: ClassVar[int] = 20
    forms: ClassVar[str] = "int8"
    examples: ClassVar[tuple[str, ...]] = ("int8",)
    type: ClassVar[str] = "int"
    names: ClassVar[dict[str, bool]] = {"int8": True}

    def scale(self, peaks: Tensor) -> Tensor:
        return self._scale(peaks, _INT8)

    def encode(self, states: Tensor, scale: Tensor | None) -> Codes:
        assert scale is not None
        codes = (states.to(torch.float32) / scale.to(torch.float32)).round_().clamp_(-_INT8 - 1, _INT8)
        return {"codes": codes.to(torch.int8)}

    def decode(self, codes: Codes, scale: Tensor | None) -> Tensor:
        assert scale is not None
        return codes["codes"].to(torch.float32) * scale.to(torch.float32)


PLUGINS = (Float8Cache, Int8Cache)
