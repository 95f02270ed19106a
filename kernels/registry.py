"""Which kernel multiplies by a quantized weight, and why each of the others does not."""

from dataclasses import dataclass

import torch

from . import reference
from .base import Kernel
from .discovery import discover
from .qtensor import QTensor

AUTOMATIC = ("auto", "auto-bf16")
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
        wanted: a kernel's name; "auto"; or "auto-bf16" for kernels that leave the inputs of weight-only schemes alone.

    Raises:
        ValueError: `wanted` is unknown, or cannot serve this weight; the message says why.
    """
    kernels = registry()
    if wanted not in AUTOMATIC:
        named = [kernel for kernel in kernels if kernel.name == wanted]
        if not named:
            known = ", ".join(kernel.name for kernel in kernels)
            raise ValueError(f"kernel {wanted!r} is unknown; use {' or '.join(AUTOMATIC)}, or one of {known}")
        if reason := named[0].unsupported(qtensor, dtype, device):
            raise ValueError(f"kernel {wanted} cannot run {qtensor.scheme.name} here: {reason}; use auto")
        return Selection(named[0], {})
    rejected: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.unsupported(qtensor, dtype, device)
        if wanted == "auto-bf16" and kernel.rounds_weight_only_inputs and qtensor.scheme.activations is None:
            reason = "quantizes its inputs, which are to stay as they are"
        if reason is None:
            return Selection(kernel, rejected)
        rejected[kernel.name] = reason
    raise AssertionError("the reference kernel serves everything")
