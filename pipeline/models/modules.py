"""Puts layers, quantized ones above all, in the places of a model's dense ones."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitpress.kernels.linear import QEmbedding, QExperts, QLinear
from bitpress.kernels.qtensor import QTensor

from ..errors import CheckpointError, ConfigError
from ..storage.checkpoint import Checkpoint
from ..system.progress import OnStep
from ..system.threads import one_ahead
from .experts import ExpertLayout
from .quantized import QuantizedCheckpoint
from .stored_layer import check_shape, read_layer
from .structure import ParameterPath, TensorNames, replace_module

MakeLayer = Callable[[Tensor | None], nn.Module]  # of the bias, None for experts


class _DenseLinear(nn.Module):
    """A linear layer that is not quantized, as one piece of an expert."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def dense_layer(weight: Tensor) -> MakeLayer:
    """For replace_layers: an expert's piece [out, in] that is not quantized."""
    return lambda bias: _DenseLinear(weight)


def replace_layers(
    model: PreTrainedModel, names: TensorNames, layers: Iterable[tuple[ParameterPath, MakeLayer]]
) -> None:
    """Put a module in the place of each target, linear layers and experts alike, one after the other.

    Args:
        layers: targets, each with a function of the bias (None for experts) that makes the module.
    """
    experts: dict[str, dict[int, dict[int, nn.Module]]] = defaultdict(lambda: defaultdict(dict))
    for target, make in layers:
        if target.expert:
            expert, piece, _ = target.expert
            experts[target.parameter][expert][piece] = make(None)
            continue
        path = target.parameter.removesuffix(".weight")
        replace_module(model, path, make(getattr(model.get_submodule(path), "bias", None)))
    for parameter, table in experts.items():
        rows = [[table[e][p] for p in sorted(table[e])] for e in sorted(table)]
        layout = names.experts.get(parameter)
        place_experts(
            model, parameter, QExperts(rows, layout.transposed, layout.interleaved) if layout else QExperts(rows)
        )


def place_experts(model: PreTrainedModel, parameter: str, experts: QExperts) -> None:
    """Put the layers of experts in the place of the parameter that holds all."""
    owner = model.get_submodule(parameter.rpartition(".")[0])
    for config in (model.config, getattr(owner, "config", None)):
        if config is not None:
            config._experts_implementation = "eager"  # the others want one tensor
    replace_module(model, parameter, experts)


def experts_of(contents: QuantizedCheckpoint) -> set[str]:
    """The 3-D parameters of which at least one expert is quantized."""
    return {target.parameter for target in contents.quantized.values() if target.expert}


def quantized_layers(
    checkpoint: Checkpoint,
    contents: QuantizedCheckpoint,
    device_of: Callable[[ParameterPath], torch.device],
    kernel: str = "auto",
    on_step: OnStep = lambda done, total: None,
    restored: Mapping[str, MakeLayer] | None = None,
) -> Iterator[tuple[ParameterPath, MakeLayer]]:
    """For replace_layers: each quantized layer, checked, and experts beside quantized ones as they are.

    The next layer is being read while a kernel repacks one.

    Args:
        restored: layers that are packed already, and are not read.
    """
    restored = restored or {}
    experts, dtype, total = experts_of(contents), contents.model.dtype, len(contents.quantized)
    for name, target in contents.plain.items():
        if target.parameter in experts:
            yield target, dense_layer(checkpoint.read(name).to(device_of(target), dtype))
    qtensors = one_ahead(
        lambda layer: read_layer(checkpoint, contents.format, contents.schemes[layer], layer),
        [layer for layer in contents.quantized if layer not in restored],
    )
    for number, (layer, target) in enumerate(contents.quantized.items()):
        on_step(number, total)
        if layer in restored:
            yield target, restored[layer]
            continue
        qtensor = next(qtensors)
        check_shape(layer, contents.shapes[layer], qtensor)
        yield target, _maker(qtensor.to(device_of(target)), dtype, kernel, contents.kinds[layer])
        for tied in contents.shared.get(layer, ()):
            yield tied, _maker(qtensor.to(device_of(tied)), dtype, kernel, "linear")
        del qtensor  # its memory serves for the next but one
    on_step(total, total)


def _maker(qtensor: QTensor, dtype: torch.dtype, kernel: str, kind: str) -> MakeLayer:
    def make(bias: Tensor | None) -> nn.Module:
        try:
            return QEmbedding(qtensor, dtype) if kind == "embedding" else QLinear(qtensor, bias, dtype, kernel)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return make


