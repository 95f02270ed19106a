"""FP8 weights on NVIDIA GPUs, in Triton. Where a scheme rounds inputs to FP8 too, one program quantizes x, and another
multiplies both on FP8 tensor cores, which there are from compute capability 8.9 on. Where inputs stay as they are, a
weight becomes a 16-bit number in registers, which is exact, and the tensor cores of 8.0 multiply it.

Hopper's tensor cores add FP8 products up in fewer bits than float32 has (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
So no more than one step of the loop is left to them; the sums of steps are added in float32. Computed is y^T = W x^T,
so that few rows cost few instructions.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations.fp8 import GROUP, Fp8Group, Fp8Tensor, Fp8Token
from ..base import Kernel, PackedWeight, Serves
from ..qtensor import QTensor
from ..scheme import Scheme
from ..weights.fp8 import SQUARE, Float8, Float8Tensor
from .launch import Config, choose, row_bucket, unsupported_device
from .product import add_parts

try:
    import triton
    import triton.language as tl

    from .product import INTERPRETED, dot, row_peak, scales_of, store
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_ALIGNED = 16  # bytes of one copy: rows are filled up to them with zeros
_BLOCK = 4096  # of x, at once: 8 warps read 16 bytes a thread, twice
_FP8_PRODUCTS = (8, 9)  # the first compute capability with them

# What becomes of inputs: nothing, or codes with a scale for each row, for each 128 features of a row, or for all.
AS_IS, TOKEN, GROUPED, TENSOR = range(4)
_INPUTS = {type(None): AS_IS, Fp8Token: TOKEN, Fp8Group: GROUPED, Fp8Tensor: TENSOR}

# As for INT8, whose codes are as wide: what counts for few rows is how much of the weight is on its way. A step takes
# 128 features, or a part of them, where squares of the weight and groups of inputs have scales of their own.
FEW = (
    Config(rows=16, outs=64, depth=128, split=1, stages=5),
    Config(rows=16, outs=64, depth=128, split=4, stages=5),
    Config(rows=16, outs=64, depth=128, split=8, stages=5),
)
SOME = (
    Config(rows=64, outs=64, depth=128, split=1, stages=4),
    Config(rows=64, outs=64, depth=128, split=4, stages=4),
    Config(rows=64, outs=128, depth=128, split=1, warps=8, stages=4),  # reads x half as often
)
MANY = (
    Config(rows=128, outs=128, depth=128, warps=8, stages=3),  # 96 KiB: fits every GPU of compute capability 8
    Config(rows=128, outs=128, depth=64, warps=8, stages=4),  # two programs at once, one's end beside another's loop
)
# Inputs of 16 bits take twice the room.
MANY_AS_IS = (
    Config(rows=64, outs=128, depth=64, warps=8, stages=3),
    Config(rows=128, outs=128, depth=64, warps=8, stages=3),
)


class Fp8Weight(PackedWeight):
    """weight: float8_e4m3fn [out, in filled up to 16]. scales: float32 [out], or [ceil(out / 128), ceil(in / 128)]; of
    fp8-static, times the inputs' scale. input_scale: float32 [1] of fp8-static."""

    weight: Tensor
    scales: Tensor
    input_scale: Tensor | None

    def __init__(self, qtensor: QTensor):
        codes = F.pad(qtensor.codes.view(torch.uint8), (0, -qtensor.shape[1] % _ALIGNED)).contiguous()
        scales = qtensor.scales.to(torch.float32).contiguous()
        if qtensor.scheme.group_size is None:
            scales = scales.flatten().expand(qtensor.shape[0]).contiguous()
        input_scale = qtensor.extra.get("input_scale")
        if input_scale is not None:
            input_scale = input_scale.to(torch.float32)
            scales = scales * input_scale
        super().__init__(qtensor, weight=codes.view(torch.float8_e4m3fn), scales=scales)
        self.register_buffer("input_scale", input_scale, persistent=False)


