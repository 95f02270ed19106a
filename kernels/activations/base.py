"""What a type of quantized inputs says about itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


def finite_rows(inputs: Tensor) -> tuple[Tensor, int]:
    """The rows of inputs [..., in] that are finite, [n, in], and how many are not: statistics leave these out."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if torch.isfinite(rows.sum(dtype=torch.float32)):  # far cheaper than to look at each
        return rows, 0
    finite = torch.isfinite(rows).all(1)
    return rows[finite], int((~finite).sum())


class Activations(Protocol):
    """How a layer's inputs are quantized before the product.

    rank: the place among the types, lower first. name: as messages call it. schemes: the schemes that it is part of,
    {scheme's name: name of the weight type}.
    dynamic: scales are computed from each input, nothing is stored, and nothing below `apply` is ever asked for.
    statistics: what has to be gathered of a calibration text (as a method's `statistics`); () for dynamic ones.
    observers: ways to choose what is stored from the statistics, the default first.
    tried: those among which the outputs decide where a recipe names none.

    A type may have two members more, for schemes that are not listed by name: `suffix`, which a scheme's name has after
    that of its weight type and a hyphen, and goes_with(type, bits), whether there are such schemes of weights that are
    described so.
    """

    rank: ClassVar[int]
    name: ClassVar[str]
    dynamic: ClassVar[bool]
    schemes: ClassVar[dict[str, str]]
    statistics: ClassVar[tuple[type, ...]]
    observers: ClassVar[tuple[str, ...]]
    tried: ClassVar[tuple[str, ...]]

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Self | None":
        """The type that compressed-tensors' `input_activations` describe; None if they are not this one."""

    def description(self) -> dict[str, Any]:
        """As compressed-tensors' `input_activations` describe it, without what has a default there."""

    def codes(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., in] as codes, their scales, and their zero point or None: x is about scales * (codes - zero point).

        Scales are float32: [..., 1], [1] where all inputs share one, or [..., in] where features of a row have their
        own. The zero point is int8 as scales are: [..., 1] or [1].

        Args:
            tensors: those of `layout`, as the layer stores them.
        """

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x [..., in] quantized and dequantized again, float32.

        Args:
            tensors: those of `layout`, as the layer stores them.
        """

    def layout(self) -> Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """The tensors that are stored with the layer: name -> shape, and the dtypes that it may have.

        The names are those that compressed-tensors gives them in the files.
        """

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse values that are out of range; shapes and dtypes are right already.

        Raises:
            ValueError: says which value, and its range.
        """

    def tensors(self, statistics: Mapping[type, Any], observer: str) -> dict[str, Tensor]:
        """What is stored with a layer of these inputs.

        Args:
            statistics: one of each class in `self.statistics`, of one input at least.
        """

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tensors, for inputs that are of the order of 1."""


def straight_through(activations: Activations, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """x [..., in] as `activations.apply` rounds it, float32; a gradient passes as if nothing were rounded.

    This is the straight-through estimator (Bengio et al., arXiv 1308.3432).
    """
    rounded = activations.apply(x.detach(), tensors)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    wide = x.to(torch.float32)
    return wide + (rounded - wide).detach()
