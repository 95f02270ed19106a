"""A quantized checkpoint in another format: the same weights to the bit, or a refusal that says why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor

from ..errors import ConfigError, NumericsError, listing
from ..formats import misfits, quantization_section
from ..formats.base import SHARD_BYTES, Format, dtype_name, group_by_bytes
from ..formats.names import name_pattern
from ..models.quantized import QuantizedCheckpoint, read_quantized
from ..models.stored_layer import check_shape, read_layer
from ..models.structure import kept_names, with_module_paths
from ..storage import files as store
from ..storage import journal
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import MANIFEST
from ..system.progress import OnStep
from ..system.versions import versions

_SHARD_BYTES = SHARD_BYTES
_UNFINISHED = "artifact.tmp"


@dataclass
class Conversion:
    """What is converted into what, and the layers that need a word: those in another order, those that keep scales.

    cache_section: see Format.cache_section.
    """

    checkpoint: Checkpoint
    contents: QuantizedCheckpoint
    format: Format
    cache_section: dict[str, Any]
    ordered: list[str] = field(default_factory=list)
    kept_scales: list[str] = field(default_factory=list)

    def read(self, layer: str) -> QTensor:
        qtensor = read_layer(self.checkpoint, self.contents.format, self.contents.schemes[layer], layer)
        check_shape(layer, self.contents.shapes[layer], qtensor)
        return qtensor


def examine(checkpoint: Checkpoint, format: Format) -> Conversion:
    """What it takes to write a checkpoint in a format.

    Raises:
        ConfigError: the format cannot hold it, each reason once. CheckpointError: the checkpoint is not whole.
    """
    if quantization_section(checkpoint) is None:
        raise ConfigError(f"{checkpoint.folder} is not quantized; `bitpress quantize` makes such formats of it")
    contents = read_quantized(checkpoint)
    embeddings = [layer for layer, kind in contents.kinds.items() if kind == "embedding"]
    layers = {layer: (scheme, contents.shapes[layer] or ()) for layer, scheme in contents.schemes.items()}
    problems = misfits(format, layers, embeddings) or format.checkpoint_problems(checkpoint, contents.schemes)
    if problems:
        names = " and ".join(dict.fromkeys(scheme.name for scheme in contents.schemes.values()))
        raise ConfigError(
            f"{checkpoint.folder} ({names} as {contents.format.name}) cannot become {format.name}:\n{listing(problems)}"
        )
    cache = contents.format.cache_scheme(quantization_section(checkpoint))
    cache_section = format.cache_section(cache) if cache else {}
    if cache_section is None:
        raise ConfigError(
            f"{checkpoint.folder} cannot become {format.name}: its config has servers quantize the key-value cache "
            f"({cache}), which {format.name} cannot say; take that out of config.json if the cache may stay as it is"
        )
    return Conversion(checkpoint, contents, format, cache_section)


@contextmanager
def unfinished(out: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `out` where the block ends well; else nothing of it is left.

    Args:
        nbytes: what will be written, about.
    Raises:
        ConfigError: `out` exists, or something lies where the unfinished folder would. DiskError: no room.
    """
    if store.is_occupied(out):
        raise ConfigError(f"{out} exists; choose another output")
    work = out.with_name(f"{out.name}.partial")
    if work.exists() and not (work.is_dir() and {path.name for path in work.iterdir()} <= {store.LOCK, _UNFINISHED}):
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
            store.preflight(work, nbytes)
            yield folder
            store.publish_folder(folder, out)
        finally:
            store.remove_folder(work)


def origin_of(checkpoint: Checkpoint, source: dict[str, Any], target: str) -> dict[str, Any]:
    """The fingerprint of what a checkpoint was converted to."""
    origin = {f"source.{key}": value for key, value in source.items()} | {"convert.format": target}
    origin |= {f"files.{name}": value for name, value in checkpoint.identity().items()}
    return origin | {"versions.bitpress": versions()["bitpress"]}


