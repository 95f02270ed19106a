"""What a checkpoint is, whether it is sound, and which runtimes load it; reads a tensor at a time, runs nothing."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.eval.report.words import printable
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, listing
from ..formats.base import Format
from ..formats.gptq import GPTQ
from ..models.quantized import Layout, check_shape, detect_scheme, read_layer, read_layout
from ..models.structure import TensorNames, skeleton
from ..storage import files as store
from ..storage.checkpoint import Checkpoint, read_json, regular_file
from ..storage.fingerprint import MANIFEST
from ..system.progress import OnStep
from .convert import kept_linear
from .describe import describe
from .runtimes import Facts, tensor_parallel, verdicts

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_JSON = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_GPTQ_CONFIG = "quantize_config.json"
_DECISIVE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")  # on which both of GPTQ's configs must agree
_PIECE = 1 << 22


@dataclass
class Diagnosis:
    """What was found. faults: what makes it unsound, each a sentence. runtimes, tensor_parallel: see runtimes.py."""

    folder: str
    what: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensor_parallel: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.sound, **vars(self)}


class _Steps:
    """Counts files and tensors as they are read, for the progress bar."""

    def __init__(self, on_step: OnStep, total: int):
        self.on_step, self.done, self.total = on_step, 0, total

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.on_step(min(self.done, self.total), self.total)


@dataclass
class _Layers:
    """What the quantized layers have in common, gathered one at a time."""

    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    ordered: list[str] = field(default_factory=list)
    stored_zeros: dict[int, list[str]] = field(default_factory=dict)
    scale_dtypes: Counter[torch.dtype] = field(default_factory=Counter)


def diagnose(folder: Path, on_step: OnStep = lambda done, total: None) -> Diagnosis:
    """Everything that can be told of a checkpoint folder from its files.

    Args:
        on_step: called with (files and tensors read, all of them).
    Raises:
        CheckpointError: it is no folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a local checkpoint folder")
    found = _examine(folder, on_step)
    for name in ("what", "faults", "notes", "runtimes", "tensor_parallel"):
        setattr(found, name, printable(getattr(found, name)))  # tensor names are the checkpoint's, and terminals obey
    return found


def _examine(folder: Path, on_step: OnStep) -> Diagnosis:
    found = Diagnosis(str(folder))
    try:
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
    except CheckpointError as error:
        found.faults.append(_short(error, folder))
        return found
    hashes = _hashes(folder, found)
    steps = _Steps(on_step, len(hashes) + len(checkpoint.tensors))
    _check_companions(checkpoint, found)
    _check_hashes(folder, hashes, found, steps)
    if "quantization_config" in config:
        _check_quantized(checkpoint, found, steps)
    else:
        _check_dense(checkpoint, found, steps)
    try:
        found.what = describe(folder)
    except CheckpointError as error:
        found.faults += [_short(error, folder)] if found.sound else []  # else it is there in more detail
    return found


def _short(error: Exception, folder: Path) -> str:
    """An error's sentence without the folder, which is the same in all of them, and without advice for others."""
    text = str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ").removeprefix(f"{folder} ")
    return text.removesuffix("; get the checkpoint again")


def _check_companions(checkpoint: Checkpoint, found: Diagnosis) -> None:
    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZERS):
        found.faults.append(f"no tokenizer: none of {', '.join(_TOKENIZERS)} is there")
    for name in _JSON:
        try:
            if (checkpoint.folder / name).exists():
                read_json(checkpoint.folder / name)
        except CheckpointError as error:
            found.faults.append(_short(error, checkpoint.folder))
    if not (checkpoint.folder / _GPTQ_CONFIG).exists():
        return
    section = checkpoint.config.get("quantization_config")
    if not isinstance(section, dict):
        found.faults.append(
            f"config.json has no quantization_config, {_GPTQ_CONFIG} has: whoever reads config.json takes this for "
            "an unquantized checkpoint; copy it there, with quant_method gptq"
        )
        return
    try:
        other = read_json(checkpoint.folder / _GPTQ_CONFIG)
    except CheckpointError as error:
        found.faults.append(_short(error, checkpoint.folder))
        return
    for key in _DECISIVE:
        if key in section and key in other and section[key] != other[key]:
            found.faults.append(f"{key} is {section[key]!r} in config.json, {other[key]!r} in {_GPTQ_CONFIG}")


