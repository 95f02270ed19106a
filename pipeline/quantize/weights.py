"""Quantizes the weights of one shard, each by itself; all other tensors stay as they are."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.integer import smallest_scale

from ..errors import ConfigError, NumericsError
from ..formats.base import Writer
from ..methods import uncalibrated_method
from ..methods.base import Diagnostics, Method
from ..models.structure import fused_unit
from ..storage.checkpoint import Checkpoint
from ..storage.finite import check_finite
from ..system.threads import one_ahead
from .plan import Plan, PlannedTensor, Unit
from .recipe import Recipe
from .spec import LayerSpec
from .statistics import Statistics

_FEW = 2  # times its inputs: an expert that saw fewer tokens is rounded to nearest


def with_common_scales(unit: Unit, read: Callable[[PlannedTensor], Tensor]) -> Unit:
    """The unit, its schemes knowing what layers must have in common that servers fuse (see WeightType)."""
    parts: dict[tuple[str, Scheme], list[PlannedTensor]] = {}
    for planned in unit.tensors:
        if planned.spec and hasattr(planned.spec.scheme.weight, "fused"):
            parts.setdefault((fused_unit(planned.module), planned.spec.scheme), []).append(planned)
    specs: dict[str, LayerSpec] = {}
    for (_, scheme), layers in parts.items():
        if len(layers) == 1:  # it has its own anyhow
            continue
        common = replace(scheme, weight=scheme.weight.fused(map(read, layers)))  # type: ignore[attr-defined]
        specs |= {each.info.name: replace(each.spec, scheme=common) for each in layers if each.spec}
    return replace(unit, tensors=[replace(each, spec=specs.get(each.info.name, each.spec)) for each in unit.tensors])


class UnitWriter:
    """Adds a unit's tensors to the artifact's next shard, and reports on each quantized layer."""

    def __init__(self, unit: Unit, writer: Writer):
        self.unit, self.writer = unit, writer
        self._reports: dict[str, dict[str, Any]] = {}

    def keep(self, planned: PlannedTensor, tensor: Tensor) -> None:
        """Add a tensor that is not quantized."""
        self.writer.add(planned.info.name, tensor)

    def add(self, planned: PlannedTensor, qtensor: QTensor, diagnostics: Diagnostics) -> None:
        """Add a quantized layer."""
        assert planned.spec
        self._reports[planned.module] = {
            "name": planned.module,
            "block": planned.block,
            "shape": list(planned.shape),
            "bytes": self.writer.add(planned.module, qtensor),
            "scheme": qtensor.scheme.name,
            "method": planned.spec.method.name,
            **{key: value for key, value in asdict(diagnostics).items() if value is not None},
        }

    def line(self, source_digest: Any) -> dict[str, Any]:
        """The shard's line in the journal; its layers are in the order of the plan.

        Args:
            source_digest: the hash object that the unit's tensors were read with.
        """
        layers = [self._reports[planned.module] for planned in self.unit.tensors if planned.spec]
        return {"unit": self.unit.name, "source_sha256": source_digest.hexdigest(), "layers": layers}


def quantize_weight(
    planned: PlannedTensor,
    weight: Tensor,
    plan: Plan,
    method: Method | None = None,
    statistics: tuple[Any, ...] = (),
) -> tuple[QTensor, Diagnostics]:
    """A layer's weight as a QTensor, and what that cost.

    Args:
        weight: as the files store it.
        method: in place of the method that is planned. statistics: of the layer's inputs, as the method wants them.
    Raises:
        NumericsError: NaN or infinite values, or values that the format's scales cannot express.
    """
    assert planned.spec
    scheme = planned.spec.scheme
    check_finite(planned.info.name, weight)
    weight = planned.turned(weight)
    try:
        scale_dtype = plan.format.scale_dtype(scheme, plan.dtype)
        qtensor, diagnostics = (method or planned.spec.method).quantize(weight, scheme, scale_dtype, statistics)
        notes = [note for note in (diagnostics.note, _note_on_scales(qtensor)) if note]
        return qtensor, replace(diagnostics, note="; ".join(notes) or None)
    except ValueError as error:
        raise NumericsError(
            f"{planned.info.name}: {error}; use format compressed-tensors with a bfloat16 or float32 checkpoint, "
            "or keep it by a rule, as in layers: {'NAME': none}"
        ) from error


def diagnosed(planned: PlannedTensor, weight: Tensor, qtensor: QTensor, before: Diagnostics) -> Diagnostics:
    """The diagnostics of a layer whose codes and scales were changed after `before` was taken.

    The error of its outputs is left out: it was that of the layer by itself, and is no longer known.

    Args:
        weight: as the files store it.
    """
    wide = (weight.t() if planned.kind == "conv1d" else weight).to(torch.float32)
    lost, norm = (wide - qtensor.dequantize().to(wide.device)).norm(), wide.norm()
    return replace(before, relative_error=(lost / norm).item() if norm else 0.0, output_error=None)


def _note_on_scales(qtensor: QTensor) -> str | None:
    """A sentence where some scales are the smallest of their dtype, which may stand for smaller ones; None where none.

    Raises:
        ValueError: most scales are: what the layer computed is lost.
    """
    dtype = qtensor.scales.dtype
    if qtensor.scheme.weight.description().type != "int" or not dtype.is_floating_point:
        return None
    smallest = smallest_scale(dtype)
    raised, total = int((qtensor.scales <= smallest).sum()), qtensor.scales.numel()
    what = f"{raised} of {total} scales are too small for {dtype}, which has none below {smallest:.2g}"
    if 2 * raised > total:
        raise ValueError(what)
    return f"{what}; they were raised to that, and the error of their weights with them" if raised else None


def quantize_outside(planned: PlannedTensor, weight: Tensor, plan: Plan) -> tuple[QTensor, Diagnostics]:
    """A layer that no calibration reaches, such as a head or an embedding, as quantize_weight gives it.

    Calibration goes through the decoder blocks only. So a layer outside of them whose method wants statistics of its
    inputs is rounded to nearest, and the diagnostics say so.

    Raises:
        ConfigError: only methods that are calibrated can produce the layer's scheme.
    """
    assert planned.spec
    method = planned.spec.method
    if not method.statistics:
        return quantize_weight(planned, weight, plan)
    return round_uncalibrated(planned, weight, plan, f"{method.name} is calibrated inside the decoder blocks only")


def round_uncalibrated(planned: PlannedTensor, weight: Tensor, plan: Plan, why: str) -> tuple[QTensor, Diagnostics]:
    """A layer rounded to nearest in place of its method; the diagnostics say why.

    Raises:
        ConfigError: only methods that are calibrated can produce the layer's scheme.
    """
    assert planned.spec
    scheme = planned.spec.scheme
    nearest = uncalibrated_method(scheme)
    if nearest is None:
        raise ConfigError(
            f"{planned.module}: {why}, and no method makes {scheme.name} without calibration; give the layer another "
            f"scheme by a rule, or keep it, as in layers: {{'{planned.module}': none}} "
            f"(--layer '{planned.module}=none')"
        )
    qtensor, diagnostics = quantize_weight(planned, weight, plan, nearest)
    note = f"rounded by {nearest.name}: {why}"
    return qtensor, replace(diagnostics, note=f"{note}; {diagnostics.note}" if diagnostics.note else note)


def quantize_calibrated(
    planned: PlannedTensor, weight: Tensor, plan: Plan, statistics: Statistics, recipe: Recipe
) -> tuple[QTensor, Diagnostics]:
    """A layer by its method, from statistics of its inputs, and what is stored of these where they are static.

    An expert that saw too few tokens to be calibrated is rounded to nearest.

    Raises:
        ConfigError: inputs that are to be calibrated were never seen.
    """
    assert planned.spec
    method = planned.spec.method
    own = tuple(statistics[kind] for kind in method.statistics)
    needed = _FEW * planned.shape[1]
    few = min((each.tokens for each in own), default=needed)
    if not planned.target.expert or few >= needed or uncalibrated_method(planned.spec.scheme) is None:
        weight = weight.to(recipe.device) if own else weight
        qtensor, diagnostics = quantize_weight(planned, weight, plan, method, own)
    else:
        qtensor, diagnostics = round_uncalibrated(planned, weight, plan, f"it saw fewer than {needed} tokens")
        diagnostics = replace(diagnostics, tokens=few)
    if static := planned.spec.scheme.static:
        seen = {kind: statistics[kind] for kind in static.statistics}
        if not all(each.tokens for each in seen.values()):
            raise unseen(planned, "no calibration token reaches it; give more or other calibration text")
        inputs = static.tensors(seen, recipe.observer or static.observers[0])
        qtensor = replace(qtensor, extra={**qtensor.extra, **inputs})
    return qtensor, diagnostics


def quantize_unreached(planned: PlannedTensor, weight: Tensor, plan: Plan) -> tuple[QTensor, Diagnostics]:
    """A layer of a block that text alone does not go through, rounded to nearest.

    Raises:
        ConfigError: its inputs are to be calibrated; or only calibrated methods can produce its scheme.
    """
    why = "text alone does not go through its block"
    if planned.spec and planned.spec.scheme.static:
        raise unseen(planned, why)
    qtensor, diagnostics = round_uncalibrated(planned, weight, plan, why)
    return qtensor, replace(diagnostics, tokens=0)


def unseen(planned: PlannedTensor, why: str) -> ConfigError:
    """The refusal of a layer whose inputs are to be calibrated, and never seen."""
    assert planned.spec
    return ConfigError(
        f"{planned.module}: {planned.spec.scheme.name} calibrates its inputs, and {why}; or give the layer another "
        f"scheme by a rule, as in layers: {{'{planned.module}': int8-channel}} "
        f"(--layer '{planned.module}=int8-channel')"
    )


def read_ahead(checkpoint: Checkpoint, unit: Unit, digest: Any) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """Each planned tensor and its values; the next one is read, and hashed, while this one is worked on."""
    tensors = one_ahead(lambda planned: checkpoint.read(planned.info.name, digest), unit.tensors)
    yield from zip(unit.tensors, tensors)


def quantize_unit(plan: Plan, unit: Unit, writer: Writer) -> dict[str, Any]:
    """Add a unit's tensors to the writer's next shard; returns the shard's line in the journal.

    Raises:
        NumericsError: NaN or infinite values, or values that the format's scales cannot express.
    """
    unit = with_common_scales(unit, lambda planned: plan.checkpoint.read(planned.info.name))
    shard, digest = UnitWriter(unit, writer), hashlib.sha256()
    for planned, tensor in read_ahead(plan.checkpoint, unit, digest):
        if planned.spec is None:
            check_finite(planned.info.name, tensor)
            shard.keep(planned, tensor)
        elif planned.block is None:
            shard.add(planned, *quantize_outside(planned, tensor, plan))
        else:
            shard.add(planned, *quantize_weight(planned, tensor, plan))
    return shard.line(digest)
