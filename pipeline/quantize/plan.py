"""What will be done to each tensor, decided from headers alone, before any weight is read."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, ConfigError, listing
from ..formats.base import Format
from ..models.structure import Names, Target, kept_names, linear_kind, skeleton, tied
from ..storage.checkpoint import Checkpoint, TensorInfo

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_UNIT_BYTES = 512 << 20  # outside the blocks, tensors are grouped into shards of at most this


@dataclass(frozen=True)
class Entry:
    """One tensor of the source checkpoint.

    kind: "linear" or "conv1d" (stored transposed) where it will be quantized, None where it is kept.
    reason: why it is kept; "" where it is quantized.
    """

    info: TensorInfo
    target: Target
    block: int | None
    kind: str | None
    reason: str = ""

    @property
    def module(self) -> str:
        """The layer's name in the checkpoint."""
        return self.info.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """[out_features, in_features]."""
        return self.info.shape[::-1] if self.kind == "conv1d" else self.info.shape


@dataclass(frozen=True)
class Unit:
    """The tensors that are written together, as one shard: a decoder block, or some of what is outside the blocks."""

    name: str
    entries: list[Entry]

    @property
    def block(self) -> int | None:
        return self.entries[0].block


@dataclass(frozen=True)
class Plan:
    model: PreTrainedModel
    entries: list[Entry]
    units: list[Unit]
    dtype: torch.dtype
    dropped: list[str]

    @property
    def quantized(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind]

    @property
    def kept_linear(self) -> list[str]:
        """Linear layers that stay as they are, by name, a tied head among them: other runtimes must be told."""
        tensors = {entry.info.name: entry.info for entry in self.entries if not entry.kind}
        return kept_names(tensors, [entry.module for entry in self.quantized], self.model, Names(self.model))

    def coverage(self) -> dict[str, object]:
        """Which share of the decoder's weight bytes is quantized, and what is kept and why."""
        inside = [entry for entry in self.entries if entry.block is not None]
        total = sum(entry.info.nbytes for entry in inside)
        done = sum(entry.info.nbytes for entry in inside if entry.kind)
        kept = [
            {
                "name": entry.info.name,
                "block": entry.block,
                "shape": list(entry.info.shape),
                "bytes": entry.info.nbytes,
                "reason": entry.reason,
            }
            for entry in self.entries
            if not entry.kind
        ]
        kept += [
            {
                "name": name,
                "block": None,
                "shape": [0],
                "bytes": 0,
                "reason": "left out: a copy of the weight it is tied to",
            }
            for name in self.dropped
        ]
        return {"decoder_bytes": total, "quantized_bytes": done, "share": done / total if total else 0.0, "kept": kept}


def _skipped(name: str, skip: list[str]) -> str | None:
    module = name.removesuffix(".weight")
    return next((p for p in skip if fnmatchcase(module, p) or fnmatchcase(name, p)), None)


def _classify(
    info: TensorInfo, target: Target, names: Names, model: PreTrainedModel, skip: list[str]
) -> tuple[str | None, str]:
    """(kind, "") for a weight to quantize, (None, reason) for one to keep.

    Raises:
        ValueError: it ought to be quantized, and cannot be.
    """
    if not names.known(target.parameter):
        return None, "not a weight of the model as transformers builds it"
    if names.block(target.parameter) is None:
        return None, "outside the decoder blocks"
    if pattern := _skipped(info.name, skip):
        return None, f"listed in quantize.skip ({pattern})"
    kind = linear_kind(model, target)
    if kind is None and len(info.shape) >= 3:
        raise ValueError(f"experts fused into one tensor of shape {list(info.shape)} are not supported yet")
    if kind is None:
        owner = type(model.get_submodule(target.parameter.rpartition(".")[0])).__name__
        return None, "a vector" if len(info.shape) < 2 else f"the weight of a {owner}, not of a linear layer"
    if info.dtype not in _FLOATS:
        raise ValueError(f"dtype {info.dtype} is not bfloat16, float16 or float32: quantized already?")
    if info.shape[0] == 1 and kind == "linear":
        return None, "a single output: a gate"
    return kind, ""


