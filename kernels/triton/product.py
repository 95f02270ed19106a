"""What Triton products with packed weights share: inputs' scales, the dot, the end, sums of parts, very many rows."""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_COLUMNS = 1024  # of a row that one program adds up: 4 warps read 16 bytes a thread, twice
_PIECE = 1 << 26  # weights dequantized at once: 128 MiB, so that what a product takes beside its weight stays small


def add_parts(
    parts: Tensor, y: Tensor, bias: Tensor | None, row_scales: Tensor | None = None, out_scales: Tensor | None = None
) -> None:
    """y = sum of parts * row_scales * out_scales + bias, in a fixed order and float32 (int32 while all parts are).

    Args:
        parts: float32 or int32 [split, rows, outs], contiguous.
        y: floating [rows, outs], contiguous; is written.
        bias: floating [outs]. row_scales: float32 [rows]. out_scales: float32 [outs].
    """
    split, rows, outs = parts.shape
    grid = (rows, triton.cdiv(outs, _COLUMNS))
    with torch.cuda.device_of(parts):  # Triton would launch on the current one
        _add_parts[grid](parts, y, bias, row_scales, out_scales, rows, outs, SPLIT=split, COLUMNS=_COLUMNS)


def multiply_dequantized(
    x: Tensor, outs: int, dequantize: Callable[[int, Tensor], None], bias: Tensor | None
) -> Tensor:
    """x [rows, in] -> [rows, outs] by torch's own product. With very many rows nothing is faster: the weight is written
    and read once, and each of its elements is dequantized once.

    Args:
        dequantize: dequantize(first, weight) writes the rows of the weight from `first` on into `weight` [some, in].
    """
    ins = x.shape[1]
    step = max(1, _PIECE // ins)
    pieces = []
    for first in range(0, outs, step):
        weight = x.new_empty(min(step, outs - first), ins)
        dequantize(first, weight)
        added = None if bias is None else bias[first : first + step].to(x.dtype)
        pieces.append(torch.nn.functional.linear(x, weight, added))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


if triton is not None:
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # on the CPU: no PTX, no bfloat16 products

    @triton.jit
    def dot(a, b):
        """float32 a @ b of two 16-bit tensors; the interpreter would take bfloat16's bits for integers."""
        if INTERPRETED:
            return tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            return tl.dot(a, b)

    @triton.jit
    def halves(patterns, DTYPE: tl.constexpr):
        """int32 [..., K] -> DTYPE [..., 2 K], the lower halves before the upper ones."""
        lower = (patterns & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        upper = (patterns >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        if len(patterns.shape) == 2:
            return tl.reshape(tl.join(lower, upper), (patterns.shape[0], 2 * patterns.shape[1]))
        else:
            return tl.reshape(tl.join(lower, upper), (patterns.shape[0], patterns.shape[1], 2 * patterns.shape[2]))

    @triton.jit
    def row_peak(x_at, row, ins, BLOCK: tl.constexpr):
        """The largest magnitude in a row of x, float32; and 1 where it holds NaN, which a maximum misses, else 0."""
        place = tl.arange(0, BLOCK)
        most, missing = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, ins, BLOCK):
            x = tl.load(x_at + row * ins + start + place, mask=start + place < ins, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(x))
            missing |= (x != x).to(tl.int32)
        return tl.max(most, 0), tl.max(missing, 0)

    @triton.jit
    def row_range(x_at, row, ins, BLOCK: tl.constexpr):
        """The least and the largest number in a row of x and 0, float32; and 1 where it holds NaN, else 0."""
        place = tl.arange(0, BLOCK)
        low, high, missing = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, ins, BLOCK):
            x = tl.load(x_at + row * ins + start + place, mask=start + place < ins, other=0.0).to(tl.float32)
            low, high = tl.minimum(low, x), tl.maximum(high, x)
            missing |= (x != x).to(tl.int32)
        return tl.min(low, 0), tl.max(high, 0), tl.max(missing, 0)

    @triton.jit
    def scales_of(most, missing, LARGEST: tl.constexpr):
        """Scales by which these magnitudes become LARGEST: 1 where they are nearly 0, NaN where an input was NaN."""
        scales = tl.div_rn(most, LARGEST)
        scales = tl.where(scales < 1.1754943508222875e-38, 1.0, scales)  # float32's least normal number
        return tl.where(missing > 0, float("nan"), scales)

    @triton.jit
    def store(total, bias_at, y_at, row, out, rows, outs):
        """float32 total [OUTS, ROWS], with the bias if any, is stored in y [rows, outs] at these int64 places."""
        if bias_at is not None:
            total += tl.load(bias_at + out, mask=out < outs, other=0.0).to(tl.float32)[:, None]
        y_at += row[None, :] * outs + out[:, None]
        tl.store(y_at, total, mask=(out < outs)[:, None] & (row < rows)[None, :])

    @triton.jit(do_not_specialize=["rows"])
    def _add_parts(
        parts_at, y_at, bias_at, row_scales_at, out_scales_at, rows, outs, SPLIT: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        out = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = out < outs
        total = tl.load(parts_at + row * outs + out, mask=inside, other=0)
        for part in tl.static_range(1, SPLIT):
            total += tl.load(parts_at + (part * rows + row) * outs + out, mask=inside, other=0)
        total = total.to(tl.float32)
        if row_scales_at is not None:
            total *= tl.load(row_scales_at + row)
        if out_scales_at is not None:
            total *= tl.load(out_scales_at + out, mask=inside, other=0.0)
        if bias_at is not None:
            total += tl.load(bias_at + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at + row * outs + out, total, mask=inside)