def _hashes(folder: Path, found: Diagnosis) -> dict[str, str]:
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
        found.faults.append(_short(error, folder) if isinstance(error, CheckpointError) else f"{MANIFEST}: no hashes")
        return {}


def _check_hashes(folder: Path, hashes: dict[str, str], found: Diagnosis, steps: _Steps) -> None:
    for name, expected in hashes.items():
        try:
            same = store.sha256_file(regular_file(folder / name)) == expected
            if not same:
                found.faults.append(f"{name} is not as it was written: its hash differs from {MANIFEST}'s")
        except FileNotFoundError:
            found.faults.append(f"{name} is missing: {MANIFEST} lists it")
        except (CheckpointError, OSError) as error:
            found.faults.append(_short(error, folder))
        steps()


def _check_quantized(checkpoint: Checkpoint, found: Diagnosis, steps: _Steps) -> None:
    """Every tensor, and what the config says of them."""
    try:
        format, scheme = detect_scheme(checkpoint)
    except CheckpointError as error:
        found.faults.append(_short(error, checkpoint.folder))
        return
    layout = None
    layers = [n.removesuffix(f".{format.marker}") for n in checkpoint.tensors if n.endswith(f".{format.marker}")]
    try:
        layout = read_layout(checkpoint)
        layers = list(layout.quantized)
    except CheckpointError as error:  # what each layer holds can be told all the same
        found.faults.append(_short(error, checkpoint.folder))
    owned = {f"{layer}.{suffix}" for layer in layers for suffix in format.suffixes}
    seen = _Layers()
    for layer in layers:
        steps(sum(f"{layer}.{suffix}" in checkpoint.tensors for suffix in format.suffixes))
        try:
            qtensor = read_layer(checkpoint, format, scheme, layer)
            if layout:
                check_shape(layout, layer, qtensor)
        except CheckpointError as error:
            found.faults.append(_short(error, checkpoint.folder))
            continue
        _gather(checkpoint, format, layer, qtensor, seen, found)
    section = checkpoint.config["quantization_config"]
    if isinstance(format, GPTQ):
        _check_gptq(section, format, scheme, seen, found)
    _check_scale_dtypes(checkpoint, format, seen, found)
    plain = [name for name in checkpoint.tensors if name not in owned]
    _check_plain(checkpoint, plain, layout.names if layout else None, found, steps)
    if layout:
        _check_ignored(section, layout, found)
        facts = _facts(layout, seen)
        found.runtimes, found.tensor_parallel = verdicts(facts), tensor_parallel(facts)


def _gather(
    checkpoint: Checkpoint, format: Format, layer: str, qtensor: QTensor, seen: _Layers, found: Diagnosis
) -> None:
    seen.shapes[layer] = qtensor.shape
    seen.scale_dtypes[qtensor.scales.dtype] += 1
    if qtensor.order is not None:
        seen.ordered.append(layer)
    if qtensor.scheme.code == "int" and (zero := int((qtensor.scales == 0).sum())):
        found.faults.append(f"{layer}: {zero} of {qtensor.scales.numel()} scales are zero, so their weights are, too")
    if isinstance(format, GPTQ) and qtensor.scheme.symmetric:
        stored = format.stored_zero(qtensor.scheme, checkpoint.read(f"{layer}.qzeros"), qtensor.shape[0])
        seen.stored_zeros.setdefault(stored or 0, []).append(layer)


def _check_gptq(section: dict[str, Any], format: GPTQ, scheme: Scheme, seen: _Layers, found: Diagnosis) -> None:
    right = scheme.middle - format.offset
    if wrong := [layer for zero, layers in seen.stored_zeros.items() if zero != right for layer in layers]:
        found.faults.append(
            f"tagged {format.tags[0]}, but version {2 if format.offset else 1}'s zero points are in {_some(wrong)}: "
            "who goes by the tag computes every weight one step off; bitpress reads them right, and "
            f"`bitpress convert --to {format.name}` writes them right"
        )
    if seen.ordered and section.get("desc_act") is not True:
        found.faults.append(
            f"the config denies desc_act, but g_idx is out of order in {_some(seen.ordered)}: who goes by the config "
            f"pairs weights with other groups' scales; `bitpress convert --to {format.name}` mends that"
        )
    if section.get("desc_act") is True and not seen.ordered and scheme.group_size:
        found.notes.append("the config says desc_act, but every g_idx is in order: a slower kernel may run for nothing")
    if "lm_head" in seen.shapes and section.get("lm_head") is not True:
        found.faults.append("lm_head is quantized, and the config denies it, so runtimes look for lm_head.weight")


