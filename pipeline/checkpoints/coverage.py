"""How much of a checkpoint is quantized, layer by layer, from its headers."""

from math import prod
from typing import Any

from ..formats import quantization_section
from ..models.quantized import QuantizedCheckpoint, read_quantized
from ..models.structure import TensorNames, skeleton
from ..storage.checkpoint import Checkpoint, TensorInfo


def coverage_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's files hold, whoever wrote them: as "coverage" in metrics.json, without the errors of layers.

    Raises:
        CheckpointError: the files do not fit their config.json.
    """
    if quantization_section(checkpoint) is None:
        names = TensorNames(skeleton(checkpoint))
        kept = [_kept(checkpoint, info, names) for info in checkpoint.tensors.values()]
        return _coverage([], kept, 0)
    contents = read_quantized(checkpoint)
    layers = [_layer(checkpoint, contents, name) for name in contents.quantized]
    kept = [_kept(checkpoint, checkpoint.tensors[name], contents.names) for name in contents.plain]
    return _coverage(layers, kept, contents.model.dtype.itemsize)


def _coverage(layers: list[dict[str, Any]], kept: list[dict[str, Any]], itemsize: int) -> dict[str, Any]:
    """itemsize: bytes of a weight before it was quantized."""
    quantized = itemsize * sum(prod(layer["shape"]) for layer in layers if layer["block"] is not None)
    total = quantized + sum(tensor["bytes"] for tensor in kept if tensor["block"] is not None)
    share = quantized / total if total else 0.0
    return {"decoder_bytes": total, "quantized_bytes": quantized, "share": share, "layers": layers, "kept": kept}


def _layer(checkpoint: Checkpoint, contents: QuantizedCheckpoint, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "block": contents.names.block(contents.quantized[name].parameter),
        "shape": list(contents.shapes[name] or ()),
        "bytes": sum(checkpoint.tensors[tensor].nbytes for tensor in contents.tensors_of(checkpoint, name)),
        "scheme": contents.schemes[name].name,
    }


def _kept(checkpoint: Checkpoint, info: TensorInfo, names: TensorNames) -> dict[str, Any]:
    return {
        "name": info.name,
        "block": names.block(names.target(info.name).parameter),
        "shape": list(info.shape),
        "bytes": checkpoint.stored_bytes(info.name),
        "reason": "not quantized in the files",
    }
