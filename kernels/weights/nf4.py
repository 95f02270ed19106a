"""NF4 (QLoRA, arXiv 2305.14314): 4-bit places in a table of 16 quantiles, a scale for each block of 64 elements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Layout, Shape, WeightDescription

NF4_BLOCK = 64  # elements of the flattened matrix that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own, with double quantization

# Quantiles of the normal distribution (QLoRA, appendix E), rounded to float32.
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NestedScales:
    """Double quantization: block scale i = codebook[scales[i]] * absmax[i // 256] + offset.

    absmax: float32 [ceil(blocks / 256)]; codebook: float32 [256]; offset: float32 scalar [].
    """

    absmax: Tensor
    codebook: Tensor
    offset: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that a QTensor has them under."""
        return {"nested.absmax": self.absmax, "nested.codebook": self.codebook, "nested.offset": self.offset}


def nested_scales(tensors: Mapping[str, Tensor]) -> NestedScales | None:
    """The double quantization among a weight's tensors; None where there is none."""
    if "nested.absmax" not in tensors:
        return None
    return NestedScales(tensors["nested.absmax"], tensors["nested.codebook"], tensors["nested.offset"])


def block_scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """The scale of each block of 64, double quantization undone: float32 [ceil(out * in / 64)]."""
    scales, nested = tensors["scales"], nested_scales(tensors)
    if nested is None:
        return scales
    spread = nested.absmax.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
    return nested.codebook[scales.to(torch.int32)] * spread + nested.offset


@dataclass(frozen=True)
class NF4:
    """Blocks run over the flattened matrix, as bitsandbytes lays them out.

    codes: uint8 [ceil(out * in / 2)], the even element in the high nibble. scales: float32 [ceil(out * in / 64)]. With
    `double_quant` they are uint8 of that shape, and nested.absmax, nested.codebook and nested.offset decode them (see
    NestedScales).
    """

    double_quant: bool = False

    rank: ClassVar[int] = 20
    forms: ClassVar[str] = "nf4 or nf4-dq"
    examples: ClassVar[tuple[str, ...]] = ("nf4", "nf4-dq")
    holds_order: ClassVar[bool] = False
    bits: ClassVar[int] = 4
    nearest: ClassVar[None] = None  # bitsandbytes rounds, whose format it is

    @classmethod
    def parse(cls, name: str) -> "NF4 | None":
        return cls(name == "nf4-dq") if name in cls.examples else None

    @classmethod
    def from_description(cls, description: WeightDescription) -> "NF4 | None":
        return cls() if description == cls().description() else None

    @property
    def name(self) -> str:
        return "nf4-dq" if self.double_quant else "nf4"

    def description(self) -> WeightDescription:
        return WeightDescription("codebook", self.bits, "block", NF4_BLOCK)

    def problems(self, shape: Shape) -> list[str]:
        return []

    def fitted(self, shape: Shape) -> "NF4":
        return self

    def layout(self, shape: Shape) -> Layout:
        blocks = -(-shape[0] * shape[1] // NF4_BLOCK)
        layout: Layout = {"codes": ((-(-shape[0] * shape[1] // 2),), (torch.uint8,))}
        layout["scales"] = ((blocks,), (torch.uint8 if self.double_quant else torch.float32,))
        if self.double_quant:
            layout["nested.absmax"] = ((-(-blocks // NESTED_BLOCK),), (torch.float32,))
            layout["nested.codebook"] = ((256,), (torch.float32,))
            layout["nested.offset"] = ((), (torch.float32,))
        return layout

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        """Every code is a place in the table."""

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors["codes"], block_scales(tensors)
        codebook = torch.tensor(NF4_CODEBOOK, device=codes.device)
        nibbles = torch.stack([codes >> 4, codes & 15], -1).flatten()
        values = codebook[nibbles.to(torch.int32)]
        values = torch.nn.functional.pad(values, (0, scales.numel() * NF4_BLOCK - values.numel()))
        values = values.view(-1, NF4_BLOCK) * scales.unsqueeze(-1)
        return values.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)

    def factored_scales(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """See WeightType; for in_features that 64 divides."""
        return block_scales(tensors).view(shape[0], -1), 1.0

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        def integers(count: int) -> Tensor:
            return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)

        def floats(count: int) -> Tensor:
            return torch.rand(count, generator=generator) + 0.5

        blocks, codes = -(-shape[0] * shape[1] // NF4_BLOCK), integers(-(-shape[0] * shape[1] // 2))
        if not self.double_quant:
            return {"codes": codes, "scales": floats(blocks)}
        nested = NestedScales(floats(-(-blocks // NESTED_BLOCK)), torch.linspace(-1, 1, 256), torch.tensor(2.0))
        return {"codes": codes, "scales": integers(blocks), **nested.tensors()}

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """With double quantization it is undone: the rows have scales in float32, which `dequantize` takes too.

        Raises:
            ValueError: blocks run across rows.
        """
        if shape[1] % NF4_BLOCK:
            raise ValueError(f"in_features {shape[1]} is not divisible by {NF4_BLOCK}: blocks would run across rows")
        codes, scales = tensors["codes"].view(shape[0], -1)[ids], block_scales(tensors).view(shape[0], -1)[ids]
        return {"codes": codes.flatten(), "scales": scales.flatten()}

    def elements(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        """None: a place in a table is not the weight's element."""

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        raise ValueError(f"{self.name} has no plain elements")


PLUGINS = (NF4,)
