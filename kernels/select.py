"""Which kernel multiplies by a quantized weight, and why each of the others does not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .qtensor import QTensor

if TYPE_CHECKING:
    from typing_extensions import Self

AUTOMATIC = ("auto", "auto-bf16")


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


@dataclass(frozen=True)
class Selection:
    """The kernel that was chosen, and for each that ranks above it, why it was not."""

    kernel: Kernel
    rejected: dict[str, str]


def registry() -> list[Kernel]:
    """Every kernel, the fastest first; `reference` serves everything and comes last."""
    from .bnb import BitsAndBytesNF4
    from .native_cpu import NativeExact, NativeInt8
    from .reference import Reference
    from .torch_int4 import TorchInt4
    from .torch_int8 import TorchInt8
    from .triton_int4 import TritonInt4
    from .triton_int8 import TritonInt8
    from .triton_int8_weights import TritonInt8Weights
    from .triton_nf4 import TritonNF4

    ours: list[Kernel] = [NativeInt8(), NativeExact(), TritonInt4(), TritonInt8(), TritonInt8Weights(), TritonNF4()]
    return [*ours, TorchInt4(), TorchInt8(), BitsAndBytesNF4(), Reference()]


def select(qtensor: QTensor, dtype: torch.dtype, device: torch.device, wanted: str = "auto") -> Selection:
    """The first kernel that does not reject, or the one asked for by name.

    Args:
        wanted: a kernel's name; "auto"; or "auto-bf16" for kernels that leave the inputs of weight-only schemes alone.

    Raises:
        ValueError: `wanted` is unknown, or it rejects this weight; the message says why.
    """
    kernels = registry()
    if wanted not in AUTOMATIC:
        named = [kernel for kernel in kernels if kernel.name == wanted]
        if not named:
            known = ", ".join(kernel.name for kernel in kernels)
            raise ValueError(f"kernel {wanted!r} is unknown; use {' or '.join(AUTOMATIC)}, or one of {known}")
        if reason := named[0].reject(qtensor, dtype, device):
            raise ValueError(f"kernel {wanted} cannot run {qtensor.scheme.name} here: {reason}; use auto")
        return Selection(named[0], {})
    rejected: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.reject(qtensor, dtype, device)
        if wanted == "auto-bf16" and kernel.quantizes_inputs and not qtensor.scheme.activations:
            reason = "quantizes its inputs, which are to stay as they are"
        if reason is None:
            return Selection(kernel, rejected)
        rejected[kernel.name] = reason
    raise AssertionError("the reference kernel rejects nothing")
