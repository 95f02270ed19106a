"""Presses decoder blocks for methods that learn: each on the outputs of the quantized blocks before it.

What a block reads and what it puts out lie on the disk, as work/states/<block>.safetensors: memory holds one batch of
them, and a run that was broken off goes on from exactly the same numbers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor

from ..methods.absmax import Absmax
from ..methods.base import Diagnostics
from ..methods.hessian import Hessian
from ..storage import files
from ..storage.checkpoint import Checkpoint
from .block_runner import Walk
from .plan import Plan, PlannedTensor, Unit
from .recipe import Recipe
from .weights import check_finite, layer_report, quantize_entry, read_ahead

WITNESS = "witness.safetensors"
WITNESS_TOKENS = 64
_FEW = 2  # times its inputs: an expert that saw fewer tokens is rounded by absmax
_HIDDEN = "hidden"
_STATES = "states"


class CalibratedBlocks:
    """work: where states/ and the witness go."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, recipe: Recipe, work: Path):
        assert recipe.calibration is not None
        self.checkpoint, self.plan, self.recipe = checkpoint, plan, recipe
        self.states, self.witness = work / _STATES, work / WITNESS
        # float16 activations overflow in many models that were trained in bfloat16
        dtype = torch.float32 if plan.dtype == torch.float16 else plan.dtype
        outside = [entry for entry in plan.tensors if entry.block is None]
        self.ids = recipe.calibration.ids
        self.walk = Walk(checkpoint, outside, self.ids, dtype, recipe.device)
        self.last = max(entry.block for entry in plan.tensors if entry.block is not None)
        self._embedded = False

    def state(self, block: int) -> Path:
        """The file of a block's inputs."""
        return self.states / f"{block:05d}.safetensors"

    def nbytes(self) -> int:
        """What the states take on the disk, at most three at a time."""
        width = getattr(self.plan.model.config.get_text_config(), "hidden_size", 0)
        return 3 * self.ids.numel() * width * self.walk.dtype.itemsize

    def _start(self, block: int) -> None:
        """Find out what blocks are called with, and block 0's inputs."""
        files.make_folder(self.states)
        for path in self.states.iterdir():  # what a run that was broken off did not come to delete
            if path != self.state(block):
                path.unlink()
        inputs = self.walk.embed()
        if block == 0:
            self._write(0, inputs)
        else:
            for _ in inputs:  # the state of this block is there; only the calls are wanted
                pass
        self._embedded = True

    def _write(self, block: int, parts: Iterator[Tensor]) -> dict[str, Any]:
        width = next(first := iter(parts))
        shape = (*self.ids.shape, width.shape[-1])

        def whole() -> Iterator[Tensor]:
            yield width
            yield from first

        return files.write_rows(self.state(block), _HIDDEN, width.dtype, shape, whole())

    def _inputs(self, block: int) -> Iterator[Tensor]:
        """A block's inputs, batch by batch."""
        return Checkpoint.single(self.state(block)).read_rows(_HIDDEN, map(len, self.walk.batches))

    def press(self, unit: Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a block's shard and its line in the journal; the next block's inputs are on the disk then."""
        block = unit.block
        assert block is not None
        if not self._embedded:
            self._start(block)
        digest = hashlib.sha256()
        weights: dict[str, Tensor] = {}
        for entry, tensor in read_ahead(self.checkpoint, unit, digest):
            check_finite(entry.info.name, tensor)
            weights[entry.info.name] = tensor
        self.walk.enter(block, ((entry, weights[entry.info.name]) for entry in unit.tensors))
        tensors = {entry.info.name: weights[entry.info.name] for entry in unit.tensors if not entry.spec}
        reports: dict[str, dict[str, Any]] = {}
        for entry, qtensor, diagnostics in self._quantized(block, unit, weights):
            self.walk.set_weight(entry, qtensor.dequantize(self.walk.dtype))
            written = self.plan.format.write(qtensor, self.plan.dtype)
            tensors |= {f"{entry.module}.{suffix}": tensor for suffix, tensor in written.items()}
            nbytes = sum(tensor.nbytes for tensor in written.values())
            reports[entry.module] = layer_report(entry, qtensor, diagnostics, nbytes)
        layers = [reports[entry.module] for entry in unit.tensors if entry.spec]
        line: dict[str, Any] = {"unit": unit.name, "source_sha256": digest.hexdigest(), "layers": layers}
        if block == self.last:
            outputs = self.walk.forward(0, next(self._inputs(block)))
            self.walk.leave()
            self._bear_witness(outputs)
        else:
            line["state"] = self._write(block + 1, self.walk.outputs(self._inputs(block)))
            self.walk.leave()
        return tensors, line

    def _quantized(
        self, block: int, unit: Unit, weights: dict[str, Tensor]
    ) -> Iterator[tuple[PlannedTensor, QTensor, Diagnostics]]:
        """Each layer, quantized on its inputs, which are collected at once, or (true_sequential) stage by stage."""
        groups = self.walk.sharing([entry for entry in unit.tensors if entry.spec], next(self._inputs(block)))
        for stage in self._stages(groups):
            hessians = self.walk.hessians(stage, self._inputs(block))
            for group in stage:
                hessian = hessians.pop(0)  # let go of as soon as it has served: it is the largest thing in memory
                for entry in group:
                    yield entry, *self._quantize(entry, weights.pop(entry.info.name), hessian)
                del hessian

    def _stages(self, groups: list[list[PlannedTensor]]) -> list[list[list[PlannedTensor]]]:
        if not any(getattr(spec.method, "true_sequential", False) for spec in self.recipe.rules.specs()):
            return [groups]
        stages: dict[str, list[list[PlannedTensor]]] = {}
        for group in groups:  # all experts of a kind are one stage
            stages.setdefault(group[0].target.parameter, []).append(group)
        return list(stages.values())

    def _quantize(self, entry: PlannedTensor, weight: Tensor, hessian: Hessian) -> tuple[QTensor, Diagnostics]:
        if entry.target.expert and hessian.tokens < _FEW * entry.shape[1]:
            qtensor, found = quantize_entry(entry, weight, self.plan, Absmax().quantize)
            note = f"rounded by absmax: it saw fewer than {_FEW * entry.shape[1]} tokens"
            return qtensor, replace(found, tokens=hessian.tokens, note=note)
        assert entry.spec
        learned = partial(entry.spec.method.quantize, hessian=hessian)
        return quantize_entry(entry, weight.to(self.walk.device), self.plan, learned)

    def _bear_witness(self, outputs: Tensor) -> None:
        """The logits that this very model, never saved and loaded, gives: what the reloaded one is compared with.

        Args:
            outputs: of the last block, for the first batch.
        """
        logits = self.walk.logits(outputs[:1])
        count = min(WITNESS_TOKENS, self.ids.shape[1])
        tensors = {"ids": self.ids[0, :count].clone(), "logits": logits[0, :count].clone()}
        files.write_safetensors(self.witness, tensors)

    def committed(self, block: int) -> None:
        """What the block read is not needed any more."""
        self.state(block).unlink(missing_ok=True)


def clear_states(work: Path) -> None:
    """The artifact is finished; of what it took to make it, only the witness is kept."""
    if (states := work / _STATES).exists():
        files.remove_folder(states)
