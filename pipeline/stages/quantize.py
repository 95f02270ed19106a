"""Checkpoint -> artifact, one decoder block at a time; what is finished survives any crash, to the byte."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .. import store
from ..calibration import Calibration
from ..checkpoint import INDEX, Checkpoint, read_json
from ..errors import CheckpointError, ConfigError, DiskError, NumericsError, listing, nearest
from ..formats import Format, default_format
from ..formats import registry as formats
from ..methods import Diagnostics, Method, default_method, options_of, with_options
from ..methods import registry as methods
from ..plan import Entry, Plan, Unit, make_plan
from ..versions import versions

MANIFEST = "bitpress.json"
FORMAT_VERSION = 1
_PIECE = 1 << 22
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to quantize: scheme, method, format, and the layers to keep; names resolved and found compatible.

    calibration: the tokens that the method learns from; None for a method that needs none.
    """

    scheme: Scheme
    method: Method
    format: Format
    skip: list[str] = field(default_factory=list)
    calibration: Calibration | None = None

    @staticmethod
    def make(
        scheme: str,
        method: str = "auto",
        format: str = "auto",
        skip: list[str] | None = None,
        algorithm: dict[str, Any] | None = None,
    ) -> "Recipe":
        """From names; "auto" is the default method and the most portable format of the scheme.

        Args:
            algorithm: options of the method, such as {"damping": 1e-3} of gptq.

        Raises:
            ConfigError: an unknown name, or things that do not go together.
        """
        try:
            parsed = Scheme.parse(scheme)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for kind, name, known in (("method", method, methods()), ("format", format, formats())):
            if name != "auto" and name not in known:
                hint = nearest(name, known) or f"; use auto or one of {', '.join(known)}"
                raise ConfigError(f"{kind} {name!r} is unknown{hint}")
        chosen = default_method(parsed) if method == "auto" else methods()[method]
        try:
            chosen = with_options(chosen, algorithm or {})
        except ValueError as error:
            raise ConfigError(f"algorithm: {error}") from error
        target = default_format(parsed) if format == "auto" else formats()[format]
        probe = (1024, 32 * (parsed.group_size or 32))
        if problems := [*chosen.problems(parsed), *target.problems(parsed, probe)]:
            raise ConfigError("; ".join(problems))
        return Recipe(parsed, chosen, target, skip or [])

    def to_dict(self) -> dict[str, Any]:
        described = {
            "scheme": self.scheme.name,
            "method": self.method.name,
            "method_version": self.method.version,
            "format": self.format.name,
            "skip": list(self.skip),
        }
        described |= {f"algorithm.{name}": value for name, value in options_of(self.method).items()}
        if self.calibration:
            described |= {f"calibration.{name}": value for name, value in self.calibration.to_dict().items()}
        return described


