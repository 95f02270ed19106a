"""What will be done to each tensor, decided from headers alone, before any weight is read."""

import functools
import glob
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, ConfigError, listing
from ..formats import first_fitting, misfits, quantization_section
from ..formats.base import Format, group_by_bytes
from ..models.dtypes import dtype_of_most, in_dtype
from ..models.experts import ExpertSlice, SplitCheckpoint
from ..models.kv_cache import CacheShape, scale_names
from ..models.kv_cache import unsupported as unsupported_cache
from ..models.structure import (
    ParameterPath,
    TensorNames,
    fused_unit,
    gate_reason,
    is_fused_experts,
    kept_names,
    not_linear,
    skeleton,
    tied,
    tied_copies,
    weight_kind,
)
from ..models.trial import TrialLayer, cache_shapes, layers_to_keep
from ..storage.checkpoint import Checkpoint, TensorInfo
from .recipe import Recipe
from .spec import KEPT, LayerSpec, Rules

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_AT_A_TIME = 4  # blocks: each is rounded by all threads, and more only hide reading and writing
_SHARE = 8  # of the memory: what blocks that are worked on at a time may take
_SAMPLE_ROWS = (128, 256)  # of a layer, from whose sizes that of all follows; tensors grow by rows or squares of 128


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source checkpoint, and what will be done to it.

    target: its place in the model. block: the decoder block that it is in; None outside of them.
    spec: how it is quantized; None where it is kept.
    kind: "linear", "conv1d" (stored transposed) or "embedding" where it is quantized; None where it is kept.
    reason: why it is kept; "" where it is quantized.
    """

    info: TensorInfo
    target: ParameterPath
    block: int | None
    spec: LayerSpec | None
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

    def turned(self, weight: Tensor) -> Tensor:
        """A weight [out, in] as the files store it; or, the other way round, the files' as [out, in]."""
        return weight.t().contiguous() if self.kind == "conv1d" else weight


def blocks_at_a_time(plan: "Plan") -> int:
    """How many blocks that do not depend on each other are worked on at a time: as the threads and the memory allow.

    What they take is an eighth of this machine's memory at most.
    """
    largest = max(sum(each.info.nbytes + plan.stored_bytes(each) for each in unit.tensors) for unit in plan.units)
    room = psutil.virtual_memory().total // _SHARE // max(1, largest)
    return max(1, min(_MOST_AT_A_TIME, torch.get_num_threads(), room))


def patterns(name: str, layers: Sequence[PlannedTensor]) -> list[str]:
    """Patterns of names that fit the layers of what servers fuse, and no others.

    Args:
        name: of the unit, see fused_unit.
    """
    if any(planned.target.expert for planned in layers):
        return [f"{glob.escape(name)}.*"]
    return [glob.escape(planned.module) for planned in layers]


@dataclass(frozen=True)
class Unit:
    """The tensors that are written together, as one shard: a decoder block, or some of what is outside the blocks."""

    name: str
    tensors: list[PlannedTensor]

    @property
    def block(self) -> int | None:
        return self.tensors[0].block


@dataclass(frozen=True)
class PlannedCache:
    """What keys and values are rounded to, in the cache of which attention.

    shapes: attention's path in the model -> what it keeps of each token. scales: the same -> the names of the tensors
    that are stored, of its keys and its values; empty where the type is dynamic.
    """

    cache: CacheType
    shapes: dict[str, CacheShape]
    scales: dict[str, tuple[str, str]]

    @property
    def tensors(self) -> list[str]:
        return [name for names in self.scales.values() for name in names]


