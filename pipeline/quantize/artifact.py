"""Checkpoint -> artifact, one decoder block at a time; what is finished survives any crash, to the byte."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError, DiskError, NumericsError, listing
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import INDEX, Checkpoint, read_json
from ..storage.fingerprint import MANIFEST, check_fingerprint, open_work
from ..system.progress import OnStep
from ..system.versions import versions
from .plan import Plan, PlannedTensor, Unit, make_plan
from .recipe import Recipe, fingerprint, order_of_sums
from .sequential import CalibratedBlocks, clear_states
from .weights import quantize_unit


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

    def commit(self, line: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a shard and, once it is safe, its line; `line` gains the file's size and hash."""
        line |= store.write_safetensors(self.folder / line["file"], tensors)
        self.journal.append(line)

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


def _write_rest(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, folder: Path, lines: list[dict[str, Any]]) -> dict:
    """Index, config and companions; returns file -> {bytes, sha256} of all."""
    files = {line["file"]: {"bytes": line["bytes"], "sha256": line["sha256"]} for line in lines}
    weight_map = {name: line["file"] for line in lines for name in Checkpoint.names_in(folder / line["file"])}
    index = {
        "metadata": {"total_size": sum(line["bytes"] for line in lines)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    files[INDEX] = store.write_json(folder / INDEX, index)
    section = plan.format.quantization_config(plan.schemes, plan.kept, plan.dtype)
    config = {key: value for key, value in checkpoint.config.items() if key != "_name_or_path"}
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    files["config.json"] = store.write_json(folder / "config.json", config | {"quantization_config": section})
    for name, content in plan.format.side_files(section).items():
        files[name] = store.write_json(folder / name, content)
    for path in checkpoint.other_files():
        files[path.name] = store.copy_file(path, folder / path.name)
    return dict(sorted(files.items()))


def _compare_names(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, folder: Path) -> None:
    """Every tensor of the source is in the output, as it was or quantized, and nothing else is."""
    found = set(Checkpoint(folder).tensors)
    expected = {entry.info.name for entry in plan.tensors if not entry.spec}
    layers = {entry.module for entry in plan.quantized}
    owned = {name for name in found for suffix in plan.format.suffixes if name.removesuffix(f".{suffix}") in layers}
    missing = sorted(expected - found)
    missing += sorted(
        f"{layer}.{plan.format.marker}" for layer in layers if f"{layer}.{plan.format.marker}" not in found
    )
    extra = sorted(found - expected - owned)
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
) -> list[str]:
    """Make `out`, an artifact folder that other runtimes load; take up what an earlier, broken call left in `work`.

    Args:
        source: what to record of where the checkpoint came from ({"id", "revision"}).
        work: journal.jsonl and the unfinished artifact live here, on the same file system as `out`.
        on_step: called with (units done, units in all).
    Returns:
        Sentences on what happened on the way, such as a damaged shard that was made again.
    Raises:
        BitpressError: nothing finished is lost; run again after mending the cause.
    """
    marks = fingerprint(checkpoint, source, recipe)
    if (out / MANIFEST).exists():
        check_fingerprint(out / MANIFEST, marks)
        _check_fallbacks([read_json(out / MANIFEST)["coverage"]], recipe.max_fallback_layers)
        clear_states(work)
        return _verify_finished(out, on_step)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and was not made by bitpress; choose another output")
    plan = make_plan(checkpoint, recipe)
    folder = work / "artifact.tmp"
    open_work(work, marks | order_of_sums(recipe))
    blocks = CalibratedBlocks(checkpoint, plan, recipe, work) if recipe.calibration else None
    store.make_folder(folder)
    progress = _Progress(plan, work, folder)
    written = sum(line["bytes"] for line in progress.done.values())
    size = sum(tensor.info.nbytes * _ratio(tensor) for tensor in plan.tensors)
    needed = max(0, int(size) - written) + (blocks.nbytes() if blocks else 0)
    store.preflight(work, needed)
    lines = _write_units(_Job(checkpoint, plan, recipe, blocks), progress, on_step)
    _finish(checkpoint, plan, recipe, folder, lines, marks)
    checkpoint.check_unchanged()
    store.publish_folder(folder, out)
    clear_states(work)
    return [*plan.notes, *progress.notes, *_remarks(lines)]


def _ratio(tensor: PlannedTensor) -> float:
    """The bytes of a tensor in the artifact over those in the source, somewhat overestimated."""
    return tensor.spec.scheme.bits / 8 / tensor.info.dtype.itemsize + 0.1 if tensor.spec else 1.0


@dataclass(frozen=True)
class _Job:
    """What is to be done. blocks: for a method that learns, which takes the decoder's blocks one after the other."""

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    blocks: CalibratedBlocks | None

    def press(self, unit: Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.blocks and unit.block is not None:
            return self.blocks.quantize_block(unit)
        return quantize_unit(self.checkpoint, self.plan, unit)

    def finished(self, progress: _Progress) -> set[str]:
        """The files that need not be made again."""
        files = {store.shard_name(n, len(self.plan.units)): unit.block for n, unit in enumerate(self.plan.units)}
        if self.blocks is None:
            return {file for file in files if progress.committed(file)}
        inside = [file for file, block in files.items() if block is not None]
        outside = {file for file, block in files.items() if block is None and progress.committed(file)}
        return outside | set(inside[: progress.finished_blocks(self.blocks, inside)])

    def commit(self, progress: _Progress, unit: Unit, line: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        progress.commit(line, tensors)
        if self.blocks and unit.block is not None:
            self.blocks.committed(unit.block)


def _write_units(job: _Job, progress: _Progress, on_step: OnStep) -> list[dict[str, Any]]:
    """Every unit's shard, but for those that are there; the journal's lines in the units' order.

    A shard is written, synced and journaled by a thread while the next one is made, one at a time and in order.
    """
    lines: dict[str, dict[str, Any]] = {}
    finished, total = job.finished(progress), len(job.plan.units)
    with ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for number, unit in enumerate(job.plan.units):
            on_step(number, total)
            file = store.shard_name(number, total)
            if file in finished:
                lines[file] = progress.done[file]
                _check_source(job.checkpoint, unit, lines[file])
            else:
                tensors, line = job.press(unit)
                if pending:
                    pending.result()
                lines[file] = line | {"file": file}
                pending = writer.submit(job.commit, progress, unit, lines[file], tensors)
                del tensors  # the writer's alone, which lets go of them
            _check_fallbacks(lines.values(), job.recipe.max_fallback_layers)
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


def _finish(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, folder: Path, lines: list[dict[str, Any]], marks: dict[str, Any]
) -> None:
    files = _write_rest(checkpoint, plan, recipe, folder, lines)
    _compare_names(checkpoint, plan, recipe, folder)
    layers = [layer for line in lines for layer in line["layers"]]
    manifest = {
        "fingerprint": marks,
        "versions": versions(),
        **order_of_sums(recipe),
        "recipe": recipe.to_dict() | {"format": plan.format.name},
        "coverage": plan.coverage() | {"layers": layers},
        "files": files,
    }
    store.write_json(folder / MANIFEST, manifest)


def _verify_finished(out: Path, on_step: OnStep) -> list[str]:
    """Re-hash a finished artifact.

    Raises:
        DiskError: names the files that are not as they were written.
    """
    damaged = []
    files = read_json(out / MANIFEST)["files"]
    for number, (name, expected) in enumerate(files.items()):
        on_step(number, len(files))
        path = out / name
        if not path.is_file() or store.sha256_file(path) != expected["sha256"]:
            damaged.append(name)
    if damaged:
        raise DiskError(f"{out}: {', '.join(damaged)} changed since they were written; move {out} away and run again")
    return ["finished before, verified"]
