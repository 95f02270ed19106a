"""What a type of quantized weight says about itself.

A type is a frozen dataclass: its fields are what the scheme's name says, such as bits and group size. It speaks of
plain tensors by name ("codes", "scales", "zeros" and any further ones of its own); QTensor holds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

Shape = tuple[int, int]  # [out_features, in_features]
Layout = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # name of a tensor: its shape, its possible dtypes


@dataclass(frozen=True)
class WeightDescription:
    """The facts that formats of other libraries write down too.

    Args:
        type: "int", "float", or "codebook" (codes are places in a table of values).
        num_bits: bits of a code.
        strategy: what shares a scale: a "channel" (all inputs of an output), a "group" of inputs of an output, a
            "tensor_group" (the same, with one more number for the whole tensor), a "block", or the whole "tensor".
        group_size: inputs of a group. A codebook's block has so many elements of the flattened matrix, any other block
            is a square of so many inputs and outputs. None for "channel" and "tensor".
        symmetric: no zero points are stored.
    """

    type: str
    num_bits: int
    strategy: str
    group_size: int | None = None
    symmetric: bool = True


class WeightType(Protocol):
    """How a weight [out_features, in_features] is coded.

    rank: the place among the types, lower first. forms: how the names look, for messages. examples: common names.
    holds_order: the columns may lie in another order (see QTensor.order).

    A type may have three methods more. grid(weight, scale_dtype) is the CodeGrid of a layer (see grid.py), for methods
    that set codes one column after the other; integers have one without it. fused(weights) is the type with what layers
    must have in common that servers multiply by as by one. factored_scales(shape, tensors) is a tuple: float32 scales
    [out, groups], and a number that all of them are multiplied by; types whose "scales" are these do without.
    """

    rank: ClassVar[int]
    forms: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    holds_order: ClassVar[bool]

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def name(self) -> str:
        """What `parse` reads, such as "int4-g128"."""

    @property
    def nearest(self) -> "Callable[[Tensor, torch.dtype], dict[str, Tensor]] | None":
        """nearest(weight, scale_dtype): the tensors of a floating weight [out, in], each element rounded to the nearest
        value. None where bitpress leaves that to a library."""

    @classmethod
    def parse(cls, name: str) -> "Self | None":
        """The type of this name; None if no name of this type looks so.

        Raises:
            ValueError: the name looks so, but a value in it is impossible.
        """

    @classmethod
    def from_description(cls, description: WeightDescription) -> "Self | None":
        """The type that is described; None if this one cannot be described so.

        Raises:
            ValueError: the description fits, but a value in it is impossible.
        """

    def description(self) -> WeightDescription:
        """The neutral facts about this type."""

    def problems(self, shape: Shape) -> list[str]:
        """Why a weight of this shape cannot be coded; [] if it can."""

    def fitted(self, shape: Shape) -> "Self":
        """This type, or where the group size does not divide in_features, the one with the largest smaller power of two
        that does. Itself where none does."""

    def layout(self, shape: Shape) -> Layout:
        """The tensors of a weight of this shape."""

    def check(self, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        """Refuse values that are out of range; shapes and dtypes are right already.

        Raises:
            ValueError: says which value, and its range.
        """

    def dequantize(self, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight that the tensors stand for, [out, in] of `dtype`, computed in float32."""

    def random(self, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tensors, on the CPU, of a weight whose elements are of the order of 1."""

    def rows(self, shape: Shape, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """The tensors of the weight [len(ids), in] that has these rows of the whole.

        Args:
            ids: integers [n], each in 0..out-1.
        Raises:
            ValueError: rows of such a weight cannot be taken apart.
        """

    def elements(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """(elements, scales, zeros): one element [out, in] of a plain dtype for each weight, which is
        scale * (element - zero). None where there is no such form."""

    def from_elements(self, shape: Shape, elements: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
        """The inverse of `elements`.

        Raises:
            ValueError: there is no such form, or the elements are not of its dtype or range.
        """
