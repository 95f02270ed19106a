"""The structure of any architecture with a text decoder that transformers has: which tensor is which weight of which
block.

The model is built from config.json alone, its parameters on the meta device, and asked; there is no per-model code. A
vision-language model is built whole, and its decoder blocks are those of its text decoder.
"""

import copy
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    build_glob_alternation,
    rename_source_key,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, listing
from ..formats.names import fused_unit as fused_unit
from ..storage.checkpoint import Checkpoint, TensorInfo
from .dtypes import dtype_of_most
from .experts import ExpertSlice, expert_layouts
from .pretrained import builds_a_model, load_config

Value = TypeVar("Value")

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)(\.(?P<piece>\w+))?\.(?P<kind>weight|bias)")

# in the order in which they are asked for the class that a config names
_AUTO_CLASSES = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM)
_ROUTER = re.compile(r"(.+_)?gate|wg|gating|gate_?network|(.+_)?router(_.+)?")  # names of layers; gate_proj is none


@dataclass(frozen=True)
class ParameterPath:
    """Where a checkpoint's tensor goes in the model.

    parameter: the model's own name of it, such as "model.layers.0.mlp.experts.gate_up_proj".
    expert: (expert index, piece index, pieces) where the model keeps one tensor per expert in a parameter of all
        experts, as gate (piece 0) and up (piece 1) of each expert.
    transposable: the files may hold all experts as the model does, or each of them transposed; the shape tells.
    converter: the number of transformers' converter that makes the parameter, and maybe others after it, of this tensor
        and maybe others: q, k and v of one weight of a vision tower. source: the converter's name of this tensor.
    """

    parameter: str
    expert: tuple[int, int, int] | None = None
    transposable: bool = False
    converter: int | None = None
    source: str = ""


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """The auto class of transformers whose from_pretrained builds the model that a config names.

    `architectures` in the config names the model's class, such as Qwen2VLForConditionalGeneration. One config may
    serve several classes: Qwen3.5's serves the whole model and its text decoder alone. A config that names none of
    them gets the one that takes the whole config, not a part of it.

    Raises:
        ValueError: transformers has no class for the config that writes text.
    """
    kind = type(config)
    models = {auto: auto._model_mapping[kind] for auto in _AUTO_CLASSES if kind in auto._model_mapping}
    if not models:
        raise ValueError("transformers has no model for it that writes text")
    named = next(iter(config.architectures or ()), None)
    for fits in (
        lambda model: model.__name__ == named,
        lambda model: getattr(model, "config_class", None) is kind,
        lambda model: True,
    ):
        for auto, model in models.items():
            if any(map(fits, model if isinstance(model, tuple | list) else [model])):
                return auto
    raise AssertionError("the last one fits every model")


def unsupported(config: PreTrainedConfig) -> str | None:
    """What a model is that does not write text by a decoder alone, such as an encoder; None for one that does."""
    kind, named = config.model_type, (config.architectures or [""])[0]
    if re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression|Detection|RewardModel)$", named):
        return f"{named} is a classifier"
    speech = (
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES,
    )
    several = kind in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # kinds of input
    if any(kind in names for names in speech) and not several:
        return f"{kind} is a speech or sound model"
    pair = kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not several
    if config.is_encoder_decoder or pair:
        return f"{kind} is an encoder-decoder, or the half of one: its decoder reads what an encoder puts out"
    base = modeling_auto.MODEL_MAPPING_NAMES.get(kind, "")
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or str(base).endswith("Encoder")
    if named.endswith("ForMaskedLM") or (encoder and not getattr(config, "is_decoder", False)):
        return f"{kind} is an encoder: each token sees those after it, so it does not write text"
    return None


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint, its parameters on the meta device (they take no memory), its buffers real.

    Every parameter has the dtype that from_pretrained would give it: some models keep a few in float32.

    Raises:
        CheckpointError: transformers has no language model for this config, or the config is not sane.
    """
    sections = [checkpoint.config, checkpoint.config.get("text_config")]
    for section in (each for each in sections if isinstance(each, dict)):
        layers = section.get("num_hidden_layers", section.get("n_layer", 1))
        if not isinstance(layers, int) or not 1 <= layers <= len(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: {layers!r} layers, the files hold {len(checkpoint.tensors)} "
                "tensors"
            )
    config = load_config(checkpoint)
    what = unsupported(config)
    if what is not None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {what}; bitpress quantizes models that write text by a decoder, "
            "such as LlamaForCausalLM or Qwen2VLForConditionalGeneration: give one of these"
        )
    with builds_a_model(checkpoint), init_empty_weights(include_buffers=False), _NothingDrawn():
        chosen = dtype or config.dtype or dtype_of_most(checkpoint.tensors.values())
        model = auto_class(config).from_config(config, trust_remote_code=False, dtype=chosen)
    _keep_in_float32(model, chosen)
    return model.eval()


_DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")


class _NothingDrawn(TorchFunctionMode):
    """Meanwhile, no random numbers are drawn for parameters on the meta device, which have no memory for them.

    torch takes half a millisecond to draw none: half the time of a skeleton.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensor = args[0] if args else named.get("tensor")  # of Tensor.normal_, and of torch.nn.init.normal_
        if getattr(func, "__name__", "") in _DRAWS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **named)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Give the parameters that the model's class keeps in a wider dtype that dtype (`_keep_in_fp32_modules`)."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[arg-type]
    if not plan:
        return
    patterns, globs, _ = build_glob_alternation(list(plan))
    for module_name, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is None or not (match := patterns.search(f"{module_name}.{leaf}" if module_name else leaf)):
                    continue
                wider = tensor.to(plan[globs[match.lastgroup or ""]])
                table[leaf] = nn.Parameter(wider, requires_grad=False) if table is module._parameters else wider