class TritonFp8(Kernel):
    """fp8, fp8-b128 and fp8-tensor with float16 and bfloat16 inputs; those with FP8 inputs with float32 ones too.

    The latter need compute capability 8.9.
    """

    rank: ClassVar[int] = 24
    name: ClassVar[str] = "triton-fp8"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("fp8, fp8-b128", Float8),
        Serves("fp8-tensor", Float8Tensor),
        Serves("fp8-dynamic", Float8, (), Fp8Token),
        Serves("fp8-tensor-dynamic", Float8Tensor, (), Fp8Token),
        Serves("fp8-block", Float8, (), Fp8Group),
        Serves("fp8-static", Float8, (), Fp8Tensor),
        Serves("fp8-tensor-static", Float8Tensor, (), Fp8Tensor),
    )

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if dtype not in _dtypes(qtensor.scheme):
            return f"inputs are {dtype}, expected {_words(qtensor.scheme)}"
        if reason := unsupported_device(device):
            return reason
        if qtensor.scheme.activations and torch.cuda.get_device_capability(device) < _FP8_PRODUCTS:
            return "needs a GPU of compute capability {}.{} or higher, which multiplies FP8".format(*_FP8_PRODUCTS)
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        return Fp8Weight(qtensor)

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        """None where a square would lie in two weights, and where each has a scale for its inputs."""
        first = parts[0]
        assert isinstance(first, Fp8Weight)
        squares = first.scales.dim() == 2
        if first.input_scale is not None or (squares and any(part.shape[0] % SQUARE for part in parts[:-1])):
            return None
        joined = Fp8Weight.joined(parts, {"scales": 0})
        codes = torch.cat([part.get_buffer("weight").view(torch.uint8) for part in parts])
        joined.register_buffer("weight", codes.view(torch.float8_e4m3fn), persistent=False)
        joined.register_buffer("input_scale", None)
        return joined

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Fp8Weight)
        scheme = packed.scheme
        if x.dtype not in _dtypes(scheme) or x.shape[-1] != packed.shape[1]:  # the programs trust them
            expected = f"[..., {packed.shape[1]}] of {_words(scheme)}"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        inputs = _INPUTS[type(scheme.activations)]
        return torch.ops.bitpress.linear_fp8(x, packed.weight, packed.scales, packed.input_scale, inputs, bias)


def _dtypes(scheme: Scheme) -> tuple[torch.dtype, ...]:
    """What inputs may be: those that are rounded to FP8 are divided in float32 anyway."""
    return (torch.float16, torch.bfloat16, *((torch.float32,) if scheme.activations else ()))


def _words(scheme: Scheme) -> str:
    return "float16, bfloat16 or float32" if scheme.activations else "float16 or bfloat16"


def configs(rows: int, inputs: int) -> tuple[Config, ...]:
    """Those that may suit, the default first."""
    if rows <= 16:
        return FEW
    if rows <= 64:
        return SOME
    return MANY_AS_IS if inputs == AS_IS else MANY


def _linear(
    x: Tensor, weight: Tensor, scales: Tensor, input_scale: Tensor | None, inputs: int, bias: Tensor | None
) -> Tensor:
    outs = len(weight)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), outs)
    if len(flat):
        codes, row_scales = quantize(flat, inputs, input_scale)
        operands = (codes, weight.view(torch.int8) if inputs == AS_IS else weight, row_scales, scales)

        def run(config: Config) -> None:
            _launch(config, operands, bias, y)

        kind = ("as they are", "rows", "groups", "static")[inputs]
        bucket = f"{outs}x{weight.shape[1]}x{row_bucket(len(flat))}, {scales.dim()}, inputs {kind}, {x.dtype}"
        run(choose("fp8", bucket, configs(len(flat), inputs), run, x.device))
    return y.view(*x.shape[:-1], outs)


