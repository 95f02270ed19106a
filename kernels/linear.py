"""Modules that stand where a model had its dense weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu.native import NativeInt8
from .qtensor import QTensor
from .registry import Selection, select


class QLinear(nn.Module):
    """A linear layer (nn.Linear or Conv1D) whose weight is quantized; input [..., in], output [..., out].

    Kernels know nothing of a QTensor's order: the inputs are put into it here, before the kernel reads them.
    """

    order: Tensor | None
    siblings: "Siblings | None" = None  # whose product this layer's is a part of
    number: int = 0  # among them

    def __init__(self, qtensor: QTensor, bias: Tensor | None, dtype: torch.dtype, kernel: str = "auto"):
        super().__init__()
        self.scheme, (self.out_features, self.in_features) = qtensor.scheme, qtensor.shape
        self.dtype, self.device = dtype, qtensor.codes.device
        self.register_buffer("order", qtensor.order, persistent=False)  # so that its bytes count with the model's
        qtensor = replace(qtensor, order=None)
        self.selection: Selection = select(qtensor, dtype, self.device, kernel)
        self.prepared = self.selection.kernel.prepare(qtensor, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLinear":
        """Refuse what .to(), .half(), .cuda() … would break: the weight was repacked for one device and dtype."""
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ValueError(
                f"this layer was packed for {self.dtype} on {self.device}, not {after.dtype} on {after.device}; "
                "load the model again with the device and dtype that are wanted"
            )
        return self

    def join(self, siblings: "Siblings", number: int) -> None:
        """From now on, this layer's output is a part of theirs. The first holds all of the weight, the others none."""
        self.siblings, self.number = siblings, number
        self.prepared = nn.Module() if number else siblings.prepared

    def forward(self, x: Tensor) -> Tensor:
        if self.siblings is not None:
            return self.siblings.part(self.number, x)
        x = x if self.order is None else x.index_select(-1, self.order)
        return self.selection.kernel.linear(x, self.prepared, self.bias)

    def extra_repr(self) -> str:
        ordered = "" if self.order is None else ", inputs reordered"
        joined = "" if self.siblings is None else ", with its siblings"
        kernel = self.selection.kernel.name
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}, {kernel}{ordered}{joined}"


@contextmanager
def inputs_left_alone(model: nn.Module) -> Iterator[int]:
    """Meanwhile, layers of weight-only schemes whose kernel rounds its inputs do not; yields how many these are."""
    found = []
    for layer in model.modules():
        if isinstance(layer, QLinear) and layer.scheme.activations is None:
            kernel = layer.selection.kernel
            if isinstance(kernel, NativeInt8) and kernel.quantizes_inputs:
                found.append((layer, layer.selection, replace(layer.selection, kernel=kernel.unrounded())))
    try:
        for layer, _, other in found:
            layer.selection = other
        yield len(found)
    finally:
        for layer, own, _ in found:
            layer.selection = own


class QExperts(nn.Module):
    """Stands where transformers keeps a 3-D expert parameter [experts, out, in] that its forward indexes by expert.

    Each expert is a list of layers whose outputs are concatenated (gate and up, say). Indexing gives an object that
    `torch.nn.functional.linear` accepts in the weight's place, so the model's own forward stays as it is.
    """

    def __init__(self, experts: Iterable[Iterable[nn.Module]]):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(pieces) for pieces in experts)

    def __getitem__(self, index: int | Tensor) -> "_ExpertWeight":
        pieces = self.experts[int(index)]
        assert isinstance(pieces, nn.ModuleList)
        return _ExpertWeight(pieces)


class _ExpertWeight:
    def __init__(self, pieces: nn.ModuleList):
        self.pieces = pieces

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        bias = (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
        if func is not F.linear or bias is not None or not isinstance(args[1], cls):
            raise TypeError(f"a quantized expert supports torch.nn.functional.linear(x, weight) only, not {func}")
        return torch.cat([piece(args[0]) for piece in args[1].pieces], -1)


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
