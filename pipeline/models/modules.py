"""Puts layers, quantized ones above all, in the places of a model's dense ones."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitpress.kernels.linear import QEmbedding, QExperts, QLinear
from bitpress.kernels.qtensor import QTensor

from ..errors import ConfigError
from ..storage.checkpoint import Checkpoint
from ..system.progress import OnStep
from ..system.threads import one_ahead
from .quantized import QuantizedCheckpoint, check_shape, read_layer
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
        place_experts(model, parameter, [[table[e][p] for p in sorted(table[e])] for e in sorted(table)])


def place_experts(model: PreTrainedModel, parameter: str, experts: list[list[nn.Module]]) -> None:
    """Put layers, those of each expert one after the other, in the place of a 3-D parameter (see QExperts)."""
    replace_module(model, parameter, QExperts(experts))
    model.config._experts_implementation = "eager"  # transformers' other ones want one 3-D tensor


def experts_of(contents: QuantizedCheckpoint) -> set[str]:
    """The 3-D parameters of which at least one expert is quantized."""
    return {target.parameter for target in contents.quantized.values() if target.expert}


def quantized_layers(
    checkpoint: Checkpoint,
    contents: QuantizedCheckpoint,
    device_of: Callable[[ParameterPath], torch.device],
    kernel: str = "auto",
    on_step: OnStep = lambda done, total: None,
) -> Iterator[tuple[ParameterPath, MakeLayer]]:
    """For replace_layers: each quantized layer, checked, and experts beside quantized ones as they are.

    The next layer is being read while a kernel repacks one.
    """
    experts, dtype, total = experts_of(contents), contents.model.dtype, len(contents.quantized)
    for name, target in contents.plain.items():
        if target.parameter in experts:
            yield target, dense_layer(checkpoint.read(name).to(device_of(target), dtype))
    qtensors = one_ahead(
        lambda layer: read_layer(checkpoint, contents.format, contents.schemes[layer], layer), contents.quantized
    )
    for number, ((layer, target), qtensor) in enumerate(zip(contents.quantized.items(), qtensors)):
        on_step(number, total)
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
        owner, _, leaf = path.rpartition(".")
        parameter = getattr(dense.get_submodule(owner), leaf)
        assert isinstance(parameter, Tensor)
        pieces = [len(list(expert.children())) for expert in module.experts]
        rows = [[dense_layer(part)(None) for part in each.chunk(n)] for each, n in zip(parameter.detach(), pieces)]
        place_experts(dense, path, rows)


def names_of_experts(contents: QuantizedCheckpoint) -> dict[str, str]:
    """Module -> layer, as the checkpoint names it: ….experts.gate_up_proj.experts.3.0 -> ….experts.3.gate_proj."""
    experts = [(target.parameter, target.expert, layer) for layer, target in contents.quantized.items()]
    return {f"{parameter}.experts.{e[0]}.{e[1]}": layer for parameter, e, layer in experts if e}


def set_tensor(model: PreTrainedModel, parameter: str, tensor: Tensor, device: torch.device) -> None:
    """Put a tensor where the model has a parameter or buffer of this name, in that one's dtype."""
    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    if (buffer := module._buffers.get(leaf)) is not None:
        module._buffers[leaf] = tensor.to(device, buffer.dtype)
        return
    place = module._parameters.get(leaf)
    dtype = model.dtype if place is None else place.dtype
    module._parameters[leaf] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
