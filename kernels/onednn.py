"""Products of float32 matrices by oneDNN, on CPUs where torch takes a slower way.

torch gives them to MKL, which uses AVX512 on Intel's processors alone. On two cores of Zen 5, 512 rows times
[1536, 576] run at 205 billion products a second by oneDNN and at 74 by MKL, times [8192, 2048] at 208 and 86. Both come
with torch, and sum up in float32.
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


@functools.cache
def faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than torch's own choice, on this machine."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    info = Path("/proc/cpuinfo")
    return known and info.exists() and "GenuineIntel" not in info.read_text()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out] -> [..., out]: F.linear, by the faster of the two ways."""
    many = x.dim() > 0 and x.numel() >= _FEW * x.shape[-1] > 0
    kinds = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter)  # others multiply by ways of their own
    plain = kinds and weight.dim() == 2 and x.dtype == weight.dtype == torch.float32
    if not (many and plain and faster()) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        tracked: Tensor = _Tracked.apply(x, weight, bias)
        return tracked
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


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
    if total.dtype == torch.float32 and total.device.type == "cpu" and faster():
        return total.add_(product(a, b), alpha=alpha)
    return total.addmm_(a, b, alpha=alpha)


class Products(TorchFunctionMode):
    """Meanwhile, F.linear is `linear` on this thread, and so is every nn.Linear.

    with Products():
        logits = model(ids).logits
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (linear if function is F.linear else function)(*args, **(kwargs or {}))
