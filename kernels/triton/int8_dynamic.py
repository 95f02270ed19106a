"""int8-dynamic and int8-dynamic-asym in Triton: one program quantizes a row of x, another multiplies on tensor cores.

Products are summed in int32, which is exact whatever the order, and multiplied by the row's and the output's scale at
the end: with the reference's codes of x, to the bit, the result differs from its by the rounding of that alone.
Computed is y^T = W x^T, so that few rows cost few instructions: a product's second operand may be as narrow as 8.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations.int8_token import Int8Token, Int8TokenAsymmetric
from ..base import Kernel, PackedWeight, Serves
from ..packing import unpack
from ..qtensor import QTensor
from ..weights.integer import Integer
from .launch import Config, choose, row_bucket, unsupported_device
from .product import add_parts

try:
    import triton
    import triton.language as tl

    from .product import row_peak, row_range, scales_of
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNED = 16  # bytes of one copy: rows are filled up to them with zeros
_MOST_INPUTS = 1 << 17  # of 127 * 128 each, which add up to less than 2^31
_MOST_SHIFTED = 1 << 16  # of 255 * 128: likewise, where inputs have zero points
_BLOCK = 4096  # of x, at once: 8 warps read 16 bytes a thread, twice

# A row's scales and 16384 codes are more than 64 rows or 128 outputs need at a time; what counts is how much of the
# weight is on its way: 4 stages of 16 KiB in each program. Where outputs are few, `split` programs share them.
FEW = (
    Config(rows=16, outs=64, depth=256, split=1, stages=4),
    Config(rows=16, outs=64, depth=256, split=4, stages=4),
    Config(rows=16, outs=64, depth=256, split=8, stages=4),
)
SOME = (
    Config(rows=64, outs=64, depth=128, split=1, stages=4),
    Config(rows=64, outs=64, depth=128, split=4, stages=4),
    Config(rows=64, outs=128, depth=128, split=1, stages=4),  # reads x half as often
)
WIDE = Config(rows=128, outs=256, depth=64, warps=8, stages=4)  # reads a quarter less for each product
MANY = (
    Config(rows=128, outs=128, depth=128, warps=8, stages=3),  # 96 KiB: fits every GPU of compute capability 8
    WIDE,
    Config(rows=128, outs=128, depth=64, warps=4, stages=4),  # two programs at once, one's end beside another's loop
    # No tile: torch multiplies, and the sums go through memory to be scaled. From some thousand rows on, that takes
    # little beside the product.
    Config(rows=0, outs=0, depth=_ALIGNED),
)


class Int8Weight(PackedWeight):
    """weight: int8 [out, in filled up to 16]. scales: float32 [out]. sums: int32 [out], of each output's weight, which
    zero points of inputs multiply; where these have none, there is no such buffer."""

    weight: Tensor
    scales: Tensor


class TritonInt8(Kernel):
    """int8-dynamic, int8-dynamic-asym; float16, bfloat16 and float32 inputs."""

    rank: ClassVar[int] = 21
    name: ClassVar[str] = "triton-int8"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("int8-dynamic", Integer, (8,), Int8Token),
        Serves("int8-dynamic-asym", Integer, (8,), Int8TokenAsymmetric),
    )

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if dtype not in _DTYPES:
            return f"inputs are {dtype}, expected float16, bfloat16 or float32"
        most = _MOST_SHIFTED if qtensor.scheme.shifts_inputs else _MOST_INPUTS
        if qtensor.shape[1] > most:
            return f"in_features {qtensor.shape[1]} is more than {most}: sums of products could exceed int32"
        return unsupported_device(device)

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        ins = qtensor.shape[1]
        weight = (unpack(qtensor.codes, 8, ins) ^ 128).view(torch.int8)  # code - 128 in two's complement
        weight = F.pad(weight, (0, -ins % _ALIGNED)).contiguous()
        tensors = {"weight": weight, "scales": qtensor.scales.flatten().to(torch.float32)}
        if qtensor.scheme.shifts_inputs:
            tensors["sums"] = weight.sum(1, dtype=torch.int32)
        return Int8Weight(qtensor, **tensors)

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        return Int8Weight.joined(parts, dict.fromkeys((name for name, _ in parts[0].named_buffers()), 0))

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Int8Weight)
        if x.dtype not in _DTYPES or x.shape[-1] != packed.shape[1]:  # the kernels trust them
            expected = f"[..., {packed.shape[1]}] of float16, bfloat16 or float32"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        return torch.ops.bitpress.linear_int8(x, packed.weight, packed.scales, getattr(packed, "sums", None), bias)


def configs(rows: int, outs: int, zero_points: bool) -> tuple[Config, ...]:
    """Those that may suit, the default first. zero_points: whether inputs have some, for which WIDE lacks registers."""
    if rows <= 16:
        return FEW
    if rows <= 64:
        return SOME
    some = tuple(config for config in MANY if config != WIDE or not zero_points)
    return some if outs % 8 == 0 else some[:-1]  # torch's product on CUDA wants multiples of 8


def _linear(x: Tensor, weight: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None) -> Tensor:
    outs = len(weight)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), outs)
    if len(flat):
        zero_points = sums is not None
        codes, row_scales, zeros = quantize(flat, symmetric=not zero_points)
        operands = _Operands(codes, weight, row_scales, scales, zeros, sums)

        def run(config: Config) -> None:
            _launch(config, operands, bias, y)

        bucket = f"{outs}x{weight.shape[1]}x{row_bucket(len(flat))}, {x.dtype}{', zero points' if zero_points else ''}"
        run(choose("int8", bucket, configs(len(flat), outs, zero_points), run, x.device))
    return y.view(*x.shape[:-1], outs)


class _Operands(NamedTuple):
    """codes: int8 [rows, width]. weight: int8 [out, width]. row_scales: float32 [rows]. scales: float32 [out]. Where
    inputs have zero points: zeros, int32 [rows], and sums, int32 [out], of the weight."""

    codes: Tensor
    weight: Tensor
    row_scales: Tensor
    scales: Tensor
    zeros: Tensor | None
    sums: Tensor | None


def quantize(x: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """What activations/int8_token.py makes of x [rows, in], contiguous: int8 codes [rows, in filled up to 16], float32
    scales [rows], int32 zero points [rows] or None; the codes of a row that is not finite are 0, its scale is not
    finite either. What rows are filled up with meets zeros of the weight."""
    rows, ins = x.shape
    width = ins + -ins % _ALIGNED
    codes = x.new_empty(rows, width, dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    zeros = None if symmetric else x.new_empty(rows, dtype=torch.int32)
    with torch.cuda.device_of(x):  # Triton would launch on the current one
        _quantize[(rows,)](x, codes, scales, zeros, ins, width, BLOCK=_BLOCK, num_warps=8)
    return codes, scales, zeros


def _launch(config: Config, operands: _Operands, bias: Tensor | None, y: Tensor) -> None:
    """y [rows, out]."""
    codes, weight, row_scales, scales, zeros, sums = operands
    (rows, outs), width = y.shape, codes.shape[1]
    tiles = -(-rows // max(config.rows, 1)) * -(-outs // max(config.outs, 1))
    constants = {"ROWS": config.rows, "OUTS": config.outs, "DEPTH": config.depth, "STAGES": config.stages}
    constants["num_warps"] = config.warps
    with torch.cuda.device_of(y):
        if not config.rows:
            product = torch._int_mm(codes, weight.t())
            if zeros is not None and sums is not None:
                product -= zeros.unsqueeze(1) * sums
            add_parts(product.unsqueeze(0), y, bias, row_scales, scales)
        elif config.split == 1:
            scaling = (row_scales, scales, zeros, sums, bias)
            _multiply[(tiles, 1)](codes, weight, *scaling, y, rows, outs, width, **constants)
        else:
            parts = codes.new_empty(config.split, rows, outs, dtype=torch.int32)
            unscaled = (None, None, zeros, sums, None)
            _multiply[(tiles, config.split)](codes, weight, *unscaled, parts, rows, outs, width, **constants)
            add_parts(parts, y, bias, row_scales, scales)


if triton is not None:

    @triton.jit
    def _quantize(x_at, codes_at, scales_at, zeros_at, ins, width, BLOCK: tl.constexpr):
        """One row of x, read twice; the second time it comes from a cache. Without zeros_at it is symmetric."""
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        if zeros_at is None:
            most, missing = row_peak(x_at, row, ins, BLOCK)
            scale = scales_of(most, missing, 127.0)
        else:
            low, high, missing = row_range(x_at, row, ins, BLOCK)
            scale = scales_of(high - low, missing, 255.0)
        tl.store(scales_at + row, scale)
        finite = tl.abs(scale) < float("inf")
        zero = 0.0
        if zeros_at is not None:
            least = tl.div_rn(tl.where(finite, low, 0.0), tl.where(finite, scale, 1.0))
            zero = tl.where(finite, (-128.0 - least + 12582912.0) - 12582912.0, 0.0)
            tl.store(zeros_at + row, zero.to(tl.int32))
        for start in range(0, width, BLOCK):
            x = tl.load(x_at + row * ins + start + place, mask=start + place < ins, other=0.0).to(tl.float32)
            # Adding 1.5 * 2^23 leaves float32 no fraction: it rounds half to even, in Triton's interpreter too.
            code = (tl.div_rn(tl.where(finite, x, 0.0), tl.where(finite, scale, 1.0)) + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(code + zero, -128.0), 127.0)
            tl.store(codes_at + row * width + start + place, code.to(tl.int8), mask=start + place < width)

    @triton.jit(do_not_specialize=["rows"])
    def _multiply(
        codes_at, weight_at, row_scales_at, scales_at, zeros_at, sums_at, bias_at, y_at, rows, outs, width,
        ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """ROWS of x by OUTS of the weight's, over one of several parts of the input features; without scales, the
        part's int32 sums."""
        down, across = tl.cdiv(outs, OUTS), tl.cdiv(rows, ROWS)
        # Eight tiles of outputs for each of rows, in turn: what these share is still in the level-2 cache.
        i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, 8)
        out, row = i.to(tl.int64) * OUTS + tl.arange(0, OUTS), j.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real, inside = out < outs, row < rows
        place = tl.arange(0, DEPTH)
        weight_at += out[:, None] * width + place[None, :]
        codes_at += row[None, :] * width + place[:, None]
        steps = tl.cdiv(width, DEPTH)
        share = tl.cdiv(steps, tl.num_programs(1))
        first = tl.program_id(1) * share
        total = tl.zeros([OUTS, ROWS], tl.int32)
        if sums_at is not None:  # the first part begins with what zero points add to the whole
            zeros = tl.load(zeros_at + row, mask=inside & (tl.program_id(1) == 0), other=0)
            total -= tl.load(sums_at + out, mask=real, other=0)[:, None] * zeros[None, :]
        for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
            left = width - step * DEPTH
            weight = tl.load(weight_at + step * DEPTH, mask=real[:, None] & (place < left)[None, :], other=0)
            x = tl.load(codes_at + step * DEPTH, mask=inside[None, :] & (place < left)[:, None], other=0)
            total = tl.dot(weight, x, total, out_dtype=tl.int32)
        y_at += tl.program_id(1).to(tl.int64) * rows * outs + row[None, :] * outs + out[:, None]
        if scales_at is None:
            tl.store(y_at, total, mask=real[:, None] & inside[None, :])
        else:
            scaled = total.to(tl.float32) * tl.load(row_scales_at + row, mask=inside, other=0.0)[None, :]
            scaled *= tl.load(scales_at + out, mask=real, other=0.0)[:, None]
            if bias_at is not None:
                scaled += tl.load(bias_at + out, mask=real, other=0.0).to(tl.float32)[:, None]
            tl.store(y_at, scaled, mask=real[:, None] & inside[None, :])


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define("linear_int8(Tensor x, Tensor weight, Tensor scales, Tensor? sums, Tensor? bias) -> Tensor")
_ops.impl("linear_int8", _linear, "CompositeExplicitAutograd")  # on the CPU it is Triton's interpreter that runs it


@torch.library.register_fake("bitpress::linear_int8", lib=_ops)
def _(x: Tensor, weight: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


PLUGINS = (TritonInt8(),)