def write(conversion: Conversion, source: dict[str, Any], folder: Path, on_step: OnStep) -> None:
    """The whole folder. Each shard is read back before the next is made."""
    checkpoint, contents, format = conversion.checkpoint, conversion.contents, conversion.format
    owner = {name: layer for layer in contents.quantized for name in contents.tensors_of(checkpoint, layer)}
    # AutoGPTQ wrote zeros as the bias of layers that have none; read_quantized has made sure of the zeros
    biases = {f"{layer}.bias" for layer in contents.quantized}
    nothing = {
        name for name in biases & contents.plain.keys() if not contents.names.known(contents.plain[name].parameter)
    }
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if name not in nothing:
            item = owner.get(name, name)
            sizes[item] = sizes.get(item, 0) + info.nbytes
    units: dict[str, list[str]] = {}
    for item in sizes:
        units.setdefault(format.together(item), []).append(item)
    grouped = group_by_bytes(units.values(), lambda items: sum(sizes[item] for item in items), _SHARD_BYTES)
    shards = [[item for items in group for item in items] for group in grouped]
    writer = format.writer(folder, contents.model.dtype, len(shards))
    for number, items in enumerate(shards):
        on_step(number, len(shards))
        layers = [item for item in items if item in contents.quantized]
        for item in items:
            writer.add(item, _converted(conversion, item) if item in contents.quantized else checkpoint.read(item))
        line = writer.cut(number).write()
        writer.adopt(line)
        written = format.view(Checkpoint.single(folder / line["file"]))
        for layer in layers:
            again = read_layer(written, format, contents.schemes[layer], layer).dequantize()
            if not torch.equal(again, conversion.read(layer).dequantize()):
                raise NumericsError(f"{layer}: its weights changed on the way to {format.name}; please report this bug")
    on_step(len(shards), len(shards))
    plain = {name: checkpoint.tensors[name] for name in contents.plain}
    kept = kept_names(plain, contents.quantized, contents.model, contents.names)
    kept += _carried_over(conversion, kept)
    schemes = with_module_paths(contents.schemes, contents.names)
    ignored = list(with_module_paths(dict.fromkeys(kept), contents.names))
    section = format.quantization_config(schemes, ignored, contents.model.dtype, bool(conversion.ordered))
    files = writer.close(checkpoint.config, section | conversion.cache_section, checkpoint.other_files())
    origin = origin_of(checkpoint, source, format.name)
    store.write_json(folder / MANIFEST, {"fingerprint": origin, "files": files})


def _converted(conversion: Conversion, layer: str) -> QTensor:
    """A layer as the target format takes it.

    Raises:
        ConfigError: it has act-order, for which the format has no place.
        NumericsError: the format would round the scales.
    """
    format, qtensor = conversion.format, conversion.read(layer)
    if qtensor.order is not None:
        if not format.holds_order:
            raise ConfigError(
                f"{layer}: its inputs were quantized in another order (act-order), which {format.name} cannot say: "
                "its readers expect the members of a group side by side; use gptq or gptq-v2"
            )
        conversion.ordered.append(layer)
    scales = qtensor.scales
    wanted = format.scale_dtype(qtensor.scheme, conversion.contents.model.dtype)
    cast: Tensor = scales.to(wanted)
    lost = int((cast.to(torch.float32) != scales.to(torch.float32)).sum())
    if not lost:
        return replace(qtensor, scales=cast)
    if format.exact_scales:
        raise NumericsError(
            f"{layer}: {lost} of {scales.numel()} scales are {scales.dtype} numbers that {wanted} rounds, and "
            f"{format.name} stores {wanted}; keep {conversion.contents.format.name}, or quantize the original to "
            f"{format.name}"
        )
    conversion.kept_scales.append(layer)  # its readers take scales of any dtype
    return qtensor


def _carried_over(conversion: Conversion, kept: list[str]) -> list[str]:
    """What the source's config keeps beyond `kept`: modules and patterns that match something in the files.

    Patterns that bitpress does not match are left out: they might match a layer that is quantized.
    """
    checkpoint, contents = conversion.checkpoint, conversion.contents
    paths = {name.rpartition(".")[0] for name in contents.plain} - contents.quantized.keys()
    entries = []
    for entry in contents.format.kept(quantization_section(checkpoint)):
        if not entry.startswith("re:"):
            if entry not in kept and any(path == entry or path.startswith(f"{entry}.") for path in paths):
                entries.append(entry)
            continue
        try:
            pattern = name_pattern(entry[3:])
        except ValueError:
            continue
        if any(map(pattern.match, paths)) and not any(map(pattern.match, contents.quantized)):
            entries.append(entry)
    return entries


def notes(conversion: Conversion) -> list[str]:
    """Sentences on what was done."""
    count = len(conversion.contents.quantized)
    sentences = [
        f"{count} layers from {conversion.contents.format.name} to {conversion.format.name}; each was read back, and "
        "its weights are the same to the bit",
        *conversion.format.remarks(dict.fromkeys(conversion.contents.schemes.values())),
    ]
    if conversion.ordered:
        sentences.append(
            f"{len(conversion.ordered)} of them have act-order (desc_act), which some kernels refuse or run slower"
        )
    if conversion.kept_scales:
        dtype = dtype_name(conversion.contents.model.dtype)
        sentences.append(
            f"{len(conversion.kept_scales)} of them keep the dtype of their scales, which {dtype} would round; a "
            f"runtime that computes in {dtype} rounds them as it loads"
        )
    return sentences
