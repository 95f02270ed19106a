"""The canonical form of a quantized weight. Formats convert to and from it at the disk, kernels repack it at load."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .scheme import Scheme

_OWN = ("codes", "scales", "zeros", "order")  # the tensors that have a field


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [out_features, in_features] = shape.

    The scheme's weight type (kernels/weights/) says which tensors there are, and their shapes and dtypes.

    codes, scales: what every type has. zeros: zero points, None where the type stores none.
    extra: what else the type stores, by name, such as "nested.absmax" of nf4-dq; and what belongs to the inputs, such
        as "input_scale" of int8-static.
    order: int32 [in], a permutation, where the inputs were quantized in another order ("act-order"): column k of codes
        and its group's scales and zeros are of column order[k] of the weight, so that groups lie together whatever the
        order. None where it is theirs.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    order: Tensor | None = None

    @staticmethod
    def of(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "QTensor":
        """The QTensor of these tensors, by the names that `tensors()` gives.

        Raises:
            KeyError: "codes" or "scales" is missing.
        """
        own = {name: tensors.get(name) for name in ("zeros", "order")}
        extra = {name: tensor for name, tensor in tensors.items() if name not in _OWN}
        return QTensor(scheme, shape, tensors["codes"], tensors["scales"], extra=extra, **own)

    @staticmethod
    def without_content(scheme: Scheme, shape: tuple[int, int]) -> "QTensor":
        """A weight on the device "meta", each tensor of the first dtype that the weight type allows: to ask kernels and
        formats what they think of it."""
        layout = scheme.layout(shape)
        tensors = {name: torch.empty(size, dtype=kinds[0], device="meta") for name, (size, kinds) in layout.items()}
        return QTensor.of(scheme, shape, tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for, [out, in]; computed in float32. The definition of truth for kernels."""
        weight = self.scheme.weight.dequantize(self.shape, dict(self.tensors()), dtype)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def rows(self, ids: Tensor) -> "QTensor":
        """The weight [n, in] of these rows.

        Args:
            ids: integers [n], each in 0..out-1.
        Raises:
            ValueError: rows of such a weight cannot be taken apart.
        """
        tensors = self.scheme.weight.rows(self.shape, dict(self.tensors()), ids)
        taken = QTensor.of(self.scheme, (len(ids), self.shape[1]), tensors)
        return replace(taken, order=self.order)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is stored."""
        for name in _OWN:
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor
        yield from self.extra.items()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def to(self, device: torch.device | str) -> "QTensor":
        """The same on another device."""
        return QTensor.of(self.scheme, self.shape, {name: tensor.to(device) for name, tensor in self.tensors()})

    def check(self) -> None:
        """Refuse what a kernel must never see: wrong shapes or dtypes, values out of range or not finite.

        Raises:
            ValueError: says what is wrong, what the tensor has and what was expected.
        """
        weight = self.scheme.weight
        if problems := self.scheme.problems(self.shape):
            raise ValueError(problems[0])
        expected, tensors = dict(self.scheme.layout(self.shape)), dict(self.tensors())
        if weight.holds_order and self.order is not None:
            expected["order"] = ((self.shape[1],), (torch.int32,))
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"{', '.join(missing)} missing for scheme {self.scheme.name}")
        if extra := sorted(tensors.keys() - expected.keys()):
            raise ValueError(f"{', '.join(extra)} does not belong to scheme {self.scheme.name}")
        for name, (shape, dtypes) in expected.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                actual, whole = list(tensor.shape), list(self.shape)
                raise ValueError(f"{name} has shape {actual}, expected {list(shape)} for {whole}")
            if tensor.dtype not in dtypes:
                raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
            if tensor.is_floating_point() and (bad := _count_not_finite(tensor)):
                raise ValueError(f"{name} has {bad} NaN or infinite values")
        weight.check(self.shape, tensors)
        if self.scheme.static:
            self.scheme.static.check(tensors)
        if self.order is not None:
            check_permutation(self.order)


def _count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite; torch cannot tell of float8 ones, which are widened a piece at a time."""
    pieces: Iterable[Tensor] = (tensor,)
    if tensor.element_size() == 1:
        pieces = (piece.to(torch.float32) for piece in tensor.flatten().split(1 << 20))
    return sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)


def check_permutation(order: Tensor) -> None:
    """Raises ValueError unless the inputs' order names each of them once: kernels read memory by it."""
    count = order.numel()
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= count:
        raise ValueError(f"order holds {low if low < 0 else high}, which is out of range 0..{count - 1}")
    if twice := int((torch.bincount(order, minlength=count) > 1).sum()):
        raise ValueError(f"order is no permutation: {twice} of {count} inputs are there more than once")
