"""What a checkpoint is, whether it is sound, and which runtimes load it; reads one tensor at a time, runs nothing."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitpress.eval.report.words import printable
from bitpress.kernels.caches.base import CacheType

from ..errors import CheckpointError
from ..formats import open_quantized, quantization_section, quantized_cache, read_config, registry
from ..formats.base import Examination, Facts, LayerExamination, some
from ..models.cache_scales import read_scale
from ..models.dtypes import computing_dtype
from ..models.stored_layer import check_shape, read_layer
from ..storage import files as store
from ..storage.artifacts import require_tokenizer
from ..storage.checkpoint import Checkpoint, read_json, regular_file
from ..storage.fingerprint import MANIFEST
from ..storage.finite import count_not_finite
from ..storage.packed_file import PackedFile, PackedFileError, packed_files
from ..system import remembered
from ..system.collector import collector_paused
from ..system.progress import OnStep
from .describe import describe
from .facts import facts_of
from .runtimes import serve_command, tensor_parallel, verdicts

_JSON = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass
class Diagnosis:
    """What the doctor says. faults: what makes it unsound, each a sentence. runtimes, tensor_parallel: see runtimes."""

    folder: str
    what: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensor_parallel: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.faults

    @property
    def commands(self) -> dict[str, str]:
        """Runtime -> the lines that serve the checkpoint, of those that load it and have a server."""
        lines = {name: serve_command(verdict, self.folder) for name, verdict in self.runtimes.items()}
        return {name: command for name, command in lines.items() if command}

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.sound, **vars(self), "commands": self.commands}


class _Steps:
    """Counts files and tensors as they are read, for the progress bar."""

    def __init__(self, on_step: OnStep, total: int):
        self.on_step, self.done, self.total = on_step, 0, total

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.on_step(min(self.done, self.total), self.total)


def diagnose(folder: Path, on_step: OnStep = lambda done, total: None) -> Diagnosis:
    """Everything that the files of a checkpoint folder tell.

    Args:
        on_step: called with (files and tensors read, all of them).
    Raises:
        CheckpointError: it is no folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a local checkpoint folder")
    examined = _examine(folder, on_step)
    # names of tensors come from the checkpoint, and could steer a terminal
    return replace(examined, **printable({name: own for name, own in vars(examined).items() if name != "folder"}))


def _examine(folder: Path, on_step: OnStep) -> Diagnosis:
    diagnosis = Diagnosis(str(folder))
    try:
        checkpoint = open_quantized(folder)
        section = quantization_section(checkpoint)
    except CheckpointError as error:
        diagnosis.faults.append(_short(error, folder))
        return diagnosis
    hashes = _hashes(folder, diagnosis)
    diagnosis.notes += checkpoint.remarks
    steps = _Steps(on_step, len(hashes) + len(checkpoint.tensors))
    _check_companions(checkpoint, diagnosis)
    _check_hashes(folder, hashes, diagnosis, steps)
    if section is not None:
        _check_quantized(checkpoint, diagnosis, steps)
    else:
        _check_dense(checkpoint, diagnosis, steps)
    for path in packed_files(folder):
        with contextlib.suppress(PackedFileError):  # what a header tells of is said below
            if PackedFile(path).damaged():
                diagnosis.notes.append(f"packed weights {path} are damaged; write them again by `bitpress optimize`")
    try:
        diagnosis.what = describe(folder)
    except CheckpointError as error:
        diagnosis.faults += [_short(error, folder)] if diagnosis.sound else []  # else it is there in more detail
    return diagnosis


def _short(error: Exception | str, folder: Path) -> str:
    """An error's sentence without the folder, which is the same in all of them, and without advice for others."""
    text = str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ").removeprefix(f"{folder} ")
    return text.removesuffix("; get the checkpoint again")


