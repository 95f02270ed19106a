"""A quantized checkpoint in another format: the same weights to the bit, or a refusal that says why not."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitpress.kernels.qtensor import QTensor

from ..errors import ConfigError, NumericsError, listing, nearest
from ..formats import registry as formats
from ..formats.base import Format
from ..models.quantized import Layout, check_shape, read_layer, read_layout
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import INDEX, Checkpoint
from ..storage.fingerprint import MANIFEST
from ..system.progress import OnStep
from ..system.versions import versions

TARGETS = ("compressed-tensors", "gptq", "gptq-v2")
_UNIT_BYTES = 512 << 20  # tensors are grouped into shards of at most this, and held one group at a time
_UNFINISHED = "artifact.tmp"


@dataclass
class _Job:
    """What is converted into what, and what was found on the way."""

    checkpoint: Checkpoint
    layout: Layout
    format: Format
    ordered: list[str] = field(default_factory=list)
    kept_scales: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.model.dtype


def convert(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    to: str,
    out: Path,
    on_step: OnStep = lambda done, total: None,
) -> list[str]:
    """Make `out`, a whole checkpoint folder in the format `to`; nothing of that name appears before it is whole.

    Args:
        source: what to record of where the checkpoint came from ({"id", "revision"}).
        on_step: called with (shards done, shards in all).
    Returns:
        Sentences on what was done.
    Raises:
        ConfigError: the format cannot hold this checkpoint, or the output cannot be written there.
        NumericsError: the format would round the scales.
        CheckpointError: the checkpoint is not whole.
    """
    if to not in TARGETS:
        hint = nearest(to, TARGETS) or f"; use {', '.join(TARGETS)}"
        raise ConfigError(f"nothing can be converted to {to!r}{hint}")
    if "quantization_config" not in checkpoint.config:
        raise ConfigError(f"{checkpoint.folder} is not quantized; `bitpress quantize` makes such formats of it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose another output")
    job = _Job(checkpoint, read_layout(checkpoint), formats()[to])
    _check_held(job)
    work = out.with_name(f"{out.name}.partial")
    if work.exists() and not (work.is_dir() and {path.name for path in work.iterdir()} <= {".lock", _UNFINISHED}):
        raise ConfigError(
            f"{work} is in the way: an unfinished `bitpress quantize`, or something else that would be deleted; "
            "move it away, or choose another output"
        )
    store.make_folder(work)
    with journal.locked(work):
        try:
            folder = work / _UNFINISHED
            if folder.exists():  # of a conversion that was killed
                store.remove_folder(folder)
            store.make_folder(folder)
            store.preflight(work, int(1.05 * sum(info.nbytes for info in checkpoint.tensors.values())))
            _write(job, source, folder, on_step)
            checkpoint.check_unchanged()
            store.publish_folder(folder, out)
        finally:
            store.remove_folder(work)
    return _notes(job)


def _check_held(job: _Job) -> None:
    """Everything that headers tell against it, before a file is written."""
    problems: dict[str, list[str]] = {}
    for layer in job.layout.quantized:
        for problem in job.format.problems(job.layout.scheme, job.layout.shapes[layer] or ()):
            problems.setdefault(problem, []).append(layer)
    if problems:
        lines = [f"{problem} ({len(layers)} layers, such as {layers[0]})" for problem, layers in problems.items()]
        raise ConfigError(
            f"{job.checkpoint.folder} ({job.layout.scheme.name} as {job.layout.format.name}) cannot become "
            f"{job.format.name}:\n{listing(lines)}"
        )


def _units(job: _Job) -> list[list[str]]:
    """Names of layers and of plain tensors, in the files' order, in groups that are held and written together."""
    owner = {f"{layer}.{suffix}": layer for layer in job.layout.quantized for suffix in job.layout.format.suffixes}
    sizes: dict[str, int] = {}
    for name, info in job.checkpoint.tensors.items():
        item = owner.get(name, name)
        sizes[item] = sizes.get(item, 0) + info.nbytes
    dropped = set(_biases_of_nothing(job))
    units: list[list[str]] = [[]]
    held = 0
    for item, size in sizes.items():
        if item in dropped:
            continue
        if units[-1] and held + size > _UNIT_BYTES:
            units.append([])
            held = 0
        units[-1].append(item)
        held += size
    return units


def _biases_of_nothing(job: _Job) -> Iterator[str]:
    """AutoGPTQ wrote zeros as the bias of layers that have none; read_layout has made sure of the zeros."""
    for layer in job.layout.quantized:
        target = job.layout.plain.get(f"{layer}.bias")
        if target and not job.layout.names.known(target.parameter):
            yield f"{layer}.bias"


