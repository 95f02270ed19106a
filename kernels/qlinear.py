"""Modules that stand where a model had its dense weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qtensor import QTensor
from .select import Selection, select


class QLinear(nn.Module):
    """A linear layer (nn.Linear or Conv1D) whose weight is quantized; input [..., in], output [..., out]."""

    def __init__(self, qtensor: QTensor, bias: Tensor | None, dtype: torch.dtype, kernel: str = "auto"):
        super().__init__()
        self.scheme, (self.out_features, self.in_features) = qtensor.scheme, qtensor.shape
        self.selection: Selection = select(qtensor, dtype, qtensor.codes.device, kernel)
        self.prepared = self.selection.kernel.prepare(qtensor, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.selection.kernel.linear(x, self.prepared, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}, {self.selection.kernel.name}"


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
        if func is not F.linear or kwargs or len(args) != 2:
            raise TypeError(f"a quantized expert supports torch.nn.functional.linear(x, weight) only, not {func}")
        x, weight = args
        return torch.cat([piece(x) for piece in weight.pieces], -1)
