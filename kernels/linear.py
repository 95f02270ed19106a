"""Modules that stand where a model had its dense weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import PackedWeight
from .qtensor import QTensor
from .reference import UnpackedWeight
from .registry import Selection, select


class QLinear(nn.Module):
    """A linear layer (nn.Linear or Conv1D) whose weight is quantized; input [..., in], output [..., out].

    Kernels know nothing of a QTensor's order: the inputs are put into it here, before the kernel reads them.
    """

    order: Tensor | None
    joined: "JoinedProjections | None" = None  # whose product this layer's is a part of
    number: int = 0  # among them

    def __init__(self, qtensor: QTensor, bias: Tensor | None, dtype: torch.dtype, kernel: str = "auto"):
        order, qtensor = qtensor.order, replace(qtensor, order=None)
        selection = select(qtensor, dtype, qtensor.codes.device, kernel)
        self._hold(selection, selection.kernel.pack(qtensor, dtype), order, bias, dtype, qtensor.codes.device)

    @classmethod
    def restored(
        cls,
        selection: Selection,
        packed: PackedWeight,
        order: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "QLinear":
        """The layer of a weight that its kernel has packed already; `order` as a QTensor has it."""
        layer = cls.__new__(cls)
        layer._hold(selection, packed, order, bias, dtype, device)
        return layer

    def _hold(
        self,
        selection: Selection,
        packed: PackedWeight,
        order: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.scheme, (self.out_features, self.in_features) = packed.scheme, packed.shape
        self.dtype, self.device, self.selection = dtype, device, selection
        self.register_buffer("order", order, persistent=False)  # so that its bytes count with the model's
        self.packed: nn.Module = packed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLinear":
        """Refuse what .to(), .half(), .cuda() … would break: the weight was repacked for one device and dtype."""
        _refuse_to_move(self.dtype, self.device, fn)
        return self

    def join(self, joined: "JoinedProjections", number: int) -> None:
        """From now on, this layer's output is a part of the joined one. The first layer holds all of the weight, the
        others none."""
        self.joined, self.number = joined, number
        self.packed = nn.Module() if number else joined.packed

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None:
            return self.joined.part(self.number, x)
        x = x if self.order is None else x.index_select(-1, self.order)
        return self.selection.kernel.linear(x, cast(PackedWeight, self.packed), self.bias)

    def extra_repr(self) -> str:
        ordered = "" if self.order is None else ", inputs reordered"
        joined = "" if self.joined is None else ", joined"
        kernel = self.selection.kernel.name
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}, {kernel}{ordered}{joined}"


def _refuse_to_move(dtype: torch.dtype, device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError where `fn`, of nn.Module._apply, would change a quantized layer's dtype or device."""
    after = fn(torch.empty(0, dtype=dtype, device=device))
    if (after.dtype, after.device) != (dtype, device):
        raise ValueError(
            f"this layer was packed for {dtype} on {device}, not {after.dtype} on {after.device}; "
            "load the model again with the device and dtype that are wanted"
        )


@contextmanager
def inputs_left_alone(model: nn.Module, of_all_schemes: bool = False) -> Iterator[int]:
    """Meanwhile, layers of weight-only schemes whose kernel rounds its inputs use its exact kernel instead.

    Yields how many layers these are.

    Args:
        of_all_schemes: layers whose scheme rounds inputs do so, too, where there is such a kernel.
    """
    rounding: list[tuple[QLinear, Selection]] = []
    try:
        for layer in model.modules():
            if isinstance(layer, QLinear) and (of_all_schemes or layer.scheme.activations is None):
                own = layer.selection
                if (exact := own.kernel.exact()) is not None:
                    rounding.append((layer, own))
                    layer.selection = replace(own, kernel=exact)
        yield len(rounding)
    finally:
        for layer, own in rounding:
            layer.selection = own


class QExperts(nn.Module):
    """Stands where transformers keeps a parameter of all experts, and multiplies by one of them, or by each.

    A model's own forward stays as it is: this takes the parameter's place in what models do with it, which is to index
    it by an expert and multiply, or torch.bmm with all. Each expert is a list of layers, such as gate and up.

    transposed: the parameter holds each expert as [in, out], not [out, in]. interleaved: the outputs of an expert's
    layers alternate; otherwise each layer's come together, one layer after the other.
    """

    def __init__(self, experts: Iterable[Iterable[nn.Module]], transposed: bool = False, interleaved: bool = False):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(pieces) for pieces in experts)
        self.transposed, self.interleaved = transposed, interleaved

    def multiply(self, expert: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], times an expert's weight."""
        pieces = self.experts[expert]
        assert isinstance(pieces, nn.ModuleList)
        outputs = [piece(x) for piece in pieces]
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(outputs, -1).flatten(-2) if self.interleaved else torch.cat(outputs, -1)

    @property
    def shape(self) -> tuple[int]:
        """The first size alone, which models read the number of experts from."""
        return (len(self.experts),)

    def view(self, *shape: Any) -> "QExperts":
        """Itself: models that keep all experts in two dimensions view them as three, to index an expert."""
        return self

    def __getitem__(self, index: int | Tensor) -> "_ExpertWeight":
        return _ExpertWeight(self, int(index), self.transposed)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """torch.bmm(x [experts, n, in], all experts) -> [experts, n, out].

        Inputs of an expert that are zeros are those of tokens that were not sent to it: they are left out.
        """
        if func is not torch.bmm or not isinstance(args[1], cls) or not args[1].transposed:
            raise TypeError(f"quantized experts support torch.bmm(x, weights [experts, in, out]) only, not {func}")
        outputs = []
        for expert, x in enumerate(args[0]):
            own = x.ne(0).any(-1)
            some = args[1].multiply(expert, x[own])
            outputs.append(some.new_zeros(len(x), some.shape[-1]).index_put_((own,), some))
        return torch.stack(outputs)


