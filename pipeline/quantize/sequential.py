"""Quantizes decoder blocks one after the other, each on the outputs of the quantized blocks before it.

That is how GPTQ goes through a model (arXiv 2210.17323, section 4). What a block reads and what it puts out lie on the
disk, as work/states/<block>.safetensors: memory holds one batch of them, and a run that was broken off goes on from
exactly the same numbers.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitpress.kernels.kv_cache import static
from bitpress.kernels.qtensor import QTensor

from ..errors import ConfigError, LockedError, NumericsError
from ..formats.base import Writer, group_by_bytes
from ..methods.base import Diagnostics, Method, Tuned
from ..models.kv_cache import CachePeaks, CacheRounding, intercept
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..storage.finite import check_finite
from ..system.progress import OnStep
from ..system.threads import divided
from ..transforms.base import Transformed
from .block_runner import PROBE_TOKENS, BlockRunner, BlockView, Stored, TrainableBlock, apart
from .inputs import best_observer
from .plan import Plan, PlannedTensor, Unit
from .recipe import Recipe
from .spec import LayerSpec
from .statistics import Kinds, SharedStatistics, Statistics
from .weights import (
    UnitWriter,
    diagnosed,
    quantize_calibrated,
    quantize_outside,
    quantize_unreached,
    read_ahead,
    with_common_scales,
)

REFERENCE_LOGITS = "reference_logits.safetensors"
# Bytes of experts' statistics that are in memory at a time. 128 experts of Qwen3-MoE have Hessians of 4.6 GB, which
# take nine passes over the tokens so.
MOST_STATISTICS = 1 << 29
LEAST_BATCHES = 8  # for a method that learns from one batch after the other, and holds one out
_HIDDEN = "hidden"
_EXPECTED = "expected"  # outputs of an unquantized block
_STATES = "states"


class Solutions(Protocol):
    """Blocks that were transformed, and their layers quantized, before."""

    def solution(self, planned: PlannedTensor) -> tuple[QTensor, Diagnostics]:
        """A layer as it was quantized by the spec that it has."""

    def read(self, planned: PlannedTensor) -> Tensor:
        """A tensor before it is quantized, as the recipe's transform left it."""

    def transformed(self, block: int) -> list[Transformed]:
        """What the transform did to a block."""


