"""The canonical form of a quantized weight. Formats convert to and from it at the disk, kernels repack it at load."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .packing import unpack, words
from .scheme import NF4_BLOCK, Scheme

NESTED_BLOCK = 256

# The NF4 code book: quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E), rounded to float32.
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NestedScales:
    """NF4's double quantization: block scale i = codebook[scales[i]] * absmax[i // 256] + offset.

    absmax: float32 [ceil(blocks / 256)]; codebook: float32 [256]; offset: float32 scalar [].
    """

    absmax: Tensor
    codebook: Tensor
    offset: Tensor


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [out_features, in_features] = shape.

    Integer codes: `codes` int32 [out, ceil(in * bits / 32)] (see packing), `scales` floating [out, groups],
        `zeros` uint8 [out, groups] or None where the scheme is symmetric. `order` int32 [in], a permutation, where the
        inputs were quantized in another order ("act-order"): column k of codes and its group's scales and zeros are
        of column order[k] of the weight, so that groups lie together whatever the order. None where it is theirs.
    NF4: `codes` uint8 [ceil(out * in / 2)], the even element in the high nibble; `scales` float32
        [ceil(out * in / 64)], or uint8 of that shape with `nested` where the scheme is double-quantized.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    nested: NestedScales | None = None
    order: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for, [out, in]; computed in float32. The definition of truth for kernels."""
        if self.scheme.code == "nf4":
            return self._dequantize_nf4(dtype)
        out_features, in_features = self.shape
        codes = unpack(self.codes, self.scheme.bits, in_features).unflatten(1, (self.scales.shape[1], -1))
        centred = codes.to(torch.float32)
        centred -= self.scheme.middle if self.zeros is None else self.zeros.unsqueeze(-1)
        centred *= self.scales.to(torch.float32).unsqueeze(-1)
        weight = centred.view(out_features, in_features).to(dtype)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def _dequantize_nf4(self, dtype: torch.dtype) -> Tensor:
        count = self.shape[0] * self.shape[1]
        codebook = torch.tensor(NF4_CODEBOOK, device=self.codes.device)
        nibbles = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten()
        values = codebook[nibbles.to(torch.int32)]
        values = torch.nn.functional.pad(values, (0, self.scales.numel() * NF4_BLOCK - values.numel()))
        values = values.view(-1, NF4_BLOCK) * self.block_scales().unsqueeze(-1)
        return values.flatten()[:count].view(self.shape).to(dtype)

    def block_scales(self) -> Tensor:
        """NF4's float32 scale of each block of 64, double quantization undone; [ceil(out * in / 64)]."""
        if self.nested is None:
            return self.scales
        spread = self.nested.absmax.repeat_interleave(NESTED_BLOCK)[: self.scales.numel()]
        return self.nested.codebook[self.scales.to(torch.int32)] * spread + self.nested.offset

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is stored."""
        for owner in (self, self.nested):
            for field in fields(owner) if owner is not None else ():
                if isinstance(value := getattr(owner, field.name), Tensor):
                    yield (field.name if owner is self else f"nested.{field.name}"), value

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def to(self, device: torch.device | str) -> "QTensor":
        def moved(owner: "QTensor | NestedScales") -> dict[str, Any]:
            values = {field.name: getattr(owner, field.name) for field in fields(owner)}
            return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}

        nested = replace(self.nested, **moved(self.nested)) if self.nested else None
        return replace(self, nested=nested, **moved(self))

    def check(self) -> None:
        """Refuse what a kernel must never see: wrong shapes or dtypes, values out of range or not finite.

        Raises:
            ValueError: says what is wrong, what was found and what was expected.
        """
        if problems := self.scheme.problems(self.shape):
            raise ValueError(problems[0])
        expected = dict(self._layout())
        found = dict(self.tensors())
        if missing := sorted(expected.keys() - found.keys()):
            raise ValueError(f"{', '.join(missing)} missing for scheme {self.scheme.name}")
        if extra := sorted(found.keys() - expected.keys()):
            raise ValueError(f"{', '.join(extra)} does not belong to scheme {self.scheme.name}")
        for name, (shape, dtypes) in expected.items():
            tensor = found[name]
            if tuple(tensor.shape) != shape:
                found_shape, whole = list(tensor.shape), list(self.shape)
                raise ValueError(f"{name} has shape {found_shape}, expected {list(shape)} for {whole}")
            if tensor.dtype not in dtypes:
                raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has {(~torch.isfinite(tensor)).sum().item()} NaN or infinite values")
        if self.zeros is not None and int(self.zeros.max()) > self.scheme.max_code:
            raise ValueError(f"zero point {int(self.zeros.max())} is out of range 0..{self.scheme.max_code}")
        if self.order is not None:
            self._check_order(self.order)

    @staticmethod
    def _check_order(order: Tensor) -> None:
        """Raises ValueError unless the inputs' order names each of them once: kernels read memory by it."""
        count = order.numel()
        low, high = int(order.min()), int(order.max())
        if low < 0 or high >= count:
            raise ValueError(f"order holds {low if low < 0 else high}, which is out of range 0..{count - 1}")
        if twice := int((torch.bincount(order, minlength=count) > 1).sum()):
            raise ValueError(f"order is no permutation: {twice} of {count} inputs are there more than once")

    def _layout(self) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]]:
        out_features, in_features = self.shape
        if self.scheme.code == "int":
            groups = self.scheme.groups(in_features)
            yield "codes", ((out_features, words(in_features, self.scheme.bits)), (torch.int32,))
            yield "scales", ((out_features, groups), (torch.float16, torch.bfloat16, torch.float32))
            if not self.scheme.symmetric:
                yield "zeros", ((out_features, groups), (torch.uint8,))
            if self.order is not None:
                yield "order", ((in_features,), (torch.int32,))
            return
        blocks = -(-out_features * in_features // NF4_BLOCK)
        yield "codes", ((-(-out_features * in_features // 2),), (torch.uint8,))
        yield "scales", ((blocks,), (torch.uint8 if self.scheme.double_quant else torch.float32,))
        if self.scheme.double_quant:
            yield "nested.absmax", ((-(-blocks // NESTED_BLOCK),), (torch.float32,))
            yield "nested.codebook", ((256,), (torch.float32,))
            yield "nested.offset", ((), (torch.float32,))
