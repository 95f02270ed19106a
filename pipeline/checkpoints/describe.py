"""What a checkpoint is, from its headers; what bitpress has, from its registries."""

from math import prod
from pathlib import Path
from typing import Any

import torch

from bitpress.kernels.base import Kernel
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry as kernels
from bitpress.kernels.scheme import Scheme, examples

from ..formats import count_schemes, open_quantized, quantization_section, scheme_name
from ..formats import registry as formats
from ..formats.base import dtype_name
from ..methods import registry as methods
from ..transforms import registry as transforms

_PROBE = (1024, 1024)


def describe(folder: Path) -> dict[str, Any]:
    """Architecture, tensors, bytes, and how it is quantized, from config.json and the safetensors headers.

    Raises:
        CheckpointError: what is wrong with the files.
    """
    checkpoint = open_quantized(folder)
    config, infos = checkpoint.config, checkpoint.stored.values()
    description: dict[str, Any] = {
        "architecture": ", ".join(config.get("architectures") or ["?"]),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "?",
        "files": len(checkpoint.files),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
    }
    by_dtype: dict[str, int] = {}
    for info in infos:
        name = dtype_name(info.dtype)
        by_dtype[name] = by_dtype.get(name, 0) + info.nbytes
    description["bytes by dtype"] = [f"{name}: {count}" for name, count in sorted(by_dtype.items())]
    if quantization_section(checkpoint) is None:
        plain = {"quantized": "no", "parameters": sum(prod(info.shape) for info in checkpoint.tensors.values())}
        return description | plain | ({"source": checkpoint.dequantization} if checkpoint.dequantization else {})
    format, counts = count_schemes(checkpoint)
    description |= {
        "quantized": scheme_name(counts),
        "format": format.name,
        "quantized layers": sum(counts.values()),
    }
    if len(counts) > 1:
        description["layers by scheme"] = [f"{name}: {count}" for name, count in sorted(counts.items())]
    return description


def catalogue() -> dict[str, dict[str, str]]:
    """{"transforms", "methods", "formats", "kernels"}: name -> what it serves, or why it cannot run here."""
    schemes = [Scheme.parse(name) for name in examples()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "transforms": {name: transform.about for name, transform in transforms().items()},
        "methods": {
            name: ", ".join(scheme.name for scheme in schemes if not method.problems(scheme))
            for name, method in methods().items()
        },
        "formats": {
            name: ", ".join(scheme.name for scheme in schemes if not format.problems(scheme, _PROBE))
            for name, format in formats().items()
        },
        f"kernels on {device.type}": {kernel.name: _serves(kernel, schemes, device) for kernel in kernels()},
    }


def _serves(kernel: Kernel, schemes: list[Scheme], device: torch.device) -> str:
    reasons = {
        scheme.name: kernel.unsupported(QTensor.without_content(scheme, _PROBE), torch.bfloat16, device)
        for scheme in schemes
    }
    usable = [name for name, reason in reasons.items() if reason is None]
    refusals = [reason for reason in reasons.values() if reason]
    about = f"; {kernel.about()}" if usable and kernel.about() else ""
    return f"{', '.join(usable)} (bfloat16){about}" if usable else f"not here: {refusals[-1]}"
