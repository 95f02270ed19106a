"""What a kernel is, and the repacked weight that it multiplies by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .qtensor import QTensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class Prepared(nn.Module):
    """A kernel's own repacking of one QTensor: its tensors are buffers, so they count, and move, with the model."""

    def __init__(self, qtensor: QTensor, **tensors: Tensor):
        super().__init__()
        self.scheme, self.shape = qtensor.scheme, qtensor.shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def joined(cls, parts: "Sequence[Prepared]", dimensions: dict[str, int]) -> "Self":
        """The output features of all parts, one after the other: of each buffer, along this dimension."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.scheme, made.shape = parts[0].scheme, (sum(part.shape[0] for part in parts), parts[0].shape[1])
        for name, dimension in dimensions.items():
            made.register_buffer(
                name, torch.cat([part.get_buffer(name) for part in parts], dimension), persistent=False
            )
        return made


class Kernel(Protocol):
    """One way to compute x @ dequantized_weight.T + bias.

    `join`, where a kernel has it, makes one of several prepared weights of one scheme and number of input features,
    their output features one after the other; or None where these cannot be one.
    """

    name: ClassVar[str]
    quantizes_inputs: ClassVar[bool]  # of weight-only schemes: faster, and a little less exact

    def reject(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """None if this kernel can serve inputs of this dtype on this device, else the reason in a few words."""

    def prepare(self, qtensor: QTensor, dtype: torch.dtype) -> nn.Module:
        """Repack once, at load. `qtensor` has passed check() and is on its device already."""

    def linear(self, x: Tensor, prepared: nn.Module, bias: Tensor | None) -> Tensor:
        """x [..., in_features] floating -> [..., out_features] in x's dtype."""
