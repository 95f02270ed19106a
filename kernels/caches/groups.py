"""Caches of integers in groups of a head's features, whose scales are computed of each token as it comes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import DEFAULTS, Codes, matches

_FORM = re.compile(r"int(\d+)-g(\d+)")
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class IntegerGroups:
    """q = round(x / S), of 8 or 4 bits; S = max|x| / (2^(bits - 1) - 1) of each token's group, as float16.

    Kept: codes int8 [..., dim], or uint8 [..., dim / 2] with the even feature in the low half, and scales float16
    [..., dim / group_size].
    """

    bits: int
    group_size: int

    rank: ClassVar[int] = 30
    forms: ClassVar[str] = "int8-gN or int4-gN"
    examples: ClassVar[tuple[str, ...]] = ("int8-g64", "int4-g64")
    dynamic: ClassVar[bool] = True

    @classmethod
    def parse(cls, name: str) -> "IntegerGroups | None":
        if (form := _FORM.fullmatch(name)) is None:
            return None
        bits, size = map(int, form.groups())
        if bits not in (4, 8):
            raise ValueError(f"{name}: {bits} bits; a cache in groups has 4 or 8")
        if size < 2 or size % 2:
            raise ValueError(f"{name}: groups of {size}; expected an even number")
        return cls(bits, size)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "IntegerGroups | None":
        bits, size = description.get("num_bits"), description.get("group_size")
        if bits not in (4, 8) or type(size) is not int or size < 2 or size % 2:
            return None
        kind = cls(bits, size)
        return kind if matches(description, kind.description(), DEFAULTS) else None

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group_size}"

    def description(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": True,
        }

    def problems(self, dim: int) -> list[str]:
        if dim % self.group_size:
            return [f"heads of {dim} features are no whole groups of {self.group_size}; use groups that divide it"]
        return []

    def encode(self, states: Tensor, scale: Tensor | None) -> Codes:
        largest = (1 << (self.bits - 1)) - 1
        groups = states.to(torch.float32).unflatten(-1, (-1, self.group_size))
        scales = (groups.abs().amax(-1) / largest).clamp_(max=_LARGEST).to(torch.float16)
        steps = torch.where(scales == 0, torch.ones_like(scales), scales).to(torch.float32).unsqueeze(-1)
        codes = (groups / steps).round_().clamp_(-largest, largest).flatten(-2).to(torch.int8)
        if self.bits == 4:
            halves = codes.view(torch.uint8) & 15
            codes = halves[..., ::2] | (halves[..., 1::2] << 4)
        return {"codes": codes, "scales": scales}

    def decode(self, codes: Codes, scale: Tensor | None) -> Tensor:
        values = codes["codes"]
        if self.bits == 4:
            pairs = torch.stack((values & 15, values >> 4), -1).flatten(-2).to(torch.int8)
            values = (pairs ^ 8) - 8
        groups = values.to(torch.float32).unflatten(-1, (-1, self.group_size))
        return (groups * codes["scales"].to(torch.float32).unsqueeze(-1)).flatten(-2)


PLUGINS = (IntegerGroups,)