def _shape_problem(info: TensorInfo, target: Target, names: Names) -> str | None:
    """The header against config.json."""
    expected = names.shape(target)
    if expected is None or expected == info.shape:
        return None
    return f"{info.name}: shape {list(info.shape)} in the file, {list(expected)} by config.json"


def _units(entries: list[Entry]) -> list[Unit]:
    units: list[Unit] = []
    outside = [entry for entry in entries if entry.block is None]
    group: list[Entry] = []
    for entry in outside:
        if group and sum(e.info.nbytes for e in group) + entry.info.nbytes > _UNIT_BYTES:
            units.append(Unit(f"outside {len(units)}", group))
            group = []
        group.append(entry)
    if group:
        units.append(Unit(f"outside {len(units)}", group))
    blocks = sorted({entry.block for entry in entries if entry.block is not None})
    return units + [Unit(f"block {b}", [e for e in entries if e.block == b]) for b in blocks]


def _tied_copies(checkpoint: Checkpoint, targets: dict[str, Target], model: PreTrainedModel) -> list[str]:
    """Names of tensors that repeat a weight they are tied to.

    Raises:
        CheckpointError: one differs from the weight that the config ties it to.
    """
    by_parameter = {target.parameter: name for name, target in targets.items()}
    copies = []
    for parameter, origin in tied(model).items():
        copy, original = by_parameter.get(parameter), by_parameter.get(origin)
        if copy is None or original is None or copy == original:
            continue
        same_shape = checkpoint.tensors[copy].shape == checkpoint.tensors[original].shape
        if not same_shape or not torch.equal(checkpoint.read(copy), checkpoint.read(original)):
            raise CheckpointError(
                f"{copy} differs from {original}, though config.json ties them; set tie_word_embeddings to false in "
                "config.json if both are meant"
            )
        copies.append(copy)
    return copies


def make_plan(checkpoint: Checkpoint, scheme: Scheme, format: Format, skip: list[str]) -> Plan:
    """Decide what happens to each tensor, from headers alone (tied copies excepted, which are compared).

    Args:
        skip: shell patterns of layers to keep, such as "*.down_proj" or "model.layers.0.*".
    Raises:
        CheckpointError: tensors that do not fit config.json, missing or fused ones, all at once.
        ConfigError: weights that the scheme or the format cannot hold, or a skip pattern that matches nothing.
    """
    if section := checkpoint.config.get("quantization_config"):
        method = section.get("quant_method", "unknown") if isinstance(section, dict) else section
        raise CheckpointError(f"{checkpoint.folder.name} is quantized already ({method}); give the original checkpoint")
    model = skeleton(checkpoint)
    names = Names(model)
    targets = {name: names.target(name) for name in checkpoint.tensors}
    copies = _tied_copies(checkpoint, targets, model)
    entries, broken, unfit = [], [], []
    for info in checkpoint.tensors.values():
        if info.name in copies:
            continue
        target = targets[info.name]
        if problem := _shape_problem(info, target, names):
            broken.append(problem)
            continue
        try:
            kind, reason = _classify(info, target, names, model, skip)
        except ValueError as error:
            unfit.append(f"{info.name}: {error}; list it under quantize.skip to keep it as it is")
            continue
        entry = Entry(info, target, names.block(target.parameter), kind, reason)
        entries.append(entry)
        if kind:
            for problem in scheme.problems(entry.shape) or format.problems(scheme, entry.shape):
                unfit.append(f"{entry.module}: {problem}, or list it under quantize.skip")
    broken += names.missing(entry.target for entry in entries) if not broken and not unfit else []
    if broken:
        raise CheckpointError(f"{checkpoint.folder} does not match its config.json:\n{listing(broken)}")
    if unused := [p for p in skip if not any(_skipped(name, [p]) for name in checkpoint.tensors)]:
        raise ConfigError(f"quantize.skip: {', '.join(unused)} matches no tensor of {checkpoint.folder.name}")
    if unfit:
        raise ConfigError(f"{scheme.name} as {format.name} does not fit every weight:\n{listing(unfit)}")
    if not any(entry.kind for entry in entries):
        raise ConfigError(f"nothing to quantize in {checkpoint.folder.name}: quantize.skip keeps every layer")
    dtype = next(entry.info.dtype for entry in entries if entry.kind)
    return Plan(model, entries, _units(entries), dtype, copies)