def _check_companions(checkpoint: Checkpoint, diagnosis: Diagnosis) -> None:
    try:
        require_tokenizer(checkpoint.folder)
    except CheckpointError as error:
        diagnosis.faults.append(_short(error, checkpoint.folder))
    for name in _JSON:
        try:
            if (checkpoint.folder / name).exists():
                read_json(checkpoint.folder / name)
        except CheckpointError as error:
            diagnosis.faults.append(_short(error, checkpoint.folder))
    copies = {name: (keys, format) for format in registry().values() for name, keys in format.config_copies.items()}
    for name, (keys, format) in copies.items():
        if not (checkpoint.folder / name).exists():
            continue
        section = checkpoint.config.get("quantization_config")
        if not isinstance(section, dict):
            diagnosis.faults.append(
                f"config.json has no quantization_config, {name} has: whoever reads config.json takes this for "
                f"an unquantized checkpoint; copy it there, with quant_method {format.quant_method}"
            )
            continue
        try:
            other = read_json(checkpoint.folder / name)
        except CheckpointError as error:
            diagnosis.faults.append(_short(error, checkpoint.folder))
            continue
        diagnosis.faults += [
            f"{key} is {section[key]!r} in config.json, {other[key]!r} in {name}"
            for key in keys
            if key in section and key in other and section[key] != other[key]
        ]


def _hashes(folder: Path, diagnosis: Diagnosis) -> dict[str, str]:
    """File -> sha256 as bitpress.json has it, if there is one that can be read."""
    if not (folder / MANIFEST).exists():
        return {}
    try:
        files = read_json(folder / MANIFEST).get("files")
        if not isinstance(files, dict):
            raise CheckpointError(f"{MANIFEST}: no list of files")
        odd = [name for name in files if name in ("", ".", "..") or re.search(r"[/\\\0]", name)]
        if odd:
            raise CheckpointError(f"{MANIFEST}: {odd[0]!r} is not a plain file name")
        return {name: str(entry["sha256"]) for name, entry in files.items()}
    except (CheckpointError, KeyError, TypeError) as error:
        diagnosis.faults.append(
            _short(error, folder) if isinstance(error, CheckpointError) else f"{MANIFEST}: no hashes"
        )
        return {}


def _check_hashes(folder: Path, hashes: dict[str, str], diagnosis: Diagnosis, steps: _Steps) -> None:
    for name, expected in hashes.items():
        try:
            same = store.sha256_file(regular_file(folder / name)) == expected
            if not same:
                diagnosis.faults.append(f"{name} is not as it was written: its hash differs from {MANIFEST}'s")
        except FileNotFoundError:
            diagnosis.faults.append(f"{name} is missing: {MANIFEST} lists it")
        except (CheckpointError, OSError) as error:
            diagnosis.faults.append(_short(error, folder))
        steps()


def _check_quantized(checkpoint: Checkpoint, diagnosis: Diagnosis, steps: _Steps) -> None:
    """Every tensor, and what the config says of them."""
    try:
        format, rules = read_config(checkpoint)
    except CheckpointError as error:
        diagnosis.faults.append(_short(error, checkpoint.folder))
        return
    headers: Mapping[str, Any] | None = None
    layers = format.layers(checkpoint.tensors)
    try:
        headers = _headers(checkpoint)
        layers = list(headers["shapes"])
    except CheckpointError as error:  # each layer can be examined all the same
        diagnosis.faults.append(_short(error, checkpoint.folder))
    section = quantization_section(checkpoint)
    seen = Examination(section, computing_dtype(checkpoint))
    owned = {f"{layer}.{suffix}" for layer in layers for suffix in format.suffixes}
    for layer in layers:
        steps(sum(f"{layer}.{suffix}" in checkpoint.tensors for suffix in format.suffixes))
        if (scheme := rules.get(layer)) is None:
            continue  # read_quantized said so
        try:
            qtensor = read_layer(checkpoint, format, scheme, layer)
            if headers:
                check_shape(layer, tuple(headers["shapes"][layer] or ()) or None, qtensor)
        except CheckpointError as error:
            diagnosis.faults.append(_short(error, checkpoint.folder))
            continue
        scales, integers = qtensor.scales, scheme.weight.description().type == "int"
        if integers and (zero := int((scales == 0).sum())):
            diagnosis.faults.append(f"{layer}: {zero} of {scales.numel()} scales are zero, so their weights are, too")
        observation = format.observe(checkpoint, layer, qtensor)
        ordered = qtensor.order is not None
        seen.layers[layer] = LayerExamination(scheme, qtensor.shape, scales.dtype, ordered, observation)
    if headers:
        plain = {name: checkpoint.tensors[name] for name in headers["plain"]}
        seen.kept = {
            name: plain[f"{name}.weight"].shape if f"{name}.weight" in plain else () for name in headers["kept"]
        }
    faults, notes = format.diagnose(seen)
    diagnosis.faults += faults
    diagnosis.notes += notes
    owned |= {name for names, _ in (headers["cache"] if headers else ()) for name in names}
    rest = [name for name in checkpoint.tensors if name not in owned]
    _check_plain(checkpoint, rest, headers, diagnosis, steps)
    if headers:
        schemes = {name: (layer.scheme, layer.shape) for name, layer in seen.layers.items()}
        kept, cache = frozenset(seen.kept), quantized_cache(checkpoint)
        _check_cache(checkpoint, cache, headers["cache"], diagnosis)
        facts = facts_of(format, headers["model"], schemes, kept, bool(seen.ordered), cache)
        diagnosis.runtimes, diagnosis.tensor_parallel = verdicts(facts), tensor_parallel(facts)
        if facts.auto_class != Facts.auto_class:
            diagnosis.notes.append(f"transformers loads it by {facts.auto_class}, the class of its architecture")


