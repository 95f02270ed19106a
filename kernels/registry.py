"""Which kernel multiplies by a quantized weight, and why each of the others does not."""

from dataclasses import dataclass

import torch

from . import reference
from .base import Kernel
from .discovery import discover
from .qtensor import QTensor

# Of each choice that is no kernel's name: to how few bits a kernel may round the inputs of weight-only schemes,
# ordinary ones and outliers; None: to none.
AUTOMATIC: dict[str, tuple[int, int] | None] = {
    "auto": (8, 16), "auto-int16": (16, 16), "auto-int8": (8, 8), "auto-bf16": None,
}  # fmt: skip
_PACKAGES = ("bitpress.kernels.cpu", "bitpress.kernels.triton", "bitpress.kernels.external")


@dataclass(frozen=True)
class Selection:
    """The kernel that was chosen, and for each that ranks above it, why it was not."""

    kernel: Kernel
    rejected: dict[str, str]


def registry() -> list[Kernel]:
    """Every kernel, the fastest first; `reference` serves everything and comes last."""
    kernels = [kernel for package in _PACKAGES for kernel in discover(package)]
    return sorted([*kernels, *reference.PLUGINS], key=lambda kernel: kernel.rank)


def select(qtensor: QTensor, dtype: torch.dtype, device: torch.device, wanted: str = "auto") -> Selection:
    """The first kernel that can serve this weight, or the one that is asked for by name.

    Args:
        wanted: a kernel's name; or one of AUTOMATIC: "auto" for kernels that round the inputs of weight-only schemes by
            so little that it adds next to nothing to what the weights lose; "auto-int16" for those that round all to 16
            bits; "auto-int8" for faster ones that may round outliers to 8 bits, too, and with them what lies beside
            them; "auto-bf16" for those that leave inputs alone.

    Raises:
        ValueError: `wanted` is unknown, or cannot serve this weight; the message says why.
    """
    kernels = registry()
    if wanted not in AUTOMATIC:
        named = [kernel for kernel in kernels if kernel.name == wanted]
        if not named:
            known = ", ".join(kernel.name for kernel in kernels)
            raise ValueError(f"kernel {wanted!r} is unknown; use {', '.join(AUTOMATIC)}, or one of {known}")
        if reason := named[0].unsupported(qtensor, dtype, device):
            raise ValueError(f"kernel {wanted} cannot run {qtensor.scheme.name} here: {reason}; use auto")
        return Selection(named[0], {})
    rejected: dict[str, str] = {}
    least = AUTOMATIC[wanted]
    for kernel in kernels:
        reason = kernel.unsupported(qtensor, dtype, device)
        bits = kernel.input_bits
        weight_only = reason is None and qtensor.scheme.activations is None
        if weight_only and bits is not None and (least is None or bits[0] < least[0] or bits[1] < least[1]):
            reason = f"rounds inputs to {_words(bits)}; {wanted} asks for {_words(least)}"
        if reason is None:
            return Selection(kernel, rejected)
        rejected[kernel.name] = reason
    raise AssertionError("the reference kernel serves everything")


def _words(bits: tuple[int, int] | None) -> str:
    if bits is None:
        return "inputs that stay as they are"
    return f"{bits[0]} bits" if bits[0] == bits[1] else f"{bits[0]} bits, and outliers to {bits[1]}"