@dataclass(frozen=True)
class Plan:
    """What will be done to a checkpoint.

    checkpoint: where the tensors are read from; experts that the files hold in one tensor are seen one by one in it.
    dtype: that of most weights that are quantized. dropped: tensors that repeat a weight they are tied to.
    format: how the artifact is stored. notes: sentences on what the recipe left open and the plan decided.
    cache: what keys and values are rounded to; None where they stay as they are.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    tensors: list[PlannedTensor]
    units: list[Unit]
    dtype: torch.dtype
    dropped: list[str]
    format: Format
    notes: list[str] = field(default_factory=list)
    cache: "PlannedCache | None" = None

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype in which blocks see calibration text: float16 overflows in models that were trained in bfloat16."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.spec]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer, as the files name it -> its scheme."""
        return {tensor.module: tensor.spec.scheme for tensor in self.tensors if tensor.spec}

    @property
    def kept(self) -> list[str]:
        """Layers that stay unquantized though they could be linear layers, by their names in the files.

        The routers of experts are among them: servers build them as linear layers.
        """
        names = TensorNames(self.model)
        tensors = {tensor.info.name: tensor.info for tensor in self.tensors if not tensor.spec}
        kept = kept_names(tensors, list(self.schemes), self.model, names)
        owners = {path.rpartition(".")[0].rpartition(".")[0] for path in names.experts}
        routers = [
            tensor.module
            for tensor in self.tensors
            if not tensor.spec and len(tensor.info.shape) == 2 and tensor.info.name.endswith(".weight")
            if tensor.target.parameter.rpartition(".")[0].rpartition(".")[0] in owners and not tensor.target.expert
        ]
        return list(dict.fromkeys([*kept, *routers]))

    def stored_bytes(self, planned: PlannedTensor) -> int:
        """The bytes of a tensor in the artifact."""
        if planned.spec is None:
            return planned.info.nbytes
        return _stored_bytes(self.format, planned.spec.scheme, (planned.shape[0], planned.shape[1]), self.dtype)

    def coverage(self) -> dict[str, object]:
        """Which share of the decoder's weight bytes is quantized, and what is kept and why."""
        inside = [tensor for tensor in self.tensors if tensor.block is not None]
        total = sum(tensor.info.nbytes for tensor in inside)
        done = sum(tensor.info.nbytes for tensor in inside if tensor.spec)
        kept = [
            {
                "name": tensor.info.name,
                "block": tensor.block,
                "shape": list(tensor.info.shape),
                "bytes": tensor.info.nbytes,
                "reason": tensor.reason,
            }
            for tensor in self.tensors
            if not tensor.spec
        ]
        copy = {"block": None, "shape": [0], "bytes": 0, "reason": "left out: a copy of the weight it is tied to"}
        kept += [{"name": name, **copy} for name in self.dropped]
        return {"decoder_bytes": total, "quantized_bytes": done, "share": done / total if total else 0.0, "kept": kept}


