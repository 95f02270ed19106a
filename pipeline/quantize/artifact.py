"""Checkpoint -> artifact, one decoder block at a time; what is finished survives any crash, to the byte."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, DiskError, NumericsError, listing
from ..formats import open_quantized
from ..formats.base import Shard, Writer
from ..models.structure import TensorNames, with_module_paths
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import MANIFEST, check_fingerprint, open_work
from ..system.progress import OnStep
from ..system.threads import ahead
from ..system.versions import versions
from .budget import Choice, search
from .distill import Quantized, distill
from .independent import IndependentBlocks
from .inputs import InputError, input_errors, with_inputs_kept
from .plan import Plan, PlannedTensor, Unit, blocks_at_a_time, make_plan
from .recipe import Recipe, fingerprint, order_of_sums
from .sequential import CalibratedBlocks, Solutions, clear_states, save_reference_logits
from .statistics import SHARED, SharedStatistics
from .weights import quantize_unit

_INPUTS = "inputs.json"  # in the work folder: what rounding the inputs of each layer costs
UNFINISHED = "artifact.tmp"  # in the folder of the work, until it is an artifact
DISTILLED = "distill.tmp"  # in the folder of the work: what distillation begins with, and its state


class _Progress:
    """What the journal says is committed, checked against the disk."""

    def __init__(self, plan: Plan, work: Path, folder: Path):
        self.folder = folder
        self.journal = journal.Journal(work / journal.NAME)
        self.notes: list[str] = []
        total = len(plan.units)
        known = {store.shard_name(number, total): unit.name for number, unit in enumerate(plan.units)}
        self.done: dict[str, dict[str, Any]] = {}
        for line in self.journal.entries:
            if known.get(line.get("file", "")) != line.get("unit"):
                raise ConfigError(
                    f"{self.journal.path} is not of this checkpoint ({line.get('unit')}); move {work} away"
                )
            self.done[line["file"]] = line
        stray = [path.name for path in folder.glob("*.safetensors") if path.name not in self.done]
        if len(stray) > 1:  # a crash leaves at most one shard whose line was not written yet
            raise ConfigError(
                f"{self.journal.path} lacks lines for {len(stray)} finished files, so it was damaged; move {work} away "
                "and run again"
            )

    def committed(self, file: str) -> bool:
        """True if the shard is there, byte for byte as the journal has it; said, and redone, where it is not."""
        line = self.done.get(file)
        if line is None:
            return False
        path = self.folder / file
        if path.exists() and path.stat().st_size == line["bytes"] and store.sha256_file(path) == line["sha256"]:
            return True
        self.notes.append(f"{file} is not as it was written; made again")
        return False

    def finished_blocks(self, blocks: CalibratedBlocks, files: list[str]) -> int:
        """How many blocks need not be made again: all up to the last one, if its outputs are there for the next."""
        count = next((n for n, file in enumerate(files) if not self.committed(file)), len(files))
        if not 0 < count < len(files):
            return count
        path, expected = blocks.state(count), self.done[files[count - 1]]["state"]
        if path.exists() and store.sha256_file(path) == expected["sha256"]:
            return count
        self.notes.append(f"{path.name}, the inputs of block {count}, is not as it was written; all blocks made again")
        return 0


def _check_source(checkpoint: Checkpoint, unit: Unit, line: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for entry in unit.tensors:
        checkpoint.read(entry.info.name, digest)
    if digest.hexdigest() != line["source_sha256"]:
        raise ConfigError(
            f"the weights of {checkpoint.folder} ({unit.name}) changed since this run began; choose another output"
        )


def _compare_names(plan: Plan, folder: Path) -> None:
    """Check that every tensor of the source is in the artifact, as it was or quantized, and that nothing else is.

    Raises:
        CheckpointError: names the tensors that are missing or too many.
    """
    written, layers, format = set(open_quantized(folder).tensors), plan.schemes.keys(), plan.format
    kept = {tensor.info.name for tensor in plan.tensors if not tensor.spec}
    owned = {name for name in written for suffix in format.suffixes if name.removesuffix(f".{suffix}") in layers}
    kept |= set(plan.cache.tensors if plan.cache else ())
    missing = sorted(kept - written) + sorted(layers - set(format.layers(written)))
    extra = sorted(written - kept - owned)
    if missing or extra:
        faults = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in extra]
        raise CheckpointError(f"{folder}: tensors differ from the source's:\n{listing(faults)}")


def quantize(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    recipe: Recipe,
    out: Path,
    work: Path,
    on_step: OnStep = lambda done, total: None,
    shared: Path | None = None,
    workers: int | None = None,
) -> list[str]:
    """Make `out`, an artifact folder that other runtimes load; take up what an earlier, broken call left in `work`.

    Args:
        source: what to record of where the checkpoint came from ({"id", "revision"}).
        work: journal.jsonl and the unfinished artifact live here, on the same file system as `out`.
        on_step: called with (units done, units in all).
        shared: where what recipes have in common is kept: statistics of the unquantized model, and a budget's
            solutions; None for `work`.
        workers: how many blocks are worked on at a time where they do not depend on each other; None for as many as the
            machine has threads and memory for. The bytes are the same.
    Returns:
        Sentences on what happened on the way, such as a damaged shard that was made again.
    Raises:
        BitpressError: nothing finished is lost; run again after mending the cause.
    """
    origin = fingerprint(checkpoint, source, recipe)
    if (out / MANIFEST).exists():
        check_fingerprint(out / MANIFEST, origin)
        coverage, hashes = _read_manifest(out)
        _check_fallbacks([coverage], recipe.max_fallback_layers)
        clear_states(work)
        if (work / DISTILLED).exists():
            store.remove_folder(work / DISTILLED)
        return _verify_finished(out, hashes, on_step)
    if store.is_occupied(out):
        raise ConfigError(f"{out} exists and was not made by bitpress; choose another output")
    if recipe.distill:
        return _quantize_and_distill(checkpoint, source, recipe, out, work, on_step, shared)
    settled = _settle(checkpoint, source, recipe, work, on_step, shared or work / SHARED)
    recipe, plan, chosen, errors = settled.recipe, settled.plan, settled.chosen, settled.errors
    folder = work / UNFINISHED
    workers = workers or blocks_at_a_time(plan)
    blocks, statistics = None, None
    solved: Solutions | None = None
    if chosen and not recipe.sequential:
        solved = chosen.search
    elif recipe.calibration and not recipe.sequential:
        statistics = SharedStatistics(plan, source, recipe, shared or work / SHARED)
        wanted = {each.module: each.spec.statistics for each in plan.quantized if each.spec and each.block is not None}
        inside = [unit for unit in plan.units if unit.block is not None]
        statistics.gather(inside, wanted, partial(CalibratedBlocks, plan, recipe), on_step)
        solved = IndependentBlocks(plan, recipe, statistics, workers)
    elif recipe.calibration and shared:
        statistics = SharedStatistics(plan, source, recipe, shared)
    if recipe.calibration:
        # of what is solved already, one window makes the reference logits, unless blocks are learned from it
        learns = recipe.static_cache or any(spec.method.learns for spec in recipe.rules.specs())
        ids = recipe.calibration.ids[:1] if solved and not learns else recipe.calibration.ids
        one = replace(recipe, calibration=replace(recipe.calibration, ids=ids))
        blocks = CalibratedBlocks(plan, one, work, solved, statistics)
    store.make_folder(folder)
    progress = _Progress(plan, work, folder)
    written = sum(line["bytes"] for line in progress.done.values())
    size = sum(tensor.info.nbytes * _ratio(tensor) for tensor in plan.tensors)
    store.preflight(work, max(0, int(size) - written) + (blocks.nbytes() if blocks else 0))
    writer = plan.format.writer(folder, plan.dtype, len(plan.units))
    lines = _write_units(plan, blocks, writer, progress, recipe.max_fallback_layers, on_step, workers)
    files = _close(writer, checkpoint, plan, folder)
    budget: dict[str, Any] = {}
    if chosen:
        written_weights = Quantized.read(open_quantized(folder), plan)
        budget = chosen.to_dict() | {"measured_kl": chosen.search.divergence(plan, written_weights.stored)}
    layers = [layer for line in lines for layer in line["layers"]]
    tuned = [each for line in lines for each in line.get("tuned", [])]
    manifest = {
        "fingerprint": origin,
        "versions": versions(),
        **order_of_sums(recipe),
        "recipe": recipe.to_dict() | {"format": plan.format.name},
        **({"budget": budget} if budget else {}),
        "coverage": plan.coverage() | {"layers": layers} | ({"tuned": tuned} if tuned else {}),
        **({"transform": [each for line in lines for each in line.get("transform", [])]} if recipe.transform else {}),
        **({"inputs": [asdict(error) for error in errors]} if errors else {}),
        "files": files,
    }
    store.write_json(folder / MANIFEST, manifest)
    checkpoint.check_unchanged()
    store.publish_folder(folder, out)
    clear_states(work)
    return [*plan.notes, *_kept_inputs(settled.share, errors), *progress.notes, *_remarks(lines)]


@dataclass(frozen=True)
class _Settled:
    """A recipe of which all is decided, down to each layer, and its plan.

    chosen: what its budget chose; None without one. share: of layers that may leave their inputs alone. errors: what
    rounding each layer's inputs costs, where there is such a share.
    """

    recipe: Recipe
    plan: Plan
    chosen: Choice | None
    share: float
    errors: list[InputError]


def _settle(
    checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe, work: Path, on_step: OnStep, shared: Path
) -> _Settled:
    """Decide what the recipe leaves to measurements; these are in `work` and `shared`, and are taken once.

    Args:
        shared: where a budget's statistics and solutions are kept.
    """
    origin = fingerprint(checkpoint, source, recipe)
    chosen = search(checkpoint, source, recipe, shared, on_step) if recipe.budget else None
    if chosen:
        recipe = chosen.recipe()
    plan, share = make_plan(checkpoint, recipe), recipe.keep_inputs
    open_work(work, origin | order_of_sums(recipe))
    errors = _input_errors(plan, recipe, work, on_step) if share else []
    if share:
        recipe = with_inputs_kept(plan, recipe, errors)
        plan = make_plan(checkpoint, recipe)
    return _Settled(recipe, plan, chosen, share, errors)


def _close(writer: Writer, checkpoint: Checkpoint, plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """Write what lies beside the weights; returns file name -> {"bytes", "sha256"} of everything in the folder."""
    names = TensorNames(plan.model)
    schemes, kept = with_module_paths(plan.schemes, names), with_module_paths(dict.fromkeys(plan.kept), names)
    section = plan.format.quantization_config(schemes, list(kept), plan.dtype)
    if plan.cache:
        section |= plan.format.cache_section(plan.cache.cache.description()) or {}
    files = writer.close(plan.checkpoint.config, section, checkpoint.other_files())
    _compare_names(plan, folder)
    return files


def _quantize_and_distill(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    recipe: Recipe,
    out: Path,
    work: Path,
    on_step: OnStep,
    shared: Path | None,
) -> list[str]:
    """Make `out` in three steps: the artifact without distillation, in the work folder; the training; the packing.

    Each of the first two goes on where it was broken off; the last one begins again.
    """
    assert recipe.distill
    assert recipe.calibration
    open_work(work, fingerprint(checkpoint, source, recipe) | order_of_sums(recipe))
    steps, folder = recipe.distill.steps, work / UNFINISHED
    own = work / DISTILLED
    undistilled, begun = replace(recipe, distill=None), own / "start"
    store.make_folder(own)

    def first_half(done: int, total: int) -> None:
        on_step(done, 2 * total)

    notes = quantize(checkpoint, source, undistilled, begun, own, first_half, shared)
    settled = _settle(checkpoint, source, undistilled, own, first_half, shared or own / SHARED)
    plan, artifact = settled.plan, open_quantized(begun)
    start = Quantized.read(artifact, plan)
    distilled = distill(plan, recipe, start, own / "steps", lambda done, _: on_step(steps + done, 2 * steps))
    learned = distilled.learned
    final = Quantized({**start.layers, **learned.layers}, {**start.others, **learned.others})
    if folder.exists():  # of a call that was broken off while it packed
        store.remove_folder(folder)
    store.make_folder(folder)
    store.preflight(work, sum(info.nbytes for info in artifact.tensors.values()))
    writer = plan.format.writer(folder, plan.dtype, len(plan.units))
    for number, unit in enumerate(plan.units):
        for planned in unit.tensors:
            writer.add(planned.module if planned.spec else planned.info.name, final.stored(planned))
        writer.adopt(writer.cut(number).write())
    files = _close(writer, checkpoint, plan, folder)
    save_reference_logits(plan, recipe, work, final.stored)
    manifest = read_json(begun / MANIFEST)
    for layer in manifest["coverage"]["layers"]:  # errors of the weights that were there before
        for figure in ("relative_error", "output_error") if layer["name"] in learned.layers else ():
            layer.pop(figure, None)
    if chosen := settled.chosen:
        manifest["budget"]["measured_kl"] = chosen.search.divergence(plan, final.stored)
    manifest |= {
        "fingerprint": fingerprint(checkpoint, source, recipe),
        "recipe": recipe.to_dict() | {"format": plan.format.name},
        "distill": distilled.to_dict(),
        "files": files,
    }
    store.write_json(folder / MANIFEST, manifest)
    checkpoint.check_unchanged()
    store.publish_folder(folder, out)
    store.remove_folder(own)
    before, after = distilled.curve[0][1], min(error for _, error in distilled.curve)
    return [*notes, f"distilled in {steps} steps: held-out KL divergence {before:.4g} before, {after:.4g} after"]


def _input_errors(plan: Plan, recipe: Recipe, work: Path, on_step: OnStep) -> list[InputError]:
    """See input_errors; once measured they stay in the work folder, so that a broken run goes on with the same ones."""
    path = work / _INPUTS
    if not path.exists():
        measured = input_errors(plan, recipe, on_step)
        store.write_json(path, {"units": [asdict(each) for each in measured]})
    return [InputError(**{**each, "layers": tuple(each["layers"])}) for each in read_json(path)["units"]]


def _kept_inputs(share: float, errors: list[InputError]) -> list[str]:
    """A sentence on the layers whose inputs are left alone, or on why there are none, where a recipe asks for some."""
    if not share:
        return []
    kept, total = [name for each in errors if each.kept for name in each.layers], sum(len(e.layers) for e in errors)
    if not kept:
        return [f"all inputs are rounded: {100 * share:g}% of the layers that no rule names is less than a whole unit"]
    where = f"inputs left alone in {len(kept)} of {total} layers, where rounding them costs most"
    return [f"{where}:\n{listing(kept)}"]


def _ratio(tensor: PlannedTensor) -> float:
    """The bytes of a tensor in the artifact over those in the source, somewhat overestimated."""
    return tensor.spec.scheme.bits / 8 / tensor.info.dtype.itemsize + 0.1 if tensor.spec else 1.0


def _write_units(
    plan: Plan,
    blocks: CalibratedBlocks | None,
    writer: Writer,
    progress: _Progress,
    max_fallback_layers: int,
    on_step: OnStep,
    workers: int,
) -> list[dict[str, Any]]:
    """Write every unit's shard that is not there yet; returns the journal's lines in the order of the units.

    Shards are written, synced and journaled by a thread, one at a time and in order, while the next ones are quantized.

    Args:
        blocks: quantizes the decoder's blocks where some method is calibrated, one after the other.
        workers: how many units are quantized at a time where none is.
    """
    total = len(plan.units)
    names = {store.shard_name(number, total): unit for number, unit in enumerate(plan.units)}
    if blocks is None:
        finished = {file for file in names if progress.committed(file)}
    else:
        inside = [file for file, unit in names.items() if unit.block is not None]
        finished = set(inside[: progress.finished_blocks(blocks, inside)])
        finished |= {file for file, unit in names.items() if unit.block is None and progress.committed(file)}

    def commit(unit: Unit, shard: Shard, line: dict[str, Any]) -> None:
        line |= shard.write()
        progress.journal.append(line)  # the shard is safe: from here on it counts
        writer.adopt(line)
        if blocks and unit.block is not None:
            blocks.committed(unit.block)

    def quantized(number: int) -> tuple[dict[str, Any], Shard]:
        """A unit's line in the journal, and its shard."""
        unit, own = plan.units[number], plan.format.writer(writer.folder, plan.dtype, total)
        if blocks is None or unit.block is None:
            line = quantize_unit(plan, unit, own)
        else:
            line = blocks.quantize_block(unit, own, lambda part, parts: on_step(number * parts + part, total * parts))
        return line, own.cut(number)

    todo = [number for number, file in enumerate(names) if file not in finished]
    shards = map(quantized, todo) if blocks else ahead(quantized, todo, workers)
    lines: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(1) as thread:
        pending: Future[None] | None = None
        for number, (file, unit) in enumerate(names.items()):
            on_step(number, total)
            if file in finished:
                lines[file] = progress.done[file]
                _check_source(plan.checkpoint, unit, lines[file])
                writer.adopt(lines[file])
            else:
                line, shard = next(shards)
                if pending:
                    pending.result()
                lines[file] = line | {"file": file}
                pending = thread.submit(commit, unit, shard, lines[file])
                del shard  # the thread's alone, which lets go of the tensors
            _check_fallbacks(lines.values(), max_fallback_layers)
        if pending:
            pending.result()
    on_step(total, total)
    return [lines[file] for file in sorted(lines)]