class CalibratedBlocks:
    """The decoder blocks of a recipe of which some method is calibrated."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        work: Path,
        solved: Solutions | None = None,
        shared: SharedStatistics | None = None,
    ):
        """Build the model; no weight is read yet.

        Args:
            work: the folder of states/ and of the reference logits.
            solved: layers that were quantized before; None to quantize them here.
            shared: where other recipes may have statistics of blocks that nothing has changed.
        """
        assert recipe.calibration is not None
        self.checkpoint, self.plan, self.recipe, self.shared = plan.checkpoint, plan, recipe, shared
        self.transform = recipe.transform
        self.states, self.reference_logits, self.solved = work / _STATES, work / REFERENCE_LOGITS, solved
        dtype = plan.activation_dtype
        outside = [planned for planned in plan.tensors if planned.block is None]
        self.ids = recipe.calibration.ids
        tuning = [method for spec in recipe.rules.specs() if (method := spec.method).learns]
        least = LEAST_BATCHES if tuning else 1
        self.runner = BlockRunner(
            plan.checkpoint, outside, self.ids, dtype, recipe.device, self._read_outside, least, recipe.more_devices
        )
        if tuning and len(self.runner.batches) < 2:
            raise ConfigError(
                f"{tuning[0].name} was given 1 window of calibration text, and holds some out to judge what it learns "
                "from the others; give at least 2 (calibration: {windows: 128})"
            )
        blocks = [planned.block for planned in plan.tensors if planned.block is not None]
        self.first, self.last = min(blocks), max(blocks)
        # blocks are changed before their statistics are gathered
        self.changes = bool(recipe.transform) or any(spec.method.transforms for spec in recipe.specs())
        self._embedded = False
        self.changed: dict[str, Tensor] = {}
        self.transformed: list[Transformed] = []

    def _read_outside(self, planned: PlannedTensor) -> Stored:
        """A tensor outside the blocks as the artifact will give it back."""
        tensor = self.checkpoint.read(planned.info.name)
        return quantize_outside(planned, tensor, self.plan)[0] if planned.spec else tensor

    def state(self, block: int) -> Path:
        """The file of a block's inputs."""
        return self.states / f"{block:05d}.safetensors"

    def nbytes(self) -> int:
        """What the states take on the disk, at most four at a time: with a block's expected outputs."""
        width = getattr(self.plan.model.config.get_text_config(), "hidden_size", 0)
        return 4 * self.ids.numel() * width * self.runner.dtype.itemsize

    def _start(self, block: int) -> None:
        """Note what blocks are called with, and write block 0's inputs."""
        files.make_folder(self.states)
        for path in self.states.iterdir():  # what a run that was broken off left behind
            if path != self.state(block):
                path.unlink()
        inputs = self.runner.embed()
        if block == 0:
            self._write_state(0, inputs, lambda: self.runner.probe_inputs)
        else:
            for _ in inputs:  # the state of this block exists; only the calls are wanted
                pass
        self._embedded = True

    def _write(self, path: Path, batches: Iterator[Tensor], more: int = 0) -> dict[str, Any]:
        """Write hidden states, of as many windows as there are and some more; returns the file's size and hash."""
        first = next(batches)
        windows, context = self.ids.shape
        shape = (windows + more, context, first.shape[-1])
        return files.write_rows(path, _HIDDEN, first.dtype, shape, chain([first], batches))

    def _write_state(self, block: int, batches: Iterator[Tensor], probe: Callable[[], Tensor]) -> dict[str, Any]:
        """Write a block's inputs, and after them the probe's, as a window whose other tokens are 0."""

        def window() -> Iterator[Tensor]:
            own = probe()
            yield nn.functional.pad(own, (0, 0, 0, self.ids.shape[1] - own.shape[1]))

        return self._write(self.state(block), chain(batches, window()), 1)

    def _go_on(self, block: int) -> dict[str, Any]:
        """Write the next block's inputs, which the block as it is puts out."""
        outputs = self.runner.outputs(self._inputs(block))
        return self._write_state(block + 1, outputs, lambda: self.runner.forward_probe(self._probe(block)))

    def _probe(self, block: int) -> Tensor:
        """The probe's inputs of a block, [1, tokens, hidden]."""
        (window,) = Checkpoint.single(self.state(block)).read_rows(_HIDDEN, [1], len(self.ids))
        return window[:, : self.runner.probe.shape[1]]

    def _inputs(self, block: int) -> Iterator[Tensor]:
        """A block's inputs, batch by batch."""
        return Checkpoint.single(self.state(block)).read_rows(_HIDDEN, map(len, self.runner.batches))

    def _batch(self, path: Path, number: int) -> Tensor:
        """One batch of hidden states."""
        counts = [len(batch) for batch in self.runner.batches]
        return next(Checkpoint.single(path).read_rows(_HIDDEN, [counts[number]], sum(counts[:number])))

    def _load(self, unit: Unit, digest: Any) -> dict[str, Tensor]:
        """Put a block into the model; returns its tensors by name, hashed on the way."""
        weights: dict[str, Tensor] = {}
        for planned, tensor in read_ahead(self.checkpoint, unit, digest):
            check_finite(planned.info.name, tensor)
            weights[planned.info.name] = tensor
        assert unit.block is not None
        self.runner.load_block(unit.block, ((planned, weights[planned.info.name]) for planned in unit.tensors))
        return weights

    def quantize_block(self, unit: Unit, writer: Writer, on_part: OnStep = lambda done, total: None) -> dict[str, Any]:
        """Add a block's tensors to the writer's next shard; returns the shard's line in the journal.

        Args:
            on_part: called with (parts of the block done, parts in all) where a method takes long over it.

        Afterwards the next block's inputs are on the disk or, after the last block, the reference logits.

        Raises:
            NumericsError: weights or inputs that are not finite, or weights that the format cannot express.
        """
        block = unit.block
        assert block is not None
        if not self._embedded:
            self._start(block)
        digest = hashlib.sha256()
        weights = self._load(unit, digest)
        methods: list[Method] = []
        for planned in unit.tensors if self.runner.reached(block) else ():
            if planned.spec and planned.spec.method not in methods:
                methods.append(planned.spec.method)
        if self.solved and self.transform:
            for planned in unit.tensors:
                weights[planned.info.name] = tensor = self.solved.read(planned)
                self.runner.set_tensor(planned, tensor)
            transformed = self.solved.transformed(block)
        else:
            transformed = self._transform(block, unit, weights)
        for method in methods:
            method.transform(BlockView(self.runner, unit.tensors, weights, lambda: self._inputs(block), method))
        unit = with_common_scales(unit, lambda planned: weights[planned.info.name])
        shard = UnitWriter(unit, writer)
        for planned in unit.tensors:
            if planned.spec is None:
                shard.keep(planned, weights.pop(planned.info.name))
        tuning = [method for method in methods if method.learns]
        if not tuning:
            for planned, qtensor, diagnostics in self._quantized(block, unit, weights):
                shard.add(planned, qtensor, diagnostics)
        tuned = self._tune(block, unit, weights, tuning, shard, on_part) if tuning else []
        self._round_cache(block, writer)
        line = shard.line(digest)
        if tuned:
            line["tuned"] = [{"block": block, **asdict(each)} for each in tuned]
        if self.transform:
            line["transform"] = [asdict(each) for each in transformed]
        if block == self.last:
            outputs = self.runner.forward_probe(self._probe(block))
            self.runner.unload_block()
            self._save_reference_logits(outputs)
        else:
            line["state"] = self._go_on(block)
            self.runner.unload_block()
        return line

    def _round_cache(self, block: int, writer: Writer) -> None:
        """From now on the block's attention rounds its keys and values; their scales go into the shard.

        The scales are set by what the block puts into its cache once its layers are quantized.

        Raises:
            ConfigError: they are to be calibrated, and text alone does not go through the block.
        """
        planned, prefix = self.plan.cache, f"{self.runner.path}.{block}."
        if planned is None:
            return
        paths = [path for path in planned.shapes if path.startswith(prefix)]
        calibrated = static(planned.cache)
        peaks = self._cache_peaks(block, paths) if calibrated else {}
        for path in paths:
            scales = [calibrated.scale(peak) for peak in peaks[path]] if calibrated else []
            for name, scale in zip(planned.scales.get(path, ()), scales):
                writer.add(name, scale)
            intercept(self.runner.model.get_submodule(path), CacheRounding(planned.cache, *scales))

    def _cache_peaks(self, block: int, paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Attention -> the largest magnitude of each head's keys, and of its values, over the calibration text."""
        peaks = {path: CachePeaks() for path in paths}
        handles = [intercept(self.runner.model.get_submodule(path), own) for path, own in peaks.items()]
        for _ in self.runner.outputs(self._inputs(block)) if paths else ():
            pass
        for handle in handles:
            handle.remove()
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for path, own in peaks.items():
            if own.peaks is None:
                raise ConfigError(
                    f"{path}: kv_cache calibrates its scales, and text alone does not go through its block; use a type "
                    "that needs no calibration, such as int8-g64"
                )
            for which, peak in zip(("keys", "values"), own.peaks):
                if not peak.isfinite().all():
                    raise NumericsError(f"{path}: its {which} are NaN or infinite on the calibration text")
            result[path] = own.peaks
        return result

    def _transform(self, block: int, unit: Unit, weights: dict[str, Tensor]) -> list[Transformed]:
        """Transform a block that is loaded, and `weights` with it; says what was done."""
        if self.transform is None or not self.runner.reached(block):
            return []
        return self.transform.transform(BlockView(self.runner, unit.tensors, weights, lambda: self._inputs(block)))

    def _tune(
        self,
        block: int,
        unit: Unit,
        weights: dict[str, Tensor],
        methods: Sequence[Method],
        shard: UnitWriter,
        on_part: OnStep,
    ) -> list[Tuned]:
        """Quantize a block's layers, let these methods learn from the whole of it, and add the layers to the shard.

        Layers of other methods are by then as the artifact will have them. `weights` is emptied.
        """
        inputs, expected = self.state(block), self.states / f"{block:05d}-{_EXPECTED}.safetensors"
        self._write(expected, self.runner.outputs(self._inputs(block)))
        original = dict(weights)
        quantized = {layer[0].module: layer for layer in self._quantized(block, unit, weights)}
        lines = []
        for method in methods:
            own = {
                name: (planned, original[planned.info.name])
                for name, (planned, _, _) in quantized.items()
                if planned.spec and planned.spec.method == method
            }
            view = TrainableBlock(
                self.runner,
                own,
                lambda number: self._batch(inputs, number),
                lambda number: self._batch(expected, number),
                on_part,
            )
            learned, tuned = method.learn(view, {name: quantized[name][1] for name in own})
            lines.append(tuned)
            for name, (planned, weight) in own.items():
                quantized[name] = planned, learned[name], diagnosed(planned, weight, learned[name], quantized[name][2])
                self.runner.set_quantized(planned, learned[name])
        for planned, qtensor, diagnostics in quantized.values():
            shard.add(planned, qtensor, diagnostics)
        expected.unlink()
        return lines

    def _quantized(
        self, block: int, unit: Unit, weights: dict[str, Tensor]
    ) -> Iterator[tuple[PlannedTensor, QTensor, Diagnostics]]:
        """Each layer of a block, quantized, in the order in which the block calls them; `weights` is emptied.

        The statistics of all layers are collected on the block before any layer of it is quantized: in one pass over
        the calibration tokens or, where they take too much memory, in several. Groups with a method that is
        `true_sequential` come after that, stage by stage, each on what is quantized by then.
        Layers of a block that text alone does not go through are rounded to nearest.
        """
        layers = [planned for planned in unit.tensors if planned.spec]
        if self.solved:
            for planned in layers:
                del weights[planned.info.name]
                qtensor, diagnostics = self.solved.solution(planned)
                yield planned, qtensor, diagnostics
                self.runner.set_quantized(planned, qtensor)
            return
        if not self.runner.reached(block):
            for planned in layers:
                yield planned, *quantize_unreached(planned, weights.pop(planned.info.name), self.plan)
            return
        stages: dict[str, list[list[PlannedTensor]]] = {"": []}
        groups = self.runner.groups(layers, next(self._inputs(block))) if layers else []
        for group in apart(groups, _kinds(layers)):
            ordered = any(planned.spec.method.true_sequential for planned in group if planned.spec)
            # all experts of a kind are one stage: they share a parameter of the model
            stages.setdefault(group[0].target.parameter if ordered else "", []).append(group)
        unquantized = block == self.first and not self.changes
        for name, stage in stages.items():
            finished: list[tuple[PlannedTensor, QTensor]] = []
            for part in group_by_bytes(stage, lambda group: _bytes(group, _kinds(group)), MOST_STATISTICS):
                for solution in self._solved(block, part, unquantized and not name, weights.pop):
                    finished.append(solution[:2])
                    yield solution
            for planned, qtensor in finished:  # not before: all passes of a stage see the same block
                self.runner.set_quantized(planned, qtensor)

    def _solved(
        self,
        block: int,
        groups: Sequence[Sequence[PlannedTensor]],
        unquantized: bool,
        weight: Callable[[str], Tensor],
    ) -> Iterator[tuple[PlannedTensor, QTensor, Diagnostics]]:
        """Each layer of some groups, quantized, in order, from statistics over all calibration tokens.

        The groups are divided among the devices, and each device solves its own one after the other.

        Args:
            weight: of a tensor, by its name. unquantized: see _collect.
        """
        devices = self.runner.divide(groups)
        wanted = [(group, kinds, device) for group, device in zip(groups, devices) if (kinds := _kinds(group))]
        collected = self._collect(block, wanted, unquantized)
        observers: dict[str, str] = {}
        for (group, _, _), statistics in zip(wanted, collected):
            observers |= self._observers(block, group, statistics)
        items = (  # statistics are freed after their group
            (group, device, collected.pop(0) if _kinds(group) else {}) for group, device in zip(groups, devices)
        )

        def solve(
            item: tuple[Sequence[PlannedTensor], torch.device, Statistics],
        ) -> list[tuple[PlannedTensor, QTensor, Diagnostics]]:
            group, device, statistics = item
            solved = []
            for each in group:
                observer = self.recipe.observer or observers.get(each.module)
                own = replace(self.recipe, device=str(device), observer=observer)
                solved.append((each, *quantize_calibrated(each, weight(each.info.name), self.plan, statistics, own)))
            return solved

        yield from chain.from_iterable(divided(solve, items, devices))

    def _observers(self, block: int, group: Sequence[PlannedTensor], statistics: Statistics) -> dict[str, str]:
        """Layer -> how the range of its static inputs is chosen: as is best for the outputs of the block as it is.

        There is none for experts, which are many, and for a recipe that names an observer.
        """
        observers: dict[str, str] = {}
        types = dict.fromkeys(its for each in group if each.spec and (its := each.spec.scheme.static))
        if self.recipe.observer or group[0].target.expert:
            return observers
        for activations in types:
            planned = [each for each in group if each.spec and each.spec.scheme.static == activations]
            weights: dict[str, Any] = {each.info.name: self.runner.layer(each).weight.data for each in planned}
            view = BlockView(self.runner, planned, weights, lambda: self._inputs(block))
            seen = {kind: statistics[kind] for kind in activations.statistics}
            if all(each.tokens for each in seen.values()):
                layers = list(dict.fromkeys(each.module for each in planned))
                observers |= dict.fromkeys(layers, best_observer(view, layers, activations, seen))
        return observers

    def _collect(
        self, block: int, groups: Sequence[tuple[Sequence[PlannedTensor], Kinds, torch.device]], unquantized: bool
    ) -> list[Statistics]:
        """The statistics of the input that each group of layers reads, of these kinds, on these devices.

        Those of a block that nothing has changed are shared with other recipes. Nobody waits for another recipe that is
        gathering them just now.
        """
        wanted = [(group[0], kinds) for group, kinds, _ in groups]
        devices = [device for _, _, device in groups]
        exact = all(kind.multiplies_inputs for _, kinds in wanted for kind in kinds)  # else sums depend on the mixture
        if not (self.shared and unquantized and exact and wanted):
            return self.runner.collect(wanted, self._inputs(block), devices)
        layers = {planned.module: kinds for group, kinds, _ in groups for planned in group}
        try:
            with self.shared.locked(0) as entries:
                if not self.shared.holds(block, layers):
                    collected = self.runner.collect(wanted, self._inputs(block), devices)
                    self.shared.add(entries, block, [group for group, _, _ in groups], collected)
                    return collected
                return [
                    self.shared.load(group[0].module, group[0].shape[1], device) or {} for group, _, device in groups
                ]
        except LockedError:
            return self.runner.collect(wanted, self._inputs(block), devices)

    def solve_block(
        self, unit: Unit, choices: Mapping[str, Sequence[LayerSpec]]
    ) -> Iterator[tuple[PlannedTensor, QTensor, Diagnostics]]:
        """Each layer of a block by each spec that it may get, all from the same statistics.

        The block is transformed before, and else stays as it is. Afterwards the next block's inputs, which the
        unquantized block puts out, are on the disk; `changed` has the tensors that the transform changed, by name, and
        `transformed` says what it did.

        Args:
            choices: layer -> specs. Layers that are not named are kept.
        Raises:
            NumericsError: see quantize_block.
        """
        block = unit.block
        assert block is not None
        if not self._embedded:
            self._start(block)
        weights = self._load(unit, hashlib.sha256())
        before = dict(weights)
        self.transformed = self._transform(block, unit, weights)
        self.changed = {name: tensor for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
        layers = [planned for planned in unit.tensors if planned.module in choices]
        groups = self.runner.groups(layers, next(self._inputs(block))) if layers and self.runner.reached(block) else []
        kinds = (kind for each in layers for spec in choices[each.module] for kind in spec.statistics)
        every = [
            [replace(each, spec=spec) for each in group for spec in choices[each.module]]
            for group in apart(groups, kinds)
        ]
        for part in group_by_bytes(every, lambda group: _bytes(group, _kinds(group)), MOST_STATISTICS):
            yield from self._solved(block, part, not self.changes, weights.__getitem__)
        for planned in layers if not groups else ():
            for spec in choices[planned.module]:
                own = replace(planned, spec=spec)
                yield own, *quantize_unreached(own, weights[planned.info.name], self.plan)
        if block != self.last:
            self._go_on(block)
        self.runner.unload_block()

    def statistics(
        self, unit: Unit, wanted: Mapping[str, Kinds]
    ) -> Iterator[tuple[list[list[PlannedTensor]], list[Statistics]]]:
        """Groups of layers of a block that read one input, and the statistics of each, as many as fit at a time.

        The block stays as it is. Afterwards the next block's inputs, which it puts out, are on the disk. There are none
        for a block that text alone does not go through.

        Args:
            wanted: layer -> kinds of statistics.
        """
        block = unit.block
        assert block is not None
        if not self._embedded:
            self._start(block)
        self._load(unit, hashlib.sha256())
        layers = [planned for planned in unit.tensors if wanted.get(planned.module)]
        read = self.runner.groups(layers, next(self._inputs(block))) if layers and self.runner.reached(block) else []
        groups = apart(read, (kind for each in layers for kind in wanted[each.module]))
        kinds = {id(group): tuple({kind: 0 for each in group for kind in wanted[each.module]}) for group in groups}
        for part in group_by_bytes(groups, lambda group: _bytes(group, kinds[id(group)]), MOST_STATISTICS):
            own = [(group[0], kinds[id(group)]) for group in part]
            yield part, self.runner.collect(own, self._inputs(block), self.runner.divide(part))
        if block != self.last:
            self._go_on(block)
        self.runner.unload_block()

    def _save_reference_logits(self, outputs: Tensor) -> None:
        """Save the logits of this very model, never written and reloaded: the reloaded artifact must give the same.

        Args:
            outputs: of the last block, for the probe.
        """
        _write_reference_logits(self.reference_logits, self.runner, outputs)

    def committed(self, block: int) -> None:
        """Delete what a block read, once its shard is safe."""
        self.state(block).unlink(missing_ok=True)


def _write_reference_logits(path: Path, runner: BlockRunner, outputs: Tensor) -> None:
    """Write the probe's ids [tokens] and its logits [tokens, vocabulary], of what the last block put out for it."""
    files.write_safetensors(path, {"ids": runner.probe[0].clone(), "logits": runner.probe_logits(outputs)})


@torch.no_grad()
def save_reference_logits(plan: Plan, recipe: Recipe, work: Path, read: Callable[[PlannedTensor], Stored]) -> None:
    """Save the logits of a quantized model, block by block; see CalibratedBlocks.

    Args:
        work: the folder of the reference logits. read: gives a tensor or a quantized layer of it.
    """
    assert recipe.calibration
    outside = [planned for planned in plan.tensors if planned.block is None]
    ids = recipe.calibration.ids[:1, :PROBE_TOKENS]
    runner = BlockRunner(plan.checkpoint, outside, ids, plan.activation_dtype, recipe.device, read)
    (outputs,) = runner.last_outputs(plan.units)
    _write_reference_logits(work / REFERENCE_LOGITS, runner, outputs)


def _kinds(group: Iterable[PlannedTensor]) -> Kinds:
    """What has to be known of the input of a group's layers."""
    return tuple(dict.fromkeys(kind for each in group if each.spec for kind in each.spec.statistics))


def _bytes(group: Sequence[PlannedTensor], kinds: Kinds) -> int:
    """What a group of an expert's layers adds to the statistics in memory; other layers are few, and come along."""
    return sum(kind.nbytes(group[0].shape[1]) for kind in kinds) if group[0].target.expert else 0


def clear_states(work: Path) -> None:
    """Delete all states of a finished artifact; the reference logits stay, for the artifact to be verified with."""
    if (states := work / _STATES).exists():
        files.remove_folder(states)
