"""Puts layers, quantized ones above all, in the places of a model's dense ones."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitpress.kernels.qlinear import QExperts, QLinear
from bitpress.kernels.qtensor import QTensor

from .blocks import Names, Target, replace_module
from .checkpoint import Checkpoint
from .errors import ConfigError
from .layout import Layout, check_shape, read_layer
from .threads import one_ahead

MakeLayer = Callable[[Tensor | None], nn.Module]  # of the bias, None for experts
OnStep = Callable[[int, int], None]


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


def replace_layers(model: PreTrainedModel, names: Names, layers: Iterable[tuple[Target, MakeLayer]]) -> None:
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


def experts_of(layout: Layout) -> set[str]:
    """The 3-D parameters of which at least one expert is quantized."""
    return {target.parameter for target in layout.quantized.values() if target.expert}


def quantized_layers(
    checkpoint: Checkpoint,
    layout: Layout,
    device_of: Callable[[Target], torch.device],
    kernel: str = "auto",
    on_step: OnStep = lambda done, total: None,
) -> Iterator[tuple[Target, MakeLayer]]:
    """For replace_layers: each quantized layer, checked, and experts beside quantized ones as they are.

    The next layer is being read while a kernel repacks one.
    """
    experts, dtype = experts_of(layout), layout.model.dtype
    for name, target in layout.plain.items():
        if target.parameter in experts:
            yield target, dense_layer(checkpoint.read(name).to(device_of(target), dtype))
    qtensors = one_ahead(lambda layer: read_layer(checkpoint, layout.format, layout.scheme, layer), layout.quantized)
    for number, ((layer, target), qtensor) in enumerate(zip(layout.quantized.items(), qtensors)):
        on_step(number, len(layout.quantized))
        check_shape(layout, layer, qtensor)
        yield target, _maker(qtensor.to(device_of(target)), dtype, kernel)
        del qtensor  # its memory serves for the next but one
    on_step(len(layout.quantized), len(layout.quantized))


def _maker(qtensor: QTensor, dtype: torch.dtype, kernel: str) -> MakeLayer:
    def make(bias: Tensor | None) -> nn.Module:
        try:
            return QLinear(qtensor, bias, dtype, kernel)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return make