def fingerprint(checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Everything that the artifact's bytes depend on, flat: compared field by field when a run is taken up again."""
    fields: dict[str, Any] = {f"quantize.{key}": value for key, value in recipe.to_dict().items()}
    fields |= {f"source.{key}": value for key, value in source.items()}
    fields |= {f"files.{name}": value for name, value in checkpoint.identity().items()}
    used = ["bitpress", "torch", "transformers", "safetensors"]
    used += ["bitsandbytes"] if recipe.scheme.code == "nf4" else []
    fields |= {f"versions.{name}": value for name, value in versions().items() if name in used}
    return fields | {"format_version": FORMAT_VERSION}


def check_fingerprint(path: Path, now: dict[str, Any]) -> None:
    """Refuse to go on from, or trust, what was made from something else.

    Raises:
        ConfigError: lists the fields that differ.
    """
    then = read_json(path).get("fingerprint", {})
    differing = [
        f"{key}: was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} was made from something else; choose another output, or move it away:\n{listing(differing)}"
        )


def _finite(name: str, tensor: Tensor) -> None:
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


def quantize_entry(entry: Entry, weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> tuple[QTensor, Diagnostics]:
    """One weight of the source, as it was read, as a QTensor, and what that cost.

    Raises:
        NumericsError: NaN or infinite values, or values that the format's scales cannot express.
    """
    _finite(entry.info.name, weight)
    weight = weight.t().contiguous() if entry.kind == "conv1d" else weight
    try:
        return recipe.method.quantize(weight, recipe.scheme, recipe.format.scale_dtype(recipe.scheme, dtype))
    except ValueError as error:
        raise NumericsError(
            f"{entry.info.name}: {error}; use format compressed-tensors with a bfloat16 or float32 checkpoint, "
            "or list it under quantize.skip"
        ) from error


def _layer_report(entry: Entry, qtensor: QTensor, diagnostics: Diagnostics, nbytes: int) -> dict[str, Any]:
    return {
        "name": entry.module,
        "block": entry.block,
        "shape": list(entry.shape),
        "bytes": nbytes,
        **asdict(diagnostics),
    }


def _read_ahead(checkpoint: Checkpoint, unit: Unit, digest: Any) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry with its tensor; the next one is read, and hashed, while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(checkpoint.read, unit.entries[0].info.name, digest)
        for entry, following in zip(unit.entries, [*unit.entries[1:], None]):
            tensor = ahead.result()
            if following:
                ahead = pool.submit(checkpoint.read, following.info.name, digest)
            yield entry, tensor


def _press(checkpoint: Checkpoint, plan: Plan, unit: Unit, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and its line in the journal."""
    tensors: dict[str, Tensor] = {}
    layers = []
    digest = hashlib.sha256()
    for entry, tensor in _read_ahead(checkpoint, unit, digest):
        if entry.kind is None:
            _finite(entry.info.name, tensor)
            tensors[entry.info.name] = tensor
            continue
        qtensor, diagnostics = quantize_entry(entry, tensor, recipe, plan.dtype)
        written = recipe.format.write(qtensor, plan.dtype)
        tensors |= {f"{entry.module}.{suffix}": tensor for suffix, tensor in written.items()}
        nbytes = sum(tensor.nbytes for tensor in written.values())
        layers.append(_layer_report(entry, qtensor, diagnostics, nbytes))
    return tensors, {"unit": unit.name, "source_sha256": digest.hexdigest(), "layers": layers}


def _shard_name(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


class _Progress:
    """What the journal says is committed, checked against the disk."""

    def __init__(self, plan: Plan, work: Path, folder: Path):
        self.folder = folder
        self.journal = store.Journal(work / "journal.jsonl")
        self.notes: list[str] = []
        total = len(plan.units)
        known = {_shard_name(number, total): unit.name for number, unit in enumerate(plan.units)}
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


def _check_source(checkpoint: Checkpoint, unit: Unit, line: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for entry in unit.entries:
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
    section = recipe.format.quantization_config(recipe.scheme, plan.kept_linear, plan.dtype)
    config = {key: value for key, value in checkpoint.config.items() if key != "_name_or_path"}
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    files["config.json"] = store.write_json(folder / "config.json", config | {"quantization_config": section})
    if recipe.format.quant_method == "gptq":
        files["quantize_config.json"] = store.write_json(folder / "quantize_config.json", section)
    for path in checkpoint.other_files():
        with path.open("rb") as file:
            files[path.name] = store.write_file(folder / path.name, iter(lambda: file.read(store.CHUNK), b""))
    return dict(sorted(files.items()))


def _compare_names(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, folder: Path) -> None:
    """Every tensor of the source is in the output, as it was or quantized, and nothing else is."""
    found = set(Checkpoint(folder).tensors)
    expected = {entry.info.name for entry in plan.entries if not entry.kind}
    layers = {entry.module for entry in plan.quantized}
    owned = {name for name in found for suffix in recipe.format.suffixes if name.removesuffix(f".{suffix}") in layers}
    missing = sorted(expected - found)
    missing += sorted(
        f"{layer}.{recipe.format.marker}" for layer in layers if f"{layer}.{recipe.format.marker}" not in found
    )
    extra = sorted(found - expected - owned)
    if missing or extra:
        faults = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in extra]
        raise CheckpointError(f"{folder}: tensors differ from the source's:\n{listing(faults)}")


def _open_run(work: Path, marks: dict[str, Any]) -> None:
    """Record what this run makes, or compare with the run that is taken up again."""
    path = work / "run.json"
    if path.exists():
        check_fingerprint(path, marks)
    elif (work / "journal.jsonl").exists():
        raise ConfigError(f"{path} is missing, so it cannot be told what {work} was made from; move it away")
    else:
        store.write_json(path, {"fingerprint": marks})


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
        return _verify_finished(out, on_step)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and was not made by bitpress; choose another output")
    plan = make_plan(checkpoint, recipe.scheme, recipe.format, recipe.skip)
    folder = work / "artifact.tmp"
    _open_run(work, marks)
    store.make_folder(folder)
    progress = _Progress(plan, work, folder)
    total_bytes = sum(entry.info.nbytes for entry in plan.entries)
    written = sum(line["bytes"] for line in progress.done.values())
    ratio = recipe.scheme.bits / 16 + 0.1
    kept = sum(entry.info.nbytes for entry in plan.entries if not entry.kind)
    store.preflight(work, max(0, int(kept + (total_bytes - kept) * ratio) - written))
    lines = _write_units(checkpoint, plan, recipe, progress, on_step)
    _finish(checkpoint, plan, recipe, folder, lines, marks)
    checkpoint.check_unchanged()
    store.publish_folder(folder, out)
    return progress.notes


def _write_units(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, progress: _Progress, on_step: OnStep
) -> list[dict[str, Any]]:
    """Every unit's shard, but for those that are there; the journal's lines in the units' order.

    A shard is written, synced and journaled by a thread while the next one is made, one at a time and in order.
    """
    lines: dict[str, dict[str, Any]] = {}
    total = len(plan.units)
    with ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for number, unit in enumerate(plan.units):
            on_step(number, total)
            file = _shard_name(number, total)
            if progress.committed(file):
                lines[file] = progress.done[file]
                _check_source(checkpoint, unit, lines[file])
                continue
            tensors, line = _press(checkpoint, plan, unit, recipe)
            if pending:
                pending.result()
            lines[file] = line | {"file": file}
            pending = writer.submit(progress.commit, lines[file], tensors)
            del tensors  # the writer's alone, which lets go of them
        if pending:
            pending.result()
    on_step(total, total)
    return [lines[file] for file in sorted(lines)]


def _finish(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, folder: Path, lines: list[dict[str, Any]], marks: dict[str, Any]
) -> None:
    files = _write_rest(checkpoint, plan, recipe, folder, lines)
    _compare_names(checkpoint, plan, recipe, folder)
    layers = [layer for line in lines for layer in line["layers"]]
    manifest = {
        "fingerprint": marks,
        "recipe": recipe.to_dict(),
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
