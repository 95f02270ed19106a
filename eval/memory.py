"""What a model takes: bytes of its weights, and the peak of the process that runs it."""

import resource
import sys
from pathlib import Path

import torch
from torch import nn


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once (tied weights are one).

    A tensor in oneDNN's own layout has no storage to ask; it counts by its elements.
    """
    opaque, storages = 0, {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_mkldnn:
            opaque += tensor.numel() * tensor.element_size()
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return opaque + sum(storages.values())


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes.

    Linux's ru_maxrss will not do: a new process starts with that of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda_bytes() -> int | None:
    """The most memory that torch has allocated on the current CUDA device so far; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
