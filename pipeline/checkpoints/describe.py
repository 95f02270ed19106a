"""What is here: of a checkpoint, from its headers; of bitpress, from its registries."""

from math import prod
from pathlib import Path
from typing import Any

import torch

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry as kernels
from bitpress.kernels.scheme import Scheme

from ..formats import registry as formats
from ..methods import registry as methods
from ..models.quantized import Layout, detect_scheme, read_layout
from ..models.structure import TensorNames, skeleton
from ..storage.checkpoint import Checkpoint, TensorInfo

_SCHEMES = ("int4-g128", "int4-g128-asym", "int4-channel", "int8-dynamic", "nf4", "nf4-dq")


def describe(folder: Path) -> dict[str, Any]:
    """Architecture, tensors, bytes, and how it is quantized, from config.json and the safetensors headers.

    Raises:
        CheckpointError: what is wrong with the files.
    """
    checkpoint = Checkpoint(folder)
    config, infos = checkpoint.config, checkpoint.tensors.values()
    found: dict[str, Any] = {
        "architecture": ", ".join(config.get("architectures") or ["?"]),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "?",
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in infos),
    }
    by_dtype: dict[str, int] = {}
    for info in infos:
        name = str(info.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + info.nbytes
    found["bytes by dtype"] = [f"{name}: {count}" for name, count in sorted(by_dtype.items())]
    if "quantization_config" not in config:
        return found | {"quantized": "no", "parameters": sum(prod(info.shape) for info in infos)}
    format, scheme = detect_scheme(checkpoint)
    layers = [name for name in checkpoint.tensors if name.endswith(f".{format.marker}")]
    return found | {"quantized": scheme.name, "format": format.name, "quantized layers": len(layers)}


def coverage_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's files hold, whoever wrote them: as "coverage" in metrics.json, without the errors of layers.

    Raises:
        CheckpointError: the files do not fit their config.json.
    """
    if "quantization_config" not in checkpoint.config:
        names = TensorNames(skeleton(checkpoint))
        kept = [_kept(info, names) for info in checkpoint.tensors.values()]
        return _coverage([], kept, 0)
    layout = read_layout(checkpoint)
    layers = [_layer(checkpoint, layout, name) for name in layout.quantized]
    kept = [_kept(checkpoint.tensors[name], layout.names) for name in layout.plain]
    return _coverage(layers, kept, layout.model.dtype.itemsize)


def _coverage(layers: list[dict[str, Any]], kept: list[dict[str, Any]], itemsize: int) -> dict[str, Any]:
    """itemsize: bytes of a weight before it was quantized."""
    done = itemsize * sum(prod(layer["shape"]) for layer in layers)
    total = done + sum(tensor["bytes"] for tensor in kept if tensor["block"] is not None)
    share = done / total if total else 0.0
    return {"decoder_bytes": total, "quantized_bytes": done, "share": share, "layers": layers, "kept": kept}


def _layer(checkpoint: Checkpoint, layout: Layout, name: str) -> dict[str, Any]:
    parts = (checkpoint.tensors.get(f"{name}.{suffix}") for suffix in layout.format.suffixes)
    return {
        "name": name,
        "block": layout.names.block(layout.quantized[name].parameter),
        "shape": list(layout.shapes[name] or ()),
        "bytes": sum(info.nbytes for info in parts if info),
    }


def _kept(info: TensorInfo, names: TensorNames) -> dict[str, Any]:
    block = names.block(names.target(info.name).parameter)
    why = "not quantized in the files"
    return {"name": info.name, "block": block, "shape": list(info.shape), "bytes": info.nbytes, "reason": why}


def catalogue() -> dict[str, dict[str, str]]:
    """{"methods", "formats", "kernels"}: name -> what it serves, or why it cannot run here."""
    schemes = {name: Scheme.parse(name) for name in _SCHEMES}

    def served(problems: Any) -> str:
        return ", ".join(name for name, scheme in schemes.items() if not problems(scheme))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "methods": {name: served(method.problems) for name, method in methods().items()},
        "formats": {
            name: served(lambda scheme, fmt=fmt: fmt.problems(scheme, (1024, 1024))) for name, fmt in formats().items()
        },
        f"kernels on {device.type}": {
            kernel.name: _serves(kernel, list(schemes.values()), device) for kernel in kernels()
        },
    }


def _serves(kernel: Any, schemes: list[Scheme], device: torch.device) -> str:
    reasons = {}
    for scheme in schemes:
        probe = QTensor.without_content(scheme, (1024, 1024))
        reasons[scheme.name] = kernel.unsupported(probe, torch.bfloat16, device)
    usable = [name for name, reason in reasons.items() if reason is None]
    own = [reason for name, reason in reasons.items() if reason]
    about = f"; {about}" if usable and (about := kernel.about()) else ""
    return f"{', '.join(usable)} (bfloat16){about}" if usable else f"not here: {own[-1]}"