def _check_cache(checkpoint: Checkpoint, cache: CacheType | None, scales: list[Any], diagnosis: Diagnosis) -> None:
    """The scales of a quantized cache: see Headers.cache."""
    section = quantization_section(checkpoint)
    described = read_config(checkpoint)[0].cache_scheme(section)
    if cache is None:
        if described:
            diagnosis.notes.append(f"kv_cache_scheme {described}: bitpress has no such cache and leaves it alone")
        return
    for names, heads in scales:
        for name in names:
            try:
                read_scale(checkpoint, cache, name, heads)
            except CheckpointError as error:
                diagnosis.faults.append(_short(error, checkpoint.folder))
    one = "a scale for each head" if cache.description()["strategy"] == "attn_head" else "one scale for all heads"
    kind = "scales computed for each token" if cache.dynamic else f"calibrated, {one}"
    diagnosis.notes.append(f"key-value cache: keys and values are rounded to {cache.name} ({kind})")


def _headers(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What transformers' model says of the tensors in the files (see headers.Headers), for headers that are known from
    an earlier command without building it again.

    Faults are not remembered, nor what depends on the values of weights.

    Raises:
        CheckpointError: there is no such model, or the headers of a quantized checkpoint do not fit it.
    """

    def ask() -> dict[str, Any]:
        with collector_paused():
            from .headers import dense_headers, quantized_headers

        ask_model = dense_headers if quantization_section(checkpoint) is None else quantized_headers
        return {**ask_model(checkpoint)}

    return remembered.remembered(
        "headers",
        {"files": checkpoint.model_identity()},
        ask,
        keep=lambda headers: not (headers["faults"] or headers["mismatches"] or headers["repeated"]),
    )


def remember_headers(folder: Path) -> None:
    """Ask for the headers of a checkpoint that was just made, while transformers is there, for doctors to come."""
    if remembered.folder() is not None:
        with contextlib.suppress(CheckpointError):  # the doctor will say it
            _headers(open_quantized(folder))


def _check_dense(checkpoint: Checkpoint, diagnosis: Diagnosis, steps: _Steps) -> None:
    headers = None
    try:
        headers = _headers(checkpoint)
        diagnosis.faults += [_short(fault, checkpoint.folder) for fault in headers["faults"]]
    except CheckpointError as error:
        diagnosis.faults.append(_short(error, checkpoint.folder))
    diagnosis.notes.append(
        checkpoint.dequantization or "not quantized: any runtime that knows the architecture loads it"
    )
    _check_plain(checkpoint, checkpoint.tensors, headers, diagnosis, steps)


def _check_plain(
    checkpoint: Checkpoint,
    tensors: Iterable[str],
    headers: Mapping[str, Any] | None,
    diagnosis: Diagnosis,
    steps: _Steps,
) -> None:
    """Tensors that are not quantized: their values and, where the model could be built, how they fit into it."""
    unknown: list[str] = headers["unknown"] if headers else []
    mismatches: dict[str, str] = headers["mismatches"] if headers else {}
    for name in tensors:
        steps()
        if name in mismatches:
            diagnosis.faults.append(mismatches[name])
        try:
            bad = count_not_finite(checkpoint.read(name))
        except CheckpointError as error:  # codes that cannot be dequantized
            diagnosis.faults.append(_short(error, checkpoint.folder))
            continue
        if bad:
            diagnosis.faults.append(f"{name}: {bad} values are NaN or infinite")
    if unknown:
        diagnosis.notes.append(f"not of the model as transformers builds it: {some(unknown)}")
