"""What a type of quantized inputs says about itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class Activations(Protocol):
    """How a layer's inputs are quantized before the product.

    rank: the place among the types, lower first. name: as messages call it. dynamic: scales are computed from each
    input, not stored. schemes: the schemes that it is part of, {scheme's name: name of the weight type}. statistics:
    what has to be gathered from a calibration text before (as a method's `statistics`).
    """

    rank: ClassVar[int]
    name: ClassVar[str]
    dynamic: ClassVar[bool]
    schemes: ClassVar[dict[str, str]]
    statistics: ClassVar[tuple[type, ...]]

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Self | None":
        """The type that compressed-tensors' `input_activations` describe; None if they are not this one."""

    def description(self) -> dict[str, Any]:
        """As compressed-tensors' `input_activations` describe it, without what has a default there."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored with the layer, by name; {} for dynamic ones."""

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x [..., in] quantized and dequantized again, float32.

        Args:
            tensors: those of `tensors`, as the layer stores them.
        """