def quantize(x: Tensor, inputs: int, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What activations/fp8.py makes of x [rows, in], contiguous: float8_e4m3fn codes [rows, in filled up to 16 by
    zeros, where their scale is not NaN], and float32 scales [rows] or [rows, ceil(in / 128)]; none where all inputs
    share one. AS_IS: x itself.

    Args:
        inputs: AS_IS, TOKEN, GROUPED or TENSOR. input_scale: float32 [1] for TENSOR.
    """
    if inputs == AS_IS:
        return x, None
    rows, ins = x.shape
    width, groups = ins + -ins % _ALIGNED, -(-ins // GROUP)
    codes = x.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scales = input_scale
    if inputs != TENSOR:
        scales = x.new_empty((rows, groups) if inputs == GROUPED else (rows,), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton would launch on the current one
        if inputs == TOKEN:
            _quantize_rows[(rows,)](x, codes, scales, ins, width, BLOCK=_BLOCK, num_warps=8)
        else:
            grid = (rows, triton.cdiv(width, _BLOCK))
            constants = {"STATIC": inputs == TENSOR, "BLOCK": _BLOCK, "num_warps": 8}
            _quantize_groups[grid](x, codes, scales, ins, width, groups, **constants)
    return codes, None if inputs == TENSOR else scales


def _launch(
    config: Config, operands: tuple[Tensor, Tensor, Tensor | None, Tensor], bias: Tensor | None, y: Tensor
) -> None:
    """y [rows, out] of x or its codes [rows, pitch], weight [out, width], and the scales of each."""
    x, weight, row_scales, scales = operands
    (rows, outs), squares = y.shape, scales.dim() == 2
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(outs, config.outs)
    constants = {"ROWS": config.rows, "OUTS": config.outs, "DEPTH": config.depth, "STAGES": config.stages}
    constants |= {"SQUARES": squares, "CONVERT": weight.dtype == torch.int8, "num_warps": config.warps}
    sizes = (rows, outs, x.shape[1], weight.shape[1], triton.cdiv(weight.shape[1], SQUARE))
    with torch.cuda.device_of(y):
        if config.split == 1:
            _multiply[(tiles, 1)](x, weight, row_scales, scales, bias, y, *sizes, **constants)
            return
        parts = x.new_empty(config.split, rows, outs, dtype=torch.float32)
        if squares:
            _multiply[(tiles, config.split)](x, weight, row_scales, scales, None, parts, *sizes, **constants)
            add_parts(parts, y, bias)
        else:
            _multiply[(tiles, config.split)](x, weight, None, None, None, parts, *sizes, **constants)
            add_parts(parts, y, bias, row_scales, scales)


if triton is not None:

    @triton.jit
    def _codes(x, scale):
        """x / scale, rounded to the nearest value of E4M3; what lies beyond becomes 448, NaN stays."""
        ideal = tl.div_rn(x, scale)
        limited = tl.minimum(tl.maximum(ideal, -448.0), 448.0)
        if INTERPRETED:  # its conversion cuts off, and knows no NaN: one eighth of the power of two below is the step
            power = tl.maximum((limited.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 0.015625)
            rounded = (limited + power * 1572864.0) - power * 1572864.0  # 1.5 * 2^23 steps: no fractions are left
            codes = rounded.to(tl.float8e4nv).to(tl.int8, bitcast=True)
            return tl.where(ideal != ideal, 127, codes).to(tl.int8).to(tl.float8e4nv, bitcast=True)
        else:
            return tl.where(ideal != ideal, ideal, limited).to(tl.float8e4nv)

    @triton.jit
    def _quantize_rows(x_at, codes_at, scales_at, ins, width, BLOCK: tl.constexpr):
        """One row of x, read twice; the second time it comes from a cache."""
        row = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        most, missing = row_peak(x_at, row, ins, BLOCK)
        scale = scales_of(most, missing, 448.0)
        tl.store(scales_at + row, scale)
        for start in range(0, width, BLOCK):
            x = tl.load(x_at + row * ins + start + place, mask=start + place < ins, other=0.0).to(tl.float32)
            tl.store(codes_at + row * width + start + place, _codes(x, scale), mask=start + place < width)

    @triton.jit
    def _quantize_groups(
        x_at, codes_at, scales_at, ins, width, groups, STATIC: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Groups of 128 features of a row."""
        row = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        place = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_at + row * ins + place, mask=place < ins, other=0.0).to(tl.float32)
        if STATIC:
            codes = _codes(x, tl.load(scales_at))
        else:
            scales = scales_of(tl.max(tl.abs(x), 1), tl.max((x != x).to(tl.int32), 1), 448.0)
            tl.store(scales_at + row * groups + group, scales, mask=group < groups)
            codes = _codes(x, scales[:, None])
        tl.store(codes_at + row * width + place, codes, mask=place < width)

    @triton.jit
    def _values(weight, DTYPE: tl.constexpr):
        """Codes in int8 as DTYPE: float32 has their bits with another bias, 2^120 moves it, and 16 bits hold it all."""
        bits = weight.to(tl.int32)
        wide = ((bits & 127) << 20) | (bits & -2147483648)
        return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)

    @triton.jit(do_not_specialize=["rows"])
    def _multiply(
        x_at, weight_at, row_scales_at, scales_at, bias_at, y_at, rows, outs, pitch, width, squares,
        SQUARES: tl.constexpr, CONVERT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """ROWS of x by OUTS of the weight's, over one of several parts of the input features. Without scales, or where
        squares of the weight have their own, the part's sums."""
        down, across = tl.cdiv(outs, OUTS), tl.cdiv(rows, ROWS)
        # Eight tiles of outputs for each of rows, in turn: what these share is still in the level-2 cache.
        i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, 8)
        out, row = i.to(tl.int64) * OUTS + tl.arange(0, OUTS), j.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real, inside = out < outs, row < rows
        place = tl.arange(0, DEPTH)
        weight_at += out[:, None] * width + place[None, :]
        x_at += row[None, :] * pitch + place[:, None]
        steps = tl.cdiv(width, DEPTH)
        share = tl.cdiv(steps, tl.num_programs(1))
        first = tl.program_id(1) * share
        total = tl.zeros([OUTS, ROWS], tl.float32)
        for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
            feature = step * DEPTH
            weight = tl.load(weight_at + feature, mask=real[:, None] & (place < width - feature)[None, :], other=0.0)
            x = tl.load(x_at + feature, mask=inside[None, :] & (place < pitch - feature)[:, None], other=0.0)
            if SQUARES:
                product = dot(_values(weight, x.dtype), x) if CONVERT else tl.dot(weight, x)
                scale = tl.load(scales_at + out // 128 * squares + feature // 128, mask=real, other=0.0)[:, None]
                if row_scales_at is not None:
                    here = row_scales_at + row * squares + feature // 128
                    scale = scale * tl.load(here, mask=inside, other=0.0)[None, :]
                total += product * scale
            elif CONVERT:
                total += dot(_values(weight, x.dtype), x)
            else:
                total = tl.dot(weight, x, total, max_num_imprecise_acc=DEPTH)
        if scales_at is not None and not SQUARES:
            total *= tl.load(scales_at + out, mask=real, other=0.0)[:, None]
            if row_scales_at is not None:
                total *= tl.load(row_scales_at + row, mask=inside, other=0.0)[None, :]
        store(total, bias_at, y_at + tl.program_id(1).to(tl.int64) * rows * outs, row, out, rows, outs)


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define(
    "linear_fp8(Tensor x, Tensor weight, Tensor scales, Tensor? input_scale, int inputs, Tensor? bias) -> Tensor"
)
_ops.impl("linear_fp8", _linear, "CompositeExplicitAutograd")  # on the CPU it is Triton's interpreter that runs it


@torch.library.register_fake("bitpress::linear_fp8", lib=_ops)
def _(
    x: Tensor, weight: Tensor, scales: Tensor, input_scale: Tensor | None, inputs: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


PLUGINS = (TritonFp8(),)
