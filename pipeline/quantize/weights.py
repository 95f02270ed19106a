"""One shard's tensors: each weight quantized by itself, everything else as it was."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import NumericsError
from ..methods.base import Diagnostics
from ..storage.checkpoint import Checkpoint
from ..system.threads import one_ahead
from .plan import Plan, PlannedTensor, Unit

_PIECE = 1 << 22
Quantize = Callable[[Tensor, Scheme, torch.dtype], tuple[QTensor, Diagnostics]]


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    pieces = tensor.flatten().split(_PIECE)  # a mask of all of it would take as much memory again
    if all(torch.isfinite(torch.stack(torch.aminmax(piece))).all() for piece in pieces if piece.numel()):
        return
    bad = ~torch.isfinite(tensor)
    first = [int(i) for i in bad.nonzero()[0]]
    raise NumericsError(
        f"{name}: {int(bad.sum())} of {tensor.numel()} values are NaN or infinite, the first at {first}; "
        "the checkpoint is damaged: get it again"
    )


def quantize_entry(
    entry: PlannedTensor, weight: Tensor, plan: Plan, quantize: Quantize | None = None
) -> tuple[QTensor, Diagnostics]:
    """One weight of the source, as it was read, as a QTensor, and what that cost.

    Args:
        quantize: in place of its spec's method.

    Raises:
        NumericsError: NaN or infinite values, or values that the format's scales cannot express.
    """
    check_finite(entry.info.name, weight)
    weight = weight.t().contiguous() if entry.kind == "conv1d" else weight
    try:
        assert entry.spec
        scale_dtype = plan.format.scale_dtype(entry.spec.scheme, plan.dtype)
        return (quantize or entry.spec.method.quantize)(weight, entry.spec.scheme, scale_dtype)
    except ValueError as error:
        raise NumericsError(
            f"{entry.info.name}: {error}; use format compressed-tensors with a bfloat16 or float32 checkpoint, "
            "or keep it by a rule, as in layers: {'NAME': none}"
        ) from error


def layer_report(entry: PlannedTensor, qtensor: QTensor, diagnostics: Diagnostics, nbytes: int) -> dict[str, Any]:
    return {
        "name": entry.module,
        "block": entry.block,
        "shape": list(entry.shape),
        "bytes": nbytes,
        "scheme": qtensor.scheme.name,
        "method": entry.spec.method.name if entry.spec else None,
        **{key: value for key, value in asdict(diagnostics).items() if value is not None},
    }


def read_ahead(checkpoint: Checkpoint, unit: Unit, digest: Any) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """Each entry with its tensor; the next one is read, and hashed, while this one is worked on."""
    tensors = one_ahead(lambda entry: checkpoint.read(entry.info.name, digest), unit.tensors)
    yield from zip(unit.tensors, tensors)


def quantize_unit(checkpoint: Checkpoint, plan: Plan, unit: Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and its line in the journal."""
    tensors: dict[str, Tensor] = {}
    layers = []
    digest = hashlib.sha256()
    for entry, tensor in read_ahead(checkpoint, unit, digest):
        if entry.spec is None:
            check_finite(entry.info.name, tensor)
            tensors[entry.info.name] = tensor
            continue
        qtensor, diagnostics = quantize_entry(entry, tensor, plan)
        written = plan.format.write(qtensor, plan.dtype)
        tensors |= {f"{entry.module}.{suffix}": tensor for suffix, tensor in written.items()}
        nbytes = sum(tensor.nbytes for tensor in written.values())
        layers.append(layer_report(entry, qtensor, diagnostics, nbytes))
    return tensors, {"unit": unit.name, "source_sha256": digest.hexdigest(), "layers": layers}
