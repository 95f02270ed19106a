"""Layers that read the same input as one product: q, k and v, or gate and up. Fewer and larger products are faster.

The model and its forward stay as they are, and so does the result of calling any one of the layers: whichever is asked
first computes the outputs of all, and those that are then asked with the very same tensor take theirs. Asked with
another tensor, a layer computes all again. A tensor that is changed in place between two siblings is not noticed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .qlinear import QLinear

_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Siblings:
    """What the layers share. The last one lets go of input and outputs, so that nothing is held between forwards."""

    def __init__(self, layers: Sequence[QLinear], prepared: nn.Module):
        self.selection, self.prepared, self.bias = layers[0].selection, prepared, _biases(layers)
        self.sizes = [layer.out_features for layer in layers]
        self._held: tuple[Tensor, Tensor] | None = None  # one attribute, so that threads cannot mix two

    def part(self, number: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] of this layer."""
        held = self._held
        if held is None or held[0] is not x:
            held = (x, self.selection.kernel.linear(x, self.prepared, self.bias))
        self._held = held if number + 1 < len(self.sizes) else None
        start = sum(self.sizes[:number])
        return held[1][..., start : start + self.sizes[number]]


def join_siblings(model: nn.Module) -> int:
    """Join the quantized layers that go by the names of siblings, where their schemes and kernels are the same and the
    kernel has `join`; returns how many there are now fewer."""
    fewer = 0
    for parent in list(model.modules()):
        for names in _NAMES:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), QLinear)]
            if len(layers) == len(names) and _alike(layers) and (prepared := _joined(layers)) is not None:
                shared = Siblings(layers, prepared)
                for number, layer in enumerate(layers):
                    layer.join(shared, number)
                fewer += len(names) - 1
    return fewer


def _alike(layers: Sequence[QLinear]) -> bool:
    kinds = {
        (layer.scheme, layer.in_features, layer.selection.kernel.name, layer.dtype, layer.device) for layer in layers
    }
    free = all(layer.order is None and layer.siblings is None for layer in layers)
    return len(kinds) == 1 and free


def _joined(layers: Sequence[QLinear]) -> nn.Module | None:
    join = getattr(layers[0].selection.kernel, "join", None)
    return join([layer.prepared for layer in layers]) if join else None


def _biases(layers: Sequence[QLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    first = layers[0]
    none = [torch.zeros(layer.out_features, dtype=first.dtype, device=first.device) for layer in layers]
    return torch.cat([zeros if layer.bias is None else layer.bias.detach() for layer, zeros in zip(layers, none)])