class _ExpertWeight:
    """One expert of a QExperts, as the matrix that a model multiplies by."""

    def __init__(self, experts: QExperts, index: int, transposed: bool):
        self.experts, self.index, self.transposed = experts, index, transposed

    @property
    def T(self) -> "_ExpertWeight":
        return _ExpertWeight(self.experts, self.index, not self.transposed)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """linear(x, weight [out, in]) and x @ weight [in, out]."""
        weight = args[1]
        bias = (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
        fits = isinstance(weight, cls) and func in (_PRODUCTS if weight.transposed else (F.linear,))
        if not fits or bias is not None:
            raise TypeError(f"a quantized expert supports linear(x, weight) or x @ weight only, not {func}")
        return weight.experts.multiply(weight.index, args[0])


_PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul)


class QEmbedding(nn.Module):
    """Stands in the place of nn.Embedding with a quantized weight [num_embeddings, embedding_dim].

    Only the rows that are asked for are dequantized, into `dtype`.

    Raises:
        ValueError: rows of such a weight cannot be taken apart.
    """

    def __init__(self, qtensor: QTensor, dtype: torch.dtype):
        super().__init__()
        self.scheme, (self.num_embeddings, self.embedding_dim) = qtensor.scheme, qtensor.shape
        self.dtype, self.device = dtype, qtensor.codes.device
        self.packed = UnpackedWeight(qtensor)
        qtensor.rows(torch.zeros(1, dtype=torch.int64, device=self.device))  # says now what is wrong, not in forward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QEmbedding":
        _refuse_to_move(self.dtype, self.device, fn)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...] -> [..., embedding_dim] of `dtype`."""
        if not ids.numel():
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=self.device)
        rows = self.packed.qtensor.rows(ids.flatten()).dequantize(self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.name}"


# The projections that read the same input, by the names that Llama-like models give them.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedProjections:
    """One product for several layers that read the same input.

    The layer that asks first computes all of it; the last one lets go of input and outputs, so that nothing is held
    between forwards.
    """

    def __init__(self, layers: Sequence[QLinear], packed: PackedWeight):
        self.selection, self.packed = layers[0].selection, packed
        self.sizes = [layer.out_features for layer in layers]
        self.bias: Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            first = layers[0]
            zeros = [torch.zeros(layer.out_features, dtype=first.dtype, device=first.device) for layer in layers]
            self.bias = torch.cat([z if layer.bias is None else layer.bias.detach() for layer, z in zip(layers, zeros)])
        self._held: tuple[Tensor, Tensor] | None = None  # one attribute, so that threads cannot mix two

    def part(self, number: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] of this layer."""
        held = self._held
        if held is None or held[0] is not x:
            held = (x, self.selection.kernel.linear(x, self.packed, self.bias))
        self._held = held if number + 1 < len(self.sizes) else None
        start = sum(self.sizes[:number])
        return held[1][..., start : start + self.sizes[number]]


def join_projections(model: nn.Module) -> int:
    """Join the quantized layers of a model that PROJECTIONS names together; returns how many products fewer there are.

    Layers stay as they are where their schemes, kernels, dtypes or devices differ, where one has an order of inputs or
    is joined already, and where the kernel cannot join them.
    """
    fewer = 0
    for parent in list(model.modules()):
        for names in PROJECTIONS:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), QLinear)]
            if len(layers) < len(names) or any(layer.order is not None or layer.joined is not None for layer in layers):
                continue
            kinds = {
                (each.scheme, each.in_features, each.selection.kernel.name, each.dtype, each.device) for each in layers
            }
            if len(kinds) > 1:
                continue
            packed = layers[0].selection.kernel.join([cast(PackedWeight, layer.packed) for layer in layers])
            if packed is None:
                continue
            joined = JoinedProjections(layers, packed)
            for number, layer in enumerate(layers):
                layer.join(joined, number)
            fewer += len(names) - 1
    return fewer