def _write(job: _Job, source: dict[str, Any], folder: Path, on_step: OnStep) -> None:
    units = _units(job)
    files: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    for number, items in enumerate(units):
        on_step(number, len(units))
        file = store.shard_name(number, len(units))
        tensors = _converted(job, items)
        files[file] = store.write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
        _verify(job, folder / file, [item for item in items if item in job.layout.quantized])
    on_step(len(units), len(units))
    total = sum(entry["bytes"] for entry in files.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files[INDEX] = store.write_json(folder / INDEX, index)
    files |= _write_companions(job, folder)
    marks = {f"source.{key}": value for key, value in source.items()} | {"convert.format": job.format.name}
    marks |= {f"files.{name}": value for name, value in job.checkpoint.identity().items()}
    marks["versions.bitpress"] = versions()["bitpress"]
    store.write_json(folder / MANIFEST, {"fingerprint": marks, "files": dict(sorted(files.items()))})


def _converted(job: _Job, items: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for item in items:
        if item not in job.layout.quantized:
            tensors[item] = job.checkpoint.read(item)
            continue
        qtensor = _read(job, item)
        if qtensor.order is not None:
            _check_order(job, item)
            job.ordered.append(item)
        written = job.format.write(replace(qtensor, scales=_scales(job, item, qtensor)), job.dtype)
        tensors |= {f"{item}.{suffix}": tensor for suffix, tensor in written.items()}
    return tensors


def _read(job: _Job, layer: str) -> QTensor:
    qtensor = read_layer(job.checkpoint, job.layout.format, job.layout.scheme, layer)
    check_shape(job.layout, layer, qtensor)
    return qtensor


def _check_order(job: _Job, layer: str) -> None:
    if not job.format.holds_order:
        raise ConfigError(
            f"{layer}: its inputs were quantized in another order (act-order), which {job.format.name} cannot say: "
            "its readers expect the members of a group side by side; use gptq or gptq-v2"
        )


def _scales(job: _Job, layer: str, qtensor: QTensor) -> Tensor:
    """The scales in the dtype that the format wants, where that holds them exactly.

    compressed-tensors wants the model's dtype, but its readers take any: there they otherwise stay as they are.
    """
    scales = qtensor.scales
    wanted = job.format.scale_dtype(qtensor.scheme, job.dtype)
    cast = scales.to(wanted)
    lost = int((cast.to(torch.float32) != scales.to(torch.float32)).sum())
    if not lost:
        return cast
    if job.format.quant_method == "gptq":
        raise NumericsError(
            f"{layer}: {lost} of {scales.numel()} scales are {scales.dtype} numbers that {wanted} rounds, and "
            f"{job.format.name} stores {wanted}; keep {job.layout.format.name}, or quantize the original to "
            f"{job.format.name}"
        )
    job.kept_scales.append(layer)
    return scales


def _verify(job: _Job, file: Path, layers: list[str]) -> None:
    """What lies on the disk, read as any reader would, against the source; one layer at a time.

    Raises:
        NumericsError: a weight differs.
    """
    written = Checkpoint.single(file)
    for layer in layers:
        found = read_layer(written, job.format, job.layout.scheme, layer).dequantize()
        if not torch.equal(found, _read(job, layer).dequantize()):
            raise NumericsError(f"{layer}: its weights changed on the way to {job.format.name}; please report this bug")


def _write_companions(job: _Job, folder: Path) -> dict[str, Any]:
    """config.json, quantize_config.json where the format has one, and the small files that come along."""
    section = job.format.quantization_config(job.layout.scheme, kept_linear(job.layout), job.dtype)
    config = {key: value for key, value in job.checkpoint.config.items() if key != "_name_or_path"}
    files = {}
    if job.format.quant_method == "gptq":
        section |= {"desc_act": bool(job.ordered), "lm_head": "lm_head" in job.layout.quantized}
        files["quantize_config.json"] = store.write_json(folder / "quantize_config.json", section)
    files["config.json"] = store.write_json(folder / "config.json", config | {"quantization_config": section})
    for path in job.checkpoint.other_files():
        if path.name == MANIFEST:  # it has the hashes of files that are others now
            continue
        files[path.name] = store.copy_file(path, folder / path.name)
    return files


def kept_linear(layout: Layout) -> list[str]:
    """Linear layers that are not quantized, by the checkpoint's names, a tied head among them."""
    names = {target.parameter: name.removesuffix(".weight") for name, target in layout.plain.items()}
    quantized = {target.parameter for target in layout.quantized.values()}
    linear = [path for path, module in layout.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [names.get(f"{path}.weight", path) for path in linear if f"{path}.weight" not in quantized]


def _notes(job: _Job) -> list[str]:
    count = len(job.layout.quantized)
    notes = [
        f"{count} layers from {job.layout.format.name} to {job.format.name}; each was read back, and its weights are "
        "the same to the bit"
    ]
    if job.ordered:
        notes.append(f"{len(job.ordered)} of them have act-order (desc_act), which some kernels refuse or run slower")
    if job.kept_scales:
        dtype = str(job.dtype).removeprefix("torch.")
        notes.append(
            f"{len(job.kept_scales)} of them keep the dtype of their scales, which {dtype} would round; a runtime "
            f"that computes in {dtype} rounds them as it loads"
        )
    return notes