@functools.cache
def _stored_bytes(format: Format, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of a layer [out, in] as a format writes it, from a few rows of random codes."""
    rows, columns = shape
    few, more = _SAMPLE_ROWS
    if rows > more:
        least, most = (_stored_bytes(format, scheme, (count, columns), dtype) for count in (few, more))
        return most + round((most - least) / (more - few) * (rows - more))
    tensors = {name: torch.ones(size, dtype=kinds[0]) for name, (size, kinds) in scheme.layout(shape).items()}
    tensors |= scheme.weight.random(shape, torch.Generator().manual_seed(0))
    if tensors["scales"].is_floating_point():  # else they are codes themselves, whatever the format's dtype
        tensors["scales"] = tensors["scales"].to(format.scale_dtype(scheme, dtype))
    written = format.write(QTensor.of(scheme, shape, tensors), dtype)
    return sum(tensor.nbytes for tensor in written.values())


class _Problems:
    """Problems, each once with the layers that have it."""

    def __init__(self) -> None:
        self.layers: dict[str, list[str]] = defaultdict(list)

    def add(self, layer: str, problems: list[str]) -> None:
        for problem in problems:
            self.layers[problem].append(layer)

    def sentences(self) -> list[str]:
        return [
            f"{layers[0]}: {problem}" if len(layers) == 1 else f"{problem} ({len(layers)} layers, such as {layers[0]})"
            for problem, layers in self.layers.items()
        ]


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide what happens to each tensor, from headers alone (tied copies excepted, which are compared).

    Raises:
        CheckpointError: tensors that do not fit config.json, missing or fused ones, all at once.
        ConfigError: weights that a scheme or the format cannot hold, or a pattern that matches nothing.
    """
    if (section := quantization_section(checkpoint)) is not None:
        method = section.get("quant_method", "unknown") if isinstance(section, dict) else section
        raise CheckpointError(f"{checkpoint.folder.name} is quantized already ({method}); give the original checkpoint")
    checkpoint = in_dtype(checkpoint, recipe.dtype)
    model = skeleton(checkpoint)
    names = TensorNames(model)
    targets = {name: names.target(name) for name in checkpoint.tensors}
    copies = tied_copies(checkpoint, targets, model)
    checkpoint, aliases = _split_experts(checkpoint, targets, names, recipe.rules)
    targets = {name: targets.get(name) or names.target(name) for name in checkpoint.tensors}
    mismatches = names.mismatches(checkpoint.tensors, targets)
    decided, broken, unfit, fitted, impossible = [], [], _Problems(), _Problems(), _Problems()
    for info in checkpoint.tensors.values():
        if info.name in copies:
            continue
        target = targets[info.name]
        if problem := mismatches.get(info.name):
            broken.append(problem)
            continue
        try:
            spec, kind, reason = _decide(info, target, names, model, recipe.rules, aliases[info.name])
        except ValueError as error:
            unfit.add(info.name, [str(error)])
            continue
        decided.append(PlannedTensor(info, target, names.block(target.parameter), spec, kind, reason))
    broken += names.missing(tensor.target for tensor in decided) if not (broken or unfit.layers) else []
    if broken:
        raise names.does_not_match(checkpoint, targets, broken)
    wanted = {t.target: TrialLayer(t.spec.scheme, t.shape, t.kind) for t in decided if t.spec and t.kind}
    tables = {target.parameter for target in wanted if target.expert}
    wanted |= {t.target: TrialLayer(None, t.shape) for t in decided if not t.spec and t.target.parameter in tables}
    kept = layers_to_keep(checkpoint, model, names, wanted) if wanted else {}
    tensors = []
    for tensor in decided:
        if reason := kept.get(tensor.target, ""):
            if asking := _naming_rule(tensor.info.name, aliases[tensor.info.name], recipe.rules):
                unfit.add(tensor.module, [f"the rule {asking} asks for it, and {reason}"])
            impossible.add(tensor.module, [reason])
            tensor = replace(tensor, spec=None, kind=None, reason=reason)
        if tensor.spec and recipe.fit_groups:
            spec = tensor.spec.fitted(tensor.shape)
            if spec != tensor.spec:
                fitted.add(tensor.module, [f"{spec.scheme.name} in place of {tensor.spec.scheme.name}"])
                tensor = replace(tensor, spec=spec)
        if tensor.spec:
            unfit.add(tensor.module, tensor.spec.scheme.problems(tensor.shape))
            if tensor.spec.scheme.static and tensor.block is None:
                name = tensor.spec.scheme.name
                unfit.add(tensor.module, [f"{name} calibrates inputs, and only those of the decoder blocks are seen"])
        tensors.append(tensor)
    known = {*checkpoint.tensors, *aliases.values()}
    unused = [p for p in recipe.rules.layers if not any(Rules(None, {p: None}).pattern(name) for name in known)]
    for pattern in unused:
        for copy, origin in tied(model).items():
            if Rules(None, {pattern: None}).pattern(copy):
                raise ConfigError(
                    f"layers: {pattern} names {copy.removesuffix('.weight')}, which is tied to "
                    f"{origin.removesuffix('.weight')} and has no weight of its own in {checkpoint.folder.name}; name "
                    "that one, or set tie_word_embeddings to false and store the head"
                )
    if unused:
        raise ConfigError(f"layers: {', '.join(unused)} matches no tensor of {checkpoint.folder.name}")
    if unfit.layers:
        keep = "; keep such layers by a rule, as in layers: {'NAME': none} (--layer 'NAME=none')"
        if any("group_size" in problem for problem in unfit.layers):
            keep += ", or set fit_groups: true (--fit-groups)"
        raise ConfigError(f"{recipe.scheme} does not fit every weight{keep}:\n{listing(unfit.sentences())}")
    cache = _plan_cache(checkpoint, model, recipe.cache, tensors) if recipe.cache else None
    if cache is None and not any(tensor.spec for tensor in tensors):
        raise ConfigError(f"nothing to quantize in {checkpoint.folder.name}: the recipe's rules keep every layer")
    if not recipe.allow_split_fused:
        _refuse_split_units(tensors, recipe.rules, aliases)
    format, reasons = _choose_format(recipe.format, [tensor for tensor in tensors if tensor.spec], recipe.cache)
    stored = {tensor.module: tensor.spec.scheme for tensor in tensors if tensor.spec}
    if problems := format.checkpoint_problems(checkpoint, stored):
        raise ConfigError(f"{checkpoint.folder.name} cannot be saved as {format.name}:\n{listing(problems)}")
    dtype = dtype_of_most(tensor.info for tensor in [t for t in tensors if t.spec] or tensors)
    notes = [checkpoint.dequantization] if checkpoint.dequantization else []
    notes += checkpoint.remarks
    notes += [f"fit_groups: {sentence}" for sentence in fitted.sentences()]
    notes += [f"kept as it is: {sentence}" for sentence in impossible.sentences()]
    notes += format.remarks(dict.fromkeys(stored.values()))
    if reasons:
        notes.append(f"saved as {format.name}, because {'; '.join(reasons)}")
    if cache and (others := names.block_count - len({names.block(path) for path in cache.shapes})):
        notes.append(f"kv_cache: {others} of {names.block_count} layers keep no keys and values, and stay as they are")
    return Plan(model, checkpoint, tensors, _units(tensors), dtype, list(copies), format, notes, cache)


def _plan_cache(
    checkpoint: Checkpoint, model: PreTrainedModel, cache: CacheType, tensors: Sequence[PlannedTensor]
) -> PlannedCache:
    """Which attention rounds its keys and values.

    Raises:
        ConfigError: the model keeps something else in its cache, or its heads do not fit the type.
    """
    if reason := unsupported_cache(model):
        raise ConfigError(f"kv_cache: {reason}; leave kv_cache out")
    shapes = cache_shapes(checkpoint)
    dims = {dim: path for path, shape in shapes.items() for dim in (shape.key_dim, shape.value_dim)}
    if problems := [f"{dims[dim]}: {problem}" for dim in dims for problem in cache.problems(dim)]:
        raise ConfigError(f"kv_cache {cache.name} does not fit {checkpoint.folder.name}:\n{listing(problems)}")
    targets = {tensor.info.name: tensor.target for tensor in tensors}
    scales = {} if cache.dynamic else {path: scale_names(path, targets) for path in shapes}
    if taken := [name for names in scales.values() for name in names if name in targets]:
        raise ConfigError(f"{checkpoint.folder.name} has tensors of a quantized cache already:\n{listing(taken)}")
    return PlannedCache(cache, shapes, scales)


def _split_experts(
    checkpoint: Checkpoint, targets: Mapping[str, ParameterPath], names: TensorNames, rules: Rules
) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint, its tensors of all experts seen as a layer for each expert where any of these is quantized.

    Returns:
        It, and a second name by which rules may call each tensor: of an expert's layer, the tensor that it lies in;
        of a tensor of experts that stays whole, its first layer; of any other, its own name.
    """
    slices: dict[str, ExpertSlice] = {}
    aliases: dict[str, str] = {}
    split: set[str] = set()
    for name, target in sorted(targets.items(), key=lambda item: item[1].parameter.endswith("_bias")):
        shape = checkpoint.tensors[name].shape
        layers = names.slices(name, target, shape) if names.fits(target, shape) else {}
        if not layers:
            continue
        if names.experts[target.parameter].bias:  # goes with its weight
            whole = target.parameter.removesuffix("_bias") not in split
        else:
            whole = not any(rules.spec(layer, name) for layer in layers)
        if whole:
            aliases[name] = next(iter(layers))
        else:
            split.add(target.parameter)
            slices |= layers
            aliases |= dict.fromkeys(layers, name)
    view = SplitCheckpoint(checkpoint, slices) if slices else checkpoint
    return view, {name: aliases.get(name, name) for name in view.tensors}


def _decide(
    info: TensorInfo, target: ParameterPath, names: TensorNames, model: PreTrainedModel, rules: Rules, alias: str
) -> tuple[LayerSpec | None, str | None, str]:
    """(spec, kind, "") for a weight to quantize, (None, None, reason) for one to keep.

    Embeddings and heads are quantized where a rule names them, never because "*" matches them too.

    Args:
        alias: another name by which rules may call the tensor.
    Raises:
        ValueError: it ought to be quantized, and cannot be.
    """
    if names.is_past_blocks(target.parameter):
        reason = f"of a layer after the decoder's {names.block_count} blocks (MTP), which transformers leaves out"
        return None, None, reason
    if not names.known(target.parameter):
        return None, None, "not a weight of the model as transformers builds it"
    pattern, spec = rules.pattern(info.name, alias), rules.spec(info.name, alias)
    inside, naming = names.block(target.parameter) is not None, _naming_rule(info.name, alias, rules)
    if not inside and not naming:
        return None, None, "outside the decoder blocks"
    if spec is None:
        return None, None, f"kept by the rule {pattern}: {KEPT}" if pattern else "no rule of the recipe names it"
    kind = weight_kind(model, target)
    if is_fused_experts(model, target):
        raise ValueError(f"experts fused into one tensor of shape {list(info.shape)} are not supported yet")
    if kind is None or (kind == "embedding" and inside):
        reason = not_linear(model, target)
        if naming and len(info.shape) > 1:
            raise ValueError(f"the rule {naming} asks for it, and it is {reason}")
        return None, None, reason
    if kind != "embedding" and not naming and (gate := gate_reason(model, target)):
        return None, None, gate
    if info.dtype not in _FLOATS:
        raise ValueError(f"dtype {info.dtype} is not bfloat16, float16 or float32: quantized already?")
    return spec, kind, ""


def _naming_rule(name: str, alias: str, rules: Rules) -> str | None:
    """The rule that decides on a tensor, where the rule spells the layer's own name; "*" names nothing."""
    pattern = rules.pattern(name, alias)
    return pattern if pattern and name.removesuffix(".weight").rpartition(".")[2] in pattern else None


def _refuse_split_units(tensors: list[PlannedTensor], rules: Rules, aliases: Mapping[str, str]) -> None:
    """Servers multiply by q, k and v, by gate and up, and by all experts of a block as by one weight.

    Raises:
        ConfigError: a rule gives parts of such a unit different schemes.
    """
    units: dict[str, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.block is not None and len(tensor.info.shape) == 2 and tensor.info.name.endswith(".weight"):
            units[fused_unit(tensor.module)].append(tensor)
    split = []
    for unit, parts in units.items():
        schemes = {part.module: part.spec.scheme.name if part.spec else KEPT for part in parts}
        if len(set(schemes.values())) > 1 and any(
            rules.pattern(part.info.name, aliases[part.info.name]) for part in parts
        ):
            some = [f"{name} {schemes[name]}" for name in {scheme: name for name, scheme in schemes.items()}.values()]
            split.append(f"{unit}: {', '.join(some)}")
    if split:
        raise ConfigError(
            "rules give the parts of a unit different schemes, and servers such as vLLM fuse these parts into one "
            "weight: they stop, or take the first part's scheme for all; name all parts in the rule, or set "
            f"allow_split_fused: true (--allow-split-fused) for runtimes that do not fuse:\n{listing(split)}"
        )


def _choose_format(
    wanted: Format | None, tensors: list[PlannedTensor], cache: CacheType | None
) -> tuple[Format, list[str]]:
    """The format that is wanted or, for None, the first that can hold every layer; and why those before it cannot.

    Raises:
        ConfigError: it, or every format, cannot hold some layer.
    """
    layers = {tensor.module: (tensor.spec.scheme, tensor.shape) for tensor in tensors if tensor.spec}
    embeddings = [tensor.module for tensor in tensors if tensor.kind == "embedding"]
    if wanted is None:
        return first_fitting(layers, embeddings, cache)
    if problems := misfits(wanted, layers, embeddings, cache):
        keep = "keep such layers by a rule, as in layers: {'NAME': none} (--layer 'NAME=none')"
        raise ConfigError(f"{wanted.name} cannot hold every layer; {keep}:\n{listing(problems)}")
    return wanted, []


def _units(tensors: list[PlannedTensor]) -> list[Unit]:
    outside = [tensor for tensor in tensors if tensor.block is None]
    shards = group_by_bytes(outside, lambda tensor: tensor.info.nbytes)
    units = [Unit(f"outside {number}", group) for number, group in enumerate(shards)]
    blocks = sorted({tensor.block for tensor in tensors if tensor.block is not None})
    return units + [Unit(f"block {b}", [each for each in tensors if each.block == b]) for b in blocks]