def part_experts(dense: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Where `quantized` has experts of layers, give `dense` such, too; their weights are views of what it has."""
    for path, module in list(quantized.named_modules()):
        if not isinstance(module, QExperts):
            continue
        parameter, count = dense.get_parameter(path).detach(), len(module.experts)
        pieces = ("",) * len(list(module.experts[0].children()))
        layout = ExpertLayout(count, pieces, module.transposed, module.interleaved)
        each = parameter.view(count, *layout.expert_shape(tuple(parameter.shape)))
        rows = [[dense_layer(part)(None) for part in layout.split(expert)] for expert in each]
        place_experts(dense, path, QExperts(rows, module.transposed, module.interleaved))


def joined_experts(
    names: TensorNames, plain: Mapping[str, ParameterPath], read: Callable[[str], Tensor]
) -> Iterator[tuple[ParameterPath, Tensor]]:
    """Each parameter of all experts that the files hold one by one, unquantized, and its values.

    Args:
        plain: tensors -> where they go; those that are not of an expert are passed over. read: gives a tensor.
    """
    parts: dict[str, list[tuple[tuple[int, int, int], str]]] = defaultdict(list)
    for name, target in plain.items():
        if target.expert:
            parts[target.parameter].append((target.expert, name))
    for parameter, items in parts.items():
        count = items[0][0][2]
        tensors = [read(name) for _, name in sorted(items)]
        layout = names.experts.get(parameter) or ExpertLayout(len(tensors) // count, ("",) * count)
        experts = [layout.join(tensors[i : i + count]) for i in range(0, len(tensors), count)]
        target = ParameterPath(parameter)
        yield target, torch.stack(experts).view(names.shape(target) or ())


def assembled_tensors(
    names: TensorNames, plain: Mapping[str, ParameterPath], read: Callable[[str], Tensor]
) -> Iterator[tuple[ParameterPath, Tensor]]:
    """Each parameter that is made of several tensors of the files, or of a part of one, and its values.

    See joined_experts and converted_tensors.
    """
    yield from joined_experts(names, plain, read)
    yield from converted_tensors(names, plain, read)


def converted_tensors(
    names: TensorNames, plain: Mapping[str, ParameterPath], read: Callable[[str], Tensor]
) -> Iterator[tuple[ParameterPath, Tensor]]:
    """Each parameter that transformers makes of a part of a tensor or of several, and its values.

    Args:
        plain: tensors -> where they go; those that go there as they are are passed over. read: gives a tensor.
    Raises:
        CheckpointError: transformers cannot make it of the tensors that are there, or makes it of another shape.
    """
    parts: dict[str, dict[str, ParameterPath]] = defaultdict(dict)
    for name, target in plain.items():
        if target.converter is not None:
            parts[target.parameter][name] = target
    for parameter, sources in parts.items():
        some = next(iter(sources))
        try:
            parameters = names.convert(sources[some], {target.source: read(name) for name, target in sources.items()})
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise CheckpointError(f"{some}: transformers cannot make {parameter} of it: {error}") from error
        for path, tensor in parameters.items():
            target = ParameterPath(path)
            if tensor.shape != names.shape(target):
                expected = list(names.shape(target) or ())
                raise CheckpointError(f"{some}: gives {path} shape {list(tensor.shape)}, by config.json {expected}")
            yield target, tensor.contiguous()


def names_of_experts(contents: QuantizedCheckpoint) -> dict[str, str]:
    """Module -> layer, as the checkpoint names it: ….experts.gate_up_proj.experts.3.0 -> ….experts.3.gate_proj."""
    experts = [(target.parameter, target.expert, layer) for layer, target in contents.quantized.items()]
    return {f"{parameter}.experts.{e[0]}.{e[1]}": layer for parameter, e, layer in experts if e}


def set_tensor(model: PreTrainedModel, target: ParameterPath, tensor: Tensor, device: torch.device) -> None:
    """Put a tensor of the files where the model has a parameter or buffer, in that one's dtype."""
    path, _, leaf = target.parameter.rpartition(".")
    module = model.get_submodule(path)
    if (buffer := module._buffers.get(leaf)) is not None:
        module._buffers[leaf] = tensor.to(device, buffer.dtype)
        return
    place = module._parameters.get(leaf)
    if target.transposable and place is not None and place.shape != tensor.shape:
        tensor = tensor.transpose(1, 2).contiguous()
    dtype = model.dtype if place is None else place.dtype
    module._parameters[leaf] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