def _layers(lines: Iterable[dict[str, Any]], mark: str) -> list[str]:
    """A sentence for each layer whose report has a mark."""
    return [f"{layer['name']}: {layer[mark]}" for line in lines for layer in line["layers"] if mark in layer]


def _check_fallbacks(lines: Iterable[dict[str, Any]], most: int) -> None:
    if len(fallen := _layers(lines, "fallback")) > most:
        raise NumericsError(
            f"{len(fallen)} layers fell back to absmax, max_fallback_layers is {most}; give more or other calibration "
            f"text, keep them by a rule, or raise max_fallback_layers to go on:\n{listing(fallen)}"
        )


def _remarks(lines: list[dict[str, Any]]) -> list[str]:
    """What the user should know of layers that were not quantized as asked."""
    fallen, noted = _layers(lines, "fallback"), _layers(lines, "note")
    remarks = [f"{len(fallen)} layers fell back to absmax:\n{listing(fallen)}"] if fallen else []
    return remarks + ([f"{len(noted)} layers are special:\n{listing(noted)}"] if noted else [])


def _read_manifest(out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A finished artifact's coverage, and file -> sha256.

    Raises:
        DiskError: it lacks what every manifest has.
    """
    manifest = read_json(out / MANIFEST)
    try:
        _layers([manifest["coverage"]], "fallback")
        return manifest["coverage"], {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DiskError(f"{out / MANIFEST} is damaged ({error!r}); move {out} away and run again") from error


def _verify_finished(out: Path, hashes: dict[str, str], on_step: OnStep) -> list[str]:
    """Re-hash a finished artifact.

    Raises:
        DiskError: names the files that are not as they were written.
    """
    damaged = []
    for number, (name, expected) in enumerate(hashes.items()):
        on_step(number, len(hashes))
        path = out / name
        if not path.is_file() or store.sha256_file(path) != expected:
            damaged.append(name)
    if damaged:
        raise DiskError(f"{out}: {', '.join(damaged)} changed since they were written; move {out} away and run again")
    return ["finished before, verified"]
