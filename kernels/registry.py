"""Which kernel multiplies by a quantized weight, and why each of the others does not."""

from dataclasses import dataclass

import torch

from .base import Kernel
from .qtensor import QTensor

AUTOMATIC = ("auto", "auto-bf16")


@dataclass(frozen=True)
class Selection:
    """The kernel that was chosen, and for each that ranks above it, why it was not."""

    kernel: Kernel
    rejected: dict[str, str]


def registry() -> list[Kernel]:
    """Every kernel, the fastest first; `reference` serves everything and comes last."""
    from .cpu.native import NativeExact, NativeInt8
    from .external.bitsandbytes_nf4 import BitsAndBytesNF4
    from .external.torch_int4 import TorchInt4
    from .external.torch_int8 import TorchInt8
    from .reference import Reference
    from .triton.int4 import TritonInt4
    from .triton.int8 import TritonInt8Weights
    from .triton.int8_dynamic import TritonInt8
    from .triton.nf4 import TritonNF4

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