def _check_scale_dtypes(checkpoint: Checkpoint, format: Format, seen: _Layers, found: Diagnosis) -> None:
    model = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    names = sorted(str(dtype).removeprefix("torch.") for dtype in seen.scale_dtypes)
    if isinstance(format, GPTQ) and names and names != ["float16"]:
        found.notes.append(f"scales are {' and '.join(names)}, where GPTQ has float16")
    if format.quant_method == "compressed-tensors" and names and names != [model]:
        found.notes.append(f"scales are {' and '.join(names)}: a runtime that computes in {model} rounds them to it")


def _check_ignored(section: dict[str, Any], layout: Layout, found: Diagnosis) -> None:
    """compressed-tensors' readers take every linear layer for quantized that `ignore` does not list."""
    ignore = section.get("ignore")
    if layout.format.quant_method != "compressed-tensors" or not isinstance(ignore, list):
        return
    (group,) = section["config_groups"].values()
    if group.get("targets") != ["Linear"] or any(str(entry).startswith("re:") for entry in ignore):
        return  # patterns of an untrusted file are not run: one can be made to take for ever
    linear = {path for path, module in layout.model.named_modules() if isinstance(module, nn.Linear)}
    if left := [name for name in kept_linear(layout) if name not in ignore and name in linear]:
        found.faults.append(
            f"{_some(left)}: neither quantized nor in the config's ignore, so runtimes look for packed weights there"
        )


def _check_dense(checkpoint: Checkpoint, found: Diagnosis, steps: _Steps) -> None:
    names = None
    try:
        names = TensorNames(skeleton(checkpoint))
        if missing := names.missing(names.target(name) for name in checkpoint.tensors):
            found.faults.append(f"weights of the model are missing:\n{listing(missing)}")
    except CheckpointError as error:
        names = None
        found.faults.append(_short(error, checkpoint.folder))
    found.notes.append("not quantized: any runtime that knows the architecture loads it")
    _check_plain(checkpoint, checkpoint.tensors, names, found, steps)


def _check_plain(
    checkpoint: Checkpoint, tensors: Iterable[str], names: TensorNames | None, found: Diagnosis, steps: _Steps
) -> None:
    """Tensors that are not quantized: their values and, where the model could be built, their shapes."""
    unknown = []
    for name in tensors:
        steps()
        info = checkpoint.tensors[name]
        if names is not None:
            target = names.target(name)
            expected = names.shape(target)
            if not names.known(target.parameter):
                unknown.append(name)
            elif expected is not None and expected != info.shape:
                found.faults.append(f"{name}: shape {list(info.shape)} in the file, {list(expected)} by config.json")
        if info.dtype.is_floating_point and (bad := _not_finite(checkpoint.read(name))):
            found.faults.append(f"{name}: {bad} values are NaN or infinite")
    if unknown:
        found.notes.append(f"not of the model as transformers builds it: {_some(unknown)}")


def _not_finite(tensor: Tensor) -> int:
    return sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.flatten().split(_PIECE))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _facts(layout: Layout, seen: _Layers) -> Facts:
    config = layout.model.config
    counts = [getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    heads = counts[0] if isinstance(counts[0], int) else 1
    return Facts(
        format=layout.format.name,
        scheme=layout.scheme,
        ordered=bool(seen.ordered),
        shapes=seen.shapes,
        split=_split(layout),
        experts=frozenset(layer for layer, target in layout.quantized.items() if target.expert),
        heads=(heads, counts[1] if isinstance(counts[1], int) and counts[1] > 0 else heads),
    )


def _split(layout: Layout) -> dict[str, str | None] | None:
    """How tensor parallelism cuts each layer, by the plan that transformers has for the architecture."""
    plan = getattr(type(layout.model.config), "base_model_tp_plan", None)  # transformers' own, not the checkpoint's
    if not plan:
        return None
    kinds = {re.compile(re.escape(key).replace(r"\*", r"\d+")): str(kind) for key, kind in plan.items()}
    prefix = f"{layout.model.base_model_prefix}."
    split: dict[str, str | None] = {}
    for layer, target in layout.quantized.items():
        path = target.parameter.removesuffix(".weight").removeprefix(prefix)
        kind = next((kind for pattern, kind in kinds.items() if pattern.fullmatch(path)), "")
        split[layer] = "column" if "colwise" in kind else "row" if "rowwise" in kind else None
    return split
