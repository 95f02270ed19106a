"""What a checkpoint is, from its headers."""

from math import prod
from pathlib import Path
from typing import Any

from ..formats import count_schemes, open_quantized, quantization_section, quantized_cache, scheme_name
from ..formats.base import dtype_name
from ..storage.packed_file import PackedFile, PackedFileError, packed_files


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
    if cache := quantized_cache(checkpoint):
        description["key-value cache"] = cache.name
    if packed := packed_files(folder):
        description["packed weights"] = [f"{path}: {_packed(path)}" for path in packed]
    if len(counts) > 1:
        description["layers by scheme"] = [f"{name}: {count}" for name, count in sorted(counts.items())]
    return description


def _packed(path: Path) -> str:
    """What is to be said of a file of packed weights by its header."""
    try:
        file = PackedFile(path)
    except PackedFileError as error:
        return f"not used: {error}"
    return f"{len(file.header.get('layers', ()))} layers, {file.nbytes} bytes"
