"""Products of matrices, and attention, on CPUs where torch takes a slower way than it has to.

- float32: torch gives them to MKL, which uses AVX512 on Intel's processors alone. oneDNN comes with torch, too, and
  sums up in float32 as well. On two cores of Zen 5, 512 rows times [1536, 576] run at 205 billion products a second by
  oneDNN and at 74 by MKL, times [8192, 2048] at 208 and 86. With AVX2 alone (Zen 3) the two are as fast.
- bfloat16 and float16 on processors for which oneDNN has no such products: bfloat16 needs AVX512, float16 more than
  that. There torch goes through a loop that is seven times slower than float32's product of the same matrices (512
  rows times [2048, 2048] on Zen 3). So both are widened to float32, in which products of two such numbers are exact,
  and the sums are rounded, as torch's loop does it. Attention is made of such products.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_FEW = 16  # rows, whose product takes as long as the weight is read
_PIECE = 1 << 24  # weights that are widened at a time, 64 MB


@functools.cache
def faster(dtype: torch.dtype) -> bool:
    """Whether `linear` multiplies matrices of a dtype faster than torch's own choice, on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.float32:
        wide = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
        info = Path("/proc/cpuinfo")
        return wide and info.exists() and "GenuineIntel" not in info.read_text()
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out] -> [..., out]: F.linear, by the faster of the two ways."""
    many = x.dim() > 0 and x.numel() >= _FEW * x.shape[-1] > 0
    kinds = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter)  # others multiply by ways of their own
    plain = kinds and weight.dim() == 2 and x.dtype == weight.dtype
    ours = many and plain and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not ours or not faster(x.dtype):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        tracked: Tensor = _Tracked.apply(x, weight, bias)
        return tracked
    if x.dtype != torch.float32:
        return _widened(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of bfloat16 or float16 by way of float32, in pieces of the weight: memory holds one at a time."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    wide, step = x.float(), max(1, _PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        own = slice(start, start + step)
        y[..., own] = linear(wide, weight[own].float(), None if bias is None else bias[own].float())
    return y


class _Tracked(torch.autograd.Function):
    """The same with gradients, which are such products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        own = product(rows, weight).view_as(x) if ctx.needs_input_grad[0] else None
        of_weight = product(rows.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return own, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n] -> [m, n], by the faster of the two ways."""
    return linear(a, b.t())


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """total [m, n] += alpha * a [m, k] times b [k, n], in place, likewise; returns total."""
    if total.device.type == "cpu" and total.dtype == torch.float32 and faster(torch.float32):
        return total.add_(product(a, b), alpha=alpha)
    return total.addmm_(a, b, alpha=alpha)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, **options: Any
) -> Tensor:
    """F.scaled_dot_product_attention of query [..., rows, features], by the faster of the two ways."""
    dtype, rows = query.dtype, query.shape[-2]
    half = dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu" and rows >= _FEW
    if not half or torch.compiler.is_compiling() or not faster(dtype):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **options)
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    query, key, value = (each.float() for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, *others, **options).to(dtype)


_FASTER: dict[Any, Callable[..., Tensor]] = {F.linear: linear, F.scaled_dot_product_attention: attention}


class Products(TorchFunctionMode):
    """Meanwhile, F.linear is `linear` on this thread, and so is every nn.Linear; attention likewise.

    with Products():
        logits = model(ids).logits
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FASTER.get(function, function)(*args, **(kwargs or {}))
