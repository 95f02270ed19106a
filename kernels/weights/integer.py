"""Affine integers of 2, 3, 4 or 8 bits: w = S (q - Z), with a scale S and a zero point Z for each group of inputs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..packing import pack, unpack, words
from .base import Layout, Shape, WeightDescription

INT_BITS = (2, 3, 4, 8)

_NAME = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_GROUP = 16  # with a 16-bit scale for each, smaller groups would take more than one more bit per weight


@dataclass(frozen=True)
class Integer:
    """Integers 0..2^bits - 1.

    codes: int32 [out, ceil(in * bits / 32)] (see packing). scales: float16, bfloat16 or float32 [out, groups].
    zeros: uint8 [out, groups], not stored where symmetric: the zero point is then the middle code.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; None means one group per output channel.
        symmetric: the zero point is 2^(bits-1) everywhere.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    rank: ClassVar[int] = 10
    forms: ClassVar[str] = "int{2,3,4,8}-g{group size} or int{2,3,4,8}-channel (each with -asym if wanted)"
    examples: ClassVar[tuple[str, ...]] = tuple(
        f"int{bits}-{group}" for bits in INT_BITS for group in ("g32", "g64", "g128", "channel", "g128-asym")
    )
    holds_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in INT_BITS:
            raise ValueError(f"int{self.bits} is not a scheme: bits must be one of {', '.join(map(str, INT_BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} is not a positive number")

    @classmethod
    def parse(cls, name: str) -> "Integer | None":
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(int(match["bits"]), int(match["group"]) if match["group"] else None, not match["asym"])

    @classmethod
    def from_description(cls, description: WeightDescription) -> "Integer | None":
        if description.type != "int" or description.strategy not in ("channel", "group"):
            return None
        if (description.group_size is None) != (description.strategy == "channel"):
            raise ValueError(f"strategy {description.strategy} does not go with group_size {description.group_size}")
        return cls(description.num_bits, description.group_size, description.symmetric)

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    @property
    def middle(self) -> int:
        """The zero point where it is symmetric."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, in_features: int) -> int:
        """The number of scales per output channel."""
        return in_features // self.group_size if self.group_size else 1

    def description(self) -> WeightDescription:
        strategy = "group" if self.group_size else "channel"
        return WeightDescription("int", self.bits, strategy, self.group_size, self.symmetric)

    def problems(self, shape: Shape) -> list[str]:
        if not self.group_size or shape[1] % self.group_size == 0:
            return []
        fitting = [g for g in (128, 64, 32) if shape[1] % g == 0]
        use = f"use {' or '.join(map(str, fitting))}" if fitting else f"use int{self.bits}-channel"
        return [f"in_features {shape[1]} is not divisible by group_size {self.group_size}; {use}"]

    def fitted(self, shape: Shape) -> "Integer":
        if not self.problems(shape):
            return self
        assert self.group_size is not None
        size = 1 << (self.group_size - 1).bit_length() - 1  # the largest power of two below group_size
        while size >= _LEAST_GROUP:
            if shape[1] % size == 0:
                return replace(self, group_size=size)
            size //= 2
        return self

    def layout(self, shape: Shape) -> Layout:
        groups = (shape[0], self.groups(shape[1]))
        layout: Layout = {"codes": ((shape[0], words(shape[1], self.bits)), (torch.int32,))}
        layout["scales"] = (groups, _SCALE_DTYPES)
        if not self.symmetric:
            layout["zeros"] = (groups, (torch.uint8,))
        return layout

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        if not self.symmetric and int(tensors["zeros"].max()) > self.max_code:
            raise ValueError(f"zero point {int(tensors['zeros'].max())} is out of range 0..{self.max_code}")

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales, zeros = tensors["scales"], tensors.get("zeros")
        codes = unpack(tensors["codes"], self.bits, shape[1]).unflatten(1, (scales.shape[1], -1))
        centred = codes.to(torch.float32)
        centred -= self.middle if zeros is None else zeros.unsqueeze(-1)
        centred *= scales.to(torch.float32).unsqueeze(-1)
        return centred.view(shape).to(dtype)

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Each group's scale is set by its largest magnitude (symmetric) or its range (asymmetric).

        Raises:
            ValueError: see affine_parameters.
        """
        groups = weight.to(torch.float32).unflatten(1, (self.groups(weight.shape[1]), -1))
        scales, zeros = affine_parameters(groups, self, scale_dtype)
        codes, _ = encode(groups, scales, zeros, self)
        tensors = {"codes": pack(codes.flatten(1), self.bits), "scales": scales}
        return tensors if zeros is None else tensors | {"zeros": zeros}

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        groups, levels = (shape[0], self.groups(shape[1])), self.max_code + 1
        tensors = {}
        if not self.symmetric:
            tensors["zeros"] = torch.randint(levels, groups, dtype=torch.uint8, generator=generator)
        tensors["scales"] = ((torch.rand(groups, generator=generator) + 0.5) / levels).to(torch.float16)
        codes = torch.randint(levels, shape, dtype=torch.uint8, generator=generator)
        return tensors | {"codes": pack(codes, self.bits)}

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {name: tensors[name][ids] for name in self.layout(shape)}

    def elements(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """int8 elements and zeros: codes and zero points less the middle code."""
        codes, zeros = unpack(tensors["codes"], self.bits, shape[1]), tensors.get("zeros")
        return self._signed(codes), tensors["scales"], None if zeros is None else self._signed(zeros)

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        tensors = {"codes": pack(self._codes(elements), self.bits), "scales": scales}
        return tensors if zeros is None else tensors | {"zeros": self._codes(zeros)}

    def _signed(self, codes: Tensor) -> Tensor:
        return (codes - self.middle).view(torch.int8)  # uint8 wraps around, which is two's complement

    def _codes(self, signed: Tensor) -> Tensor:
        """uint8 codes of int8 elements."""
        if signed.dtype != torch.int8:
            raise ValueError(f"elements have dtype {signed.dtype}, expected torch.int8")
        low, high = -self.middle, self.max_code - self.middle
        if signed.numel() and not (low <= int(signed.min()) and int(signed.max()) <= high):
            raise ValueError(f"elements {int(signed.min())}..{int(signed.max())} are out of range {low}..{high}")
        return signed.view(torch.uint8) + self.middle


class AffineCodes(Protocol):
    """What the arithmetic below needs to know of an integer type."""

    @property
    def symmetric(self) -> bool: ...
    @property
    def middle(self) -> int: ...
    @property
    def max_code(self) -> int: ...


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is stored in a dtype: the smallest normal number, or float16's smallest of all."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def affine_parameters(groups: Tensor, codes: AffineCodes, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of each group: float32 [rows, groups, group_size] -> (scale_dtype, uint8)
    [rows, groups].

    Symmetric: S = 2 max|w| / (2^n - 1), no zero point stored. Asymmetric: the range widened to hold 0,
    S = (max - min) / (2^n - 1), Z = round(-min / S). Scales are rounded to the dtype that is stored; a group of
    zeros gets scale 1, and one too small for the dtype gets the dtype's smallest positive number.

    Raises:
        ValueError: a scale beyond the dtype's range, or weights that are not finite.
    """
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    spread = high - low if not codes.symmetric else 2 * torch.maximum(high, -low)
    scales = (spread / codes.max_code).to(scale_dtype)
    if not torch.isfinite(scales).all():
        raise ValueError(f"a scale of {spread.max().item() / codes.max_code:.4g} does not fit {scale_dtype}")
    # torch flushes no subnormals here: 0 comes only from spreads below half of the smallest positive number.
    scales = torch.where(spread == 0, torch.ones_like(scales), scales.clamp(min=smallest_scale(scale_dtype)))
    if codes.symmetric:
        return scales, None
    zeros = torch.round(-low / scales.to(torch.float32)).clamp_(0, codes.max_code)
    return scales, zeros.to(torch.uint8)


def encode(groups: Tensor, scales: Tensor, zeros: Tensor | None, codes: AffineCodes) -> tuple[Tensor, float]:
    """The nearest codes, uint8, and the sum of the squared errors; shapes as in affine_parameters."""
    wide = scales.to(torch.float32)
    exact = groups / wide.unsqueeze(-1)
    nearest = torch.round(exact)
    if zeros is None:
        nearest.clamp_(-codes.middle, codes.max_code - codes.middle)
        zero: Tensor | int = codes.middle
    else:
        zero = zeros.to(torch.float32).unsqueeze(-1)
        nearest.clamp_(-zero, codes.max_code - zero)
    error = torch.linalg.vector_norm(torch.linalg.vector_norm(exact.sub_(nearest), dim=-1).mul_(wide))
    return nearest.add_(zero).to(torch.uint8), error.item() ** 2


PLUGINS = (Integer,)