def decoder(model: PreTrainedModel) -> str:
    """The name of the list of the text decoder's blocks, such as "model.language_model.layers".

    The model says which part of it is the text decoder, and its text config how many blocks that has. Where no list has
    so many, or several have, the largest is taken, and of equal ones the outermost.

    Raises:
        CheckpointError: the model has no list of blocks.
    """
    parts = [part for part in (model.get_decoder(), model) if isinstance(part, nn.Module)]
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for part in parts:
        inside = {id(module) for module in part.modules()}
        lists = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and id(module) in inside
        }
        if lists:
            sizes = {
                name: sum(parameter.numel() for parameter in module.parameters()) for name, module in lists.items()
            }
            whole = [name for name, module in lists.items() if len(module) == count]
            return max(whole or lists, key=lambda name: (sizes[name], -len(name)))
    raise CheckpointError(f"{type(model).__name__} has no list of decoder blocks")


def towers(model: PreTrainedModel) -> list[str]:
    """The parts of a model beside its text decoder that read images or sound, and no text."""
    blocks = f"{decoder(model)}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and "text" not in module.input_modalities
        and not blocks.startswith(f"{name}." if name else "")
    ]


class TensorNames:
    """Translates a checkpoint's tensor names into the model's, by transformers' own rules of renaming and merging.

    known_targets: answers of `target` that were kept, of a model with the same config; it gives these back.
    """

    def __init__(self, model: PreTrainedModel):
        self.known_targets: dict[str, ParameterPath] = {}
        self._model = model
        self._prefix = model.base_model_prefix
        self._parameters = dict(model.named_parameters())
        self.experts = expert_layouts(model)  # of every parameter that holds experts
        self.merged: set[str] = set()  # parameters that transformers itself makes of one tensor per expert
        if self.experts:
            self._rename_pieces()
        self._pieces = {
            (path.rpartition(".")[0], piece, layout.bias): ParameterPath(path, (0, number, len(layout.pieces)))
            for path, layout in self.experts.items()
            for number, piece in enumerate(layout.pieces)
        }
        self._tied = tied(model)
        stored = model.state_dict(keep_vars=True)  # without the buffers that a model computes when it is built
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        self._state = {**self._parameters, **buffers}
        for name, origin in self._tied.items():
            self._state.setdefault(name, self._state[origin])
        self._blocks = decoder(model)
        self.block_count = len(list(model.get_submodule(self._blocks).children()))

    @functools.cached_property
    def _transforms(self) -> list[WeightTransform]:
        """transformers' rules. It makes those of all architectures at once, which takes a sixth of a second."""
        return get_model_conversion_mapping(self._model)

    @functools.cached_property
    def _renamings(self) -> list[WeightRenaming]:
        return [each for each in self._transforms if isinstance(each, WeightRenaming)]

    @functools.cached_property
    def _converters(self) -> list[WeightConverter]:
        return [each for each in self._transforms if isinstance(each, WeightConverter)]

    def _rename_pieces(self) -> None:
        """Call experts' layers as the files of this architecture do where they hold them one by one: w1 and w3, say."""
        for converter in self._converters:
            if MergeModulelist not in [type(operation) for operation in converter.operations]:
                continue
            pieces = tuple(source.rpartition("*.")[2].removesuffix(".weight") for source in converter.source_patterns)
            for path, layout in self.experts.items():
                if path.endswith(converter.target_patterns[0]) and len(pieces) == len(layout.pieces):
                    self.experts[path] = replace(layout, pieces=pieces)
                    self.merged.add(path)

    def target(self, name: str) -> ParameterPath:
        """The parameter that `name` fills; a name that the model does not have comes back as it is.

        Raises:
            CheckpointError: transformers would rework this tensor in a way that bitpress does not follow.
        """
        if name in self.known_targets:
            return self.known_targets[name]
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, base_model_prefix=self._prefix, meta_state_dict=self._state
        )
        if renamed not in self._state and name in self._state:  # renamed too much: DeepSeek-V4's last norm
            return ParameterPath(name)
        if pattern is None:
            return self._one_expert(renamed) or ParameterPath(renamed)
        converted = apply_renamings(name, self._renamings)
        number = next(n for n, each in enumerate(self._converters) if each.rename_source_key(converted)[1] is not None)
        converter = self._converters[number]
        kinds = [type(operation) for operation in converter.operations]
        if renamed in self.experts and kinds == [Transpose] and getattr(converter.operations[0], "check_dims", False):
            return ParameterPath(renamed, transposable=True)
        dims = [getattr(operation, "dim", None) for operation in converter.operations]
        if (kinds, dims) not in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1])):
            patterns = (*converter.source_patterns, *converter.target_patterns)
            if renamed not in self.experts and not any("*" in each for each in patterns):
                return ParameterPath(renamed, converter=number, source=pattern)
            steps = ", ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(
                f"{name}: transformers loads it through {steps}, which bitpress does not follow; "
                "this architecture is not supported yet"
            )
        expert = re.search(pattern.replace("*.", r"(\d+)\."), converted)  # a regular expression, but for "*"
        if expert is None:
            return ParameterPath(renamed)
        pieces = converter.source_patterns
        return ParameterPath(renamed, (int(expert[1]), pieces.index(pattern), len(pieces)))

    def _one_expert(self, name: str) -> ParameterPath | None:
        """Where a tensor of one expert goes, such as ….experts.3.gate_proj.weight, if the model keeps all in one."""
        if (match := _EXPERT.fullmatch(name)) is None or self._state.get(name) is not None:
            return None
        place = self._pieces.get((match["module"], match["piece"] or "", match["kind"] == "bias"))
        if place is None or int(match["expert"]) >= self.experts[place.parameter].experts:
            return None
        return replace(place, expert=(int(match["expert"]), *place.expert[1:]))  # type: ignore[index]

    def slices(self, name: str, target: ParameterPath, shape: tuple[int, ...]) -> dict[str, ExpertSlice]:
        """The layers, or biases, of single experts that a tensor of all experts holds, by their names in an artifact.

        Args:
            name: of the tensor in the files. target: where it goes. shape: of the tensor, which fits there.
        Returns:
            name, such as ….experts.3.gate_proj.weight -> the layer; empty where it is no tensor of all experts.
        """
        layout = self.experts.get(target.parameter)
        if layout is None or target.expert is not None:
            return {}
        owner, _, leaf = target.parameter.rpartition(".")
        module = name.removesuffix(f".{leaf}")
        if module == name:  # the files call it otherwise, and the module where the model has it is not in its name
            inside = re.fullmatch(rf"({re.escape(self._blocks)}\.\d+)\.(.+)", owner)
            assert inside, "experts are in the decoder's blocks"
            number = inside[1].rpartition(".")[2]
            module = f"{name.partition(f'.{number}.')[0]}.{number}.{inside[2]}"
        stored = layout if shape == self.shape(target) else replace(layout, transposed=not layout.transposed)
        kind = "bias" if layout.bias else "weight"
        return {
            ".".join(filter(None, (module, str(expert), piece, kind))): ExpertSlice(name, stored, expert, number)
            for expert in range(layout.experts)
            for number, piece in enumerate(layout.pieces)
        }

    def parameters(self, target: ParameterPath) -> list[str]:
        """The parameters that a tensor fills, alone or with others: three where it is cut into q, k and v."""
        if target.converter is None:
            return [target.parameter]
        patterns = self._converters[target.converter].target_patterns
        before, _, after = target.parameter.partition(patterns[0])
        return [f"{before}{pattern}{after}" for pattern in patterns]

    def convert(self, target: ParameterPath, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that transformers makes of the tensors of one place.

        Args:
            target: of one of the tensors. tensors: ParameterPath.source -> the tensor, of all with that parameter.
        """
        assert target.converter is not None
        original = self._converters[target.converter]
        converter = original.copy(original.source_patterns, original.target_patterns, operations=original.operations)
        for source, tensor in tensors.items():
            converter.add_tensor(target.parameter, target.parameter, source, lambda tensor=tensor: tensor)  # type: ignore[arg-type]
        parameters = converter.convert(target.parameter, model=self._model, config=self._model.config)
        return {parameter: each[0] if isinstance(each, list) else each for parameter, each in parameters.items()}

    def known(self, parameter: str) -> bool:
        return parameter in self._state

    def shape(self, target: ParameterPath) -> tuple[int, ...] | None:
        """The shape that config.json gives the tensor; None where the model does not say."""
        parameter = self._state.get(target.parameter)
        if not isinstance(parameter, torch.Tensor):
            return None
        shape = tuple(parameter.shape)
        if target.converter is not None:
            return None
        if target.expert is None:
            return shape
        if layout := self.experts.get(target.parameter):
            return layout.piece_shape(shape)
        return (shape[1] // target.expert[2], *shape[2:])

    def dtype(self, target: ParameterPath) -> torch.dtype:
        """The dtype in which the model has a tensor that is known."""
        return self._state[target.parameter].dtype

    def fits(self, target: ParameterPath, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be the one that goes there."""
        expected = self.shape(target)
        return shape == expected or (target.transposable and expected == (shape[0], *shape[:0:-1]))

    def mismatches(self, tensors: Mapping[str, TensorInfo], targets: Mapping[str, ParameterPath]) -> dict[str, str]:
        """Tensor -> why it cannot fill its place: another shape, integers for floats, a place that is filled already.

        Args:
            tensors: of the files. targets: where those of them go that are to be looked at.
        """
        problems: dict[str, str] = {}
        first: dict[ParameterPath, str] = {}
        for name, target in targets.items():
            info, parameter = tensors[name], self._state.get(target.parameter)
            if parameter is None:
                continue
            expected = self.shape(target)
            if expected is not None and not self.fits(target, info.shape):
                problems[name] = f"{name}: shape {list(info.shape)} in the file, {list(expected)} by config.json"
            elif parameter.is_floating_point() and (not info.dtype.is_floating_point or info.dtype.itemsize == 1):
                problems[name] = f"{name}: dtype {info.dtype}, expected floating-point numbers; its scales are missing"
            elif not parameter.is_floating_point() and info.dtype.is_floating_point:
                problems[name] = f"{name}: dtype {info.dtype}, expected {parameter.dtype} by the model"
            elif (other := first.setdefault(target, name)) != name:
                problems[name] = f"{name}: is the same weight of the model as {other}"
        return problems

    def missing(self, targets: Iterable[ParameterPath]) -> list[str]:
        """Tensors of the model that none of the targets fills, or not with every piece of every expert."""
        filled: dict[str, set[tuple[int, int] | None]] = defaultdict(set)
        pieces: dict[str, int] = {}
        for target in targets:
            for parameter in self.parameters(target):
                filled[parameter].add(target.expert[:2] if target.expert else None)
            if target.expert:
                pieces[target.parameter] = target.expert[2]
        problems = []
        for name, tensor in self._state.items():
            if name in pieces:
                count = self.experts[name].experts if name in self.experts else tensor.shape[0]
                wanted = {(expert, piece) for expert in range(count) for piece in range(pieces[name])}
                if filled[name] != wanted:
                    problems.append(f"{name}: {len(filled[name])} expert tensors in the files, expected {len(wanted)}")
            elif name not in filled and name not in self._tied:
                problems.append(f"{name}: no tensor in the files")
        return problems

    def does_not_match(
        self, checkpoint: Checkpoint, targets: Mapping[str, ParameterPath], faults: list[str]
    ) -> CheckpointError:
        """The error that lists faults of the files; tensors that are not the model's show a prefix at a glance."""
        unknown = [name for name, target in targets.items() if not self.known(target.parameter)]
        some = (
            f" ({len(unknown)} of {len(targets)} tensors are not of that model, such as {unknown[0]})"
            if unknown
            else ""
        )
        return CheckpointError(f"{checkpoint.folder} does not match its config.json{some}:\n{listing(faults)}")

    def block(self, parameter: str) -> int | None:
        """The decoder block that a parameter of the model belongs to; None outside of them."""
        number = self._list_index(parameter)
        return number if number is not None and number < self.block_count else None

    def is_past_blocks(self, parameter: str) -> bool:
        """Whether it is named as if of a block that comes after the decoder's last one.

        Layers that predict further tokens (MTP) lie there. Files have them; transformers' causal models do not.
        """
        number = self._list_index(parameter)
        return number is not None and number >= self.block_count

    def in_block(self, parameter: str) -> str:
        """The parameter's name in its block, which parameters of other blocks share; its whole name outside of them."""
        if self._list_index(parameter) is None:
            return parameter
        return parameter.removeprefix(f"{self._blocks}.").partition(".")[2]

    def _list_index(self, parameter: str) -> int | None:
        """The number in the list of blocks that a name speaks of."""
        number = parameter.removeprefix(f"{self._blocks}.").split(".")[0]
        return int(number) if parameter.startswith(f"{self._blocks}.") and number.isdecimal() else None


def weight_kind(model: nn.Module, target: ParameterPath) -> str | None:
    """How a module holds the weight that could be quantized there.

    "linear" for a weight stored [out, in], "conv1d" for one stored [in, out], "embedding" for the rows [ids, features]
    of a plain nn.Embedding; None for anything else, such as an embedding of a class that does more than look up rows.
    """
    path, _, leaf = target.parameter.rpartition(".")
    if target.converter is not None:
        return None
    if target.expert:
        return None if leaf.endswith("bias") else "linear"
    module = model.get_submodule(path)
    if leaf != "weight":
        return None
    if type(module) is nn.Embedding:
        return "embedding"
    if type(module) is Conv1D:
        return "conv1d"
    return "linear" if is_plain_linear(module) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does what nn.Linear does: a router that is a subclass of it may give something else.

    A subclass with a forward of its own is asked: a copy with a small random weight must give x W' + b.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 6), (8, 6), (8,)))
    small = copy.copy(module)
    small.in_features, small.out_features = 6, 8
    parameters = {"weight": weight, "bias": bias if module.bias is not None else None}
    small._parameters = {name: None if each is None else nn.Parameter(each) for name, each in parameters.items()}
    try:
        with torch.no_grad():
            y = small(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # what it does needs another shape
        return False
    expected = nn.functional.linear(x, weight, parameters["bias"])
    return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


def gate_reason(model: PreTrainedModel, target: ParameterPath) -> str | None:
    """What a linear layer is, if it is a router or a gate: its few outputs decide much; None for any other layer.

    Args:
        target: of a weight of kind "linear" or "conv1d".
    """
    if target.expert:
        return None
    parts = target.parameter.removesuffix(".weight").split(".")
    outputs = model.get_parameter(target.parameter).shape[1 if weight_kind(model, target) == "conv1d" else 0]
    if outputs == 1:
        return "a single output: a gate"
    if _ROUTER.fullmatch(parts[-1]) or any("router" in part for part in parts[-3:]):
        return "a router or gate"
    experts = _expert_counts(model.config)
    beside_experts = hasattr(model.get_submodule(".".join(parts[:-1])), "experts")
    return "a router: as many outputs as there are experts" if beside_experts and outputs in experts else None


def _expert_counts(config: PreTrainedConfig) -> set[int]:
    """Every number of experts that a config or one of its sections names."""
    values = list(config.to_dict().items())
    for _, value in values:
        if isinstance(value, dict):
            values.extend(value.items())
    return {value for key, value in values if str(key).endswith("experts") and isinstance(value, int)}


def is_fused_experts(model: nn.Module, target: ParameterPath) -> bool:
    """Whether the files hold all experts of a layer as this one tensor [experts, …, …].

    It is a parameter of three dimensions of a module of experts: convolutions and decay tables have as many, and are
    none.
    """
    path, _, leaf = target.parameter.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(leaf)
    experts = "expert" in type(module).__name__.lower() or "experts" in path.split(".")
    return target.expert is None and parameter is not None and parameter.dim() == 3 and experts


def not_linear(model: nn.Module, target: ParameterPath) -> str:
    """Why a parameter of the model for which weight_kind is None is not quantized: what it is."""
    path, _, leaf = target.parameter.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters.get(leaf, module._buffers.get(leaf))
    if target.converter is not None:
        return f"transformers makes {path.rpartition('.')[2]}.{leaf} of it and others"
    owner = type(module).__name__
    if tensor is not None and tensor.dim() < 2:
        return "a vector"
    article = "an" if owner[0] in "AEIOU" else "a"
    if leaf == "weight":
        return f"the weight of {article} {owner}, not of a linear layer"
    return f"a {'parameter' if leaf in module._parameters else 'buffer'} of {article} {owner}, not a linear weight"


def kept_names(
    tensors: Mapping[str, TensorInfo], quantized: Collection[str], model: PreTrainedModel, names: TensorNames
) -> list[str]:
    """Layers that stay unquantized although they could be linear layers, by their names in the files.

    Other runtimes build such layers by their own model classes, which may have more than transformers' causal model:
    MTP blocks, a vision tower. So every two-dimensional floating-point `*.weight` counts, experts included, unless the
    model holds it in something else than a linear layer. A tied head counts, though no tensor of the files is its own.

    Args:
        tensors: the unquantized ones of the files, others beside them do no harm.
        quantized: names of the quantized layers.
    Returns:
        The linear modules in the model's order, then the rest in the files' order.
    """
    targets = {name: names.target(name) for name in tensors if name.endswith(".weight")}
    layers = {target.parameter: name.removesuffix(".weight") for name, target in targets.items() if not target.expert}
    done = {names.target(f"{layer}.weight").parameter for layer in quantized}
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    kept = [layers.get(f"{path}.weight", path) for path in linear if f"{path}.weight" not in done]
    listed = {*kept, *quantized}
    for name, target in targets.items():
        info, layer = tensors[name], name.removesuffix(".weight")
        if layer in listed or len(info.shape) != 2 or not info.dtype.is_floating_point:
            continue
        unknown = not names.known(target.parameter)
        if target.expert or target.converter is not None or (unknown and "embed" not in layer.rpartition(".")[2]):
            kept.append(layer)
    return kept


def with_module_paths(layers: Mapping[str, Value], names: TensorNames) -> dict[str, Value]:
    """Each layer's value by its name in the files and, where the model names it otherwise, by that name too.

    transformers looks for modules by the model's names: visual.blocks.0.attn.qkv of a file may be
    model.visual.blocks.0.attn.qkv there. Servers look for the files' names. Experts that the model holds as one tensor
    have no module.
    """
    paths: dict[str, Value] = {}
    for layer, value in layers.items():
        target = names.target(f"{layer}.weight")
        paths[layer] = value
        if not target.expert and names.known(target.parameter):
            paths.setdefault(target.parameter.removesuffix(".weight"), value)
    return paths


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` is, a submodule or a parameter of the model."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    parent._parameters.pop(leaf, None)
    setattr(parent, leaf, module)


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter whose storage it shares, such as lm_head.weight -> model.embed_tokens.weight."""
    return dict(model.all_tied_weights_keys)


def tied_copies(checkpoint: Checkpoint, targets: Mapping[str, ParameterPath], model: PreTrainedModel) -> dict[str, str]:
    """The tensors of the files that repeat a weight to which the config ties them: name -> name of that weight.

    Args:
        targets: of the tensors that are stored unquantized.
    Raises:
        CheckpointError: one differs from the weight that the config ties it to, so that one of the two would be lost.
    """
    by_parameter = {target.parameter: name for name, target in targets.items()}
    copies, faults = {}, []
    for parameter, origin in tied(model).items():
        copy, original = by_parameter.get(parameter), by_parameter.get(origin)
        if copy is None or original is None or copy == original:
            continue
        same_shape = checkpoint.tensors[copy].shape == checkpoint.tensors[original].shape
        if not same_shape or not torch.equal(checkpoint.read(copy), checkpoint.read(original)):
            faults.append(
                f"{copy} differs from {original}, though config.json ties them; set tie_word_embeddings to false in "
                "config.json if both are meant"
            )
        copies[copy] = original
    if faults:
        raise CheckpointError(faults[0] if len(faults) == 1 else f"{checkpoint.folder}:\n{listing(faults)}")
    return copies
