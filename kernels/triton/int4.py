"""Integer weights of 2 to 4 bits on NVIDIA GPUs, in Triton: each takes 4 bits in memory, and becomes a 16-bit number in
the registers from which the tensor cores read it.

Layout, made once at load: blocks of 128 input features, [blocks, out, 32] words of 16 bits, so that whatever outputs a
program takes lie together. Nibble j of word w is feature 32 j + w of the block: one mask and one shift of two words at
a time give two neighbours of slice j, as the tensor cores want them side by side. Beside it int32 [blocks * groups of a
block, out]: a group's scale as float32, the zero point in its lowest four bits. A scale from float16 or bfloat16 has
zeros there; one of float32 changes by at most 2^-20 of its value.

A code c becomes 128 + c (bfloat16) or 1024 + c (float16) by setting bits, which is exact, as is the zero point's
subtraction. Products are summed in float32 by group, then scaled: no weight is ever rounded. Computed is the transposed
product, W x^T, as Hopper's tensor cores read their first operand alone from registers.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Kernel, PackedWeight, Serves
from ..packing import unpack
from ..qtensor import QTensor
from ..weights.integer import Integer
from .launch import Config, choose, row_bucket, unsupported_device
from .product import add_parts, multiply_dequantized

try:
    import triton
    import triton.language as tl

    from .product import store
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

BLOCK = 128  # input features
_SLICE = 32  # of them, one nibble of a block's words
_MAGIC = {torch.float16: 0x6400, torch.bfloat16: 0x4300}  # 1024 and 128: units are the lowest bits of the mantissa

# For up to 8 rows, memory is what counts. A program has few outputs, so that there are many programs, and each of
# `split` groups of its warps takes other blocks: the sums meet in shared memory, and no second program adds them up.
DECODE = (
    Config(rows=8, outs=32, depth=128, split=4, warps=4, stages=4),
    Config(rows=8, outs=32, depth=128, split=8, warps=8, stages=3),  # as much at once with half as many programs
    Config(rows=8, outs=16, depth=128, split=8, warps=8, stages=4),  # twice the programs, where outputs are few
)

# Tiles of 16, 32 or 64 rows. The more outputs, the less often x is read; where they are few, `split`
# programs share them. 8 warps where the sums would not fit into the registers of 4.
BATCH = {
    16: (
        Config(rows=16, outs=128, depth=128, warps=4, stages=4),
        Config(rows=16, outs=64, depth=128, split=4, warps=4, stages=4),
        Config(rows=16, outs=128, depth=128, split=8, warps=4, stages=4),
    ),
    32: (
        Config(rows=32, outs=128, depth=128, warps=4, stages=4),
        Config(rows=32, outs=64, depth=128, split=4, warps=4, stages=4),
        Config(rows=32, outs=128, depth=128, split=8, warps=4, stages=4),
    ),
    64: (
        Config(rows=64, outs=128, depth=128, warps=8, stages=3),
        Config(rows=64, outs=64, depth=128, split=2, warps=4, stages=3),
        Config(rows=64, outs=128, depth=128, split=4, warps=8, stages=3),
    ),
}

# For more rows, beside those of 64: a weight is read, and converted, once for each tile of rows. Groups of less than
# 128 would take more registers than there are.
PREFILL = Config(rows=128, outs=128, depth=128, warps=8, stages=3)

# No tile: the weight is dequantized, and torch multiplies. From some hundred rows on, that takes longer than the
# dequantizing by far.
TORCH = Config(rows=0, outs=0, depth=128)

_DECODE_ROWS, _BATCH_ROWS = 8, 64  # at most
_TORCH_ROWS = 1024  # from which on torch multiplies where nothing was timed


class Int4Weight(PackedWeight):
    """`weight`: int16 [blocks, out, 32]; `scales`: int32 [blocks * groups of a block, out]."""

    weight: Tensor
    scales: Tensor


class TritonInt4(Kernel):
    """int2, int3 and int4 in groups of a multiple of 32 or per channel, symmetric or not; float16 and bfloat16."""

    rank: ClassVar[int] = 20
    name: ClassVar[str] = "triton-int4"
    serves: ClassVar[tuple[Serves, ...]] = (Serves("integer weights of 2 to 4 bits", Integer, (2, 3, 4)),)

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = qtensor.scheme
        if reason := self.unserved(scheme):
            return reason
        if dtype not in _MAGIC:
            return f"inputs are {dtype}, expected float16 or bfloat16"
        if scheme.group_size and scheme.group_size % _SLICE:
            return f"group_size {scheme.group_size} is not a multiple of {_SLICE}"
        return unsupported_device(device)

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        return Int4Weight(qtensor, weight=_pack_codes(qtensor), scales=_pack_scales(qtensor))

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        return Int4Weight.joined(parts, {"weight": 1, "scales": 1})

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Int4Weight)
        if x.shape[-1] != packed.shape[1] or x.dtype not in _MAGIC:  # the programs trust them
            expected = f"[..., {packed.shape[1]}] of float16 or bfloat16"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        return torch.ops.bitpress.linear_int4(x, packed.weight, packed.scales, bias)


def _pack_codes(qtensor: QTensor) -> Tensor:
    """int16 [blocks, out, 32]."""
    out_features, in_features = qtensor.shape
    codes = unpack(qtensor.codes, qtensor.scheme.bits, in_features)
    codes = F.pad(codes, (0, -in_features % BLOCK)).view(out_features, -1, 4, _SLICE)
    low, high = codes[:, :, 0] | codes[:, :, 1] << 4, codes[:, :, 2] | codes[:, :, 3] << 4
    words = torch.stack([low, high], -1).view(torch.int16).squeeze(-1)  # little-endian, as every GPU and its hosts
    return words.transpose(0, 1).contiguous()


def _pack_scales(qtensor: QTensor) -> Tensor:
    """int32 [blocks * groups of a block, out]; a group that reaches over several blocks is repeated in each."""
    in_features = qtensor.shape[1]
    group = qtensor.scheme.group_size or -(-in_features // BLOCK) * BLOCK
    served = math.gcd(group, BLOCK)
    bits = qtensor.scales.to(torch.float32).view(torch.int32)
    bits = (bits + 8) & ~15  # rounded, to make room for the zero point
    bits |= qtensor.scheme.middle if qtensor.zeros is None else qtensor.zeros.to(torch.int32)
    bits = bits.repeat_interleave(group // served, 1)
    blocks = -(-in_features // BLOCK)
    return F.pad(bits, (0, blocks * (BLOCK // served) - bits.shape[1])).t().contiguous()


def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, (blocks, outs, _) = len(flat), weight.shape
    if not rows:
        return x.new_empty(*x.shape[:-1], outs)
    group = BLOCK * blocks // len(scales)

    def run(config: Config) -> Tensor:
        return _product(config, flat, weight, scales, bias)

    bucket = f"{outs}x{blocks * BLOCK}, {row_bucket(rows)} rows, groups of {group}, {x.dtype}"
    y = run(choose("int4", bucket, candidates(rows, outs, group, x.device), run, x.device))
    return y.view(*x.shape[:-1], outs)


def candidates(rows: int, outs: int, group: int, device: torch.device) -> list[Config]:
    """The configurations that may suit, the default first: one with a program for each multiprocessor of the GPU.

    group: input features that share a scale, at most 128.
    """
    tiles: tuple[Config, ...] = BATCH[min(max(16, row_bucket(rows)), _BATCH_ROWS)]
    if rows <= _DECODE_ROWS:
        tiles = DECODE + tiles
    elif rows > _BATCH_ROWS and group == BLOCK:
        tiles = (PREFILL, *tiles)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

    def leaves_some_idle(config: Config) -> bool:
        programs = triton.cdiv(outs, config.outs) * triton.cdiv(rows, config.rows)
        return programs * (1 if config in DECODE else config.split) < processors

    configs = sorted(tiles, key=leaves_some_idle)
    if rows > _BATCH_ROWS:
        configs.insert(0 if rows >= _TORCH_ROWS else len(configs), TORCH)
    return configs


def _product(config: Config, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in], contiguous -> [rows, out]."""
    outs = weight.shape[1]
    if config == TORCH:
        return multiply_dequantized(x, outs, lambda first, output: dequantize(weight, scales, first, output), bias)
    y = x.new_empty(len(x), outs)
    if config.split == 1 or config in DECODE:
        _launch(config, x, weight, scales, bias, y)
    else:
        # Programs that add to one sum as they finish would give other bits each time.
        parts = x.new_empty(config.split, len(x), outs, dtype=torch.float32)
        _launch(config, x, weight, scales, None, parts)
        add_parts(parts, y, bias)
    return y


def _launch(config: Config, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y: [rows, out], or of BATCH float32 [split, rows, out] to be added up; of any floating dtype, contiguous."""
    (rows, ins), (blocks, outs, _) = x.shape, weight.shape
    tiles = (triton.cdiv(outs, config.outs), triton.cdiv(rows, config.rows))
    constants = {
        "ROWS": config.rows, "OUTS": config.outs, "GROUPS": len(scales) // blocks, "ASM": x.is_cuda,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    tensors, sizes = (x, weight, scales, bias, y), (rows, ins, outs, blocks)
    with torch.cuda.device_of(x):  # Triton would launch on the current one
        if config in DECODE:
            _decode[tiles](*tensors, *sizes, PARTS=config.split, **constants)
        else:
            _multiply[(*tiles, config.split)](*tensors, *sizes, **constants)


def dequantize(weight: Tensor, scales: Tensor, first: int, output: Tensor) -> None:
    """output [count, in], contiguous, is set to the packed weight's output features from `first` on, rounded to its
    dtype."""
    (count, ins), (blocks, outs, _) = output.shape, weight.shape
    constants = {"OUTS": 64, "GROUPS": len(scales) // blocks}
    with torch.cuda.device_of(weight):
        _dequantize[(triton.cdiv(count, 64), blocks)](weight, scales, output, ins, outs, first, count, **constants)


if triton is not None:

    def _conversion(magic: str) -> str:
        """PTX: $4, two words, to $0 .. $3, each two 16-bit numbers of one slice: nibble | magic, (a & b) | c."""
        lines = [f"lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA;"]
        for j in (1, 2, 3):
            lines += [f"shr.u32 t, $4, {4 * j};", f"lop3.b32 ${j}, t, 0x000F000F, {magic}, 0xEA;"]
        return "{ .reg .b32 t; " + " ".join(lines) + " }"

    _TO_FLOAT16 = tl.constexpr(_conversion("0x64006400"))
    _TO_BFLOAT16 = tl.constexpr(_conversion("0x43004300"))
    _REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")  # outputs are written while the input is still read

    @triton.jit
    def _unpacked(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
        """Four tensors of the words' shape, the codes of slices 0 to 3: DTYPE, and its magic number added.

        Two words at a time, which the compiler does not think of. Triton's interpreter knows no assembler and cannot
        reckon in bfloat16: for it, these are float32 and nothing is added.
        """
        if not ASM:
            codes = (
                (words & 15).to(tl.float32),
                ((words >> 4) & 15).to(tl.float32),
                ((words >> 8) & 15).to(tl.float32),
                ((words >> 12) & 15).to(tl.float32),
            )
        elif DTYPE.is_fp16():
            codes = tl.inline_asm_elementwise(
                _TO_FLOAT16, _REGISTERS, [words], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
            )
        else:
            codes = tl.inline_asm_elementwise(
                _TO_BFLOAT16, _REGISTERS, [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
            )
        return codes

    @triton.jit
    def _zero(affine, DTYPE: tl.constexpr, ASM: tl.constexpr):
        """The zero point, to be subtracted from what `_unpacked` gives."""
        if not ASM:
            zero = (affine & 15).to(tl.float32)
        elif DTYPE.is_fp16():
            zero = ((affine & 15) | 0x6400).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            zero = ((affine & 15) | 0x4300).to(tl.int16).to(DTYPE, bitcast=True)
        return zero

    @triton.jit
    def _scale(affine):
        return (affine & -16).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["rows", "blocks"])  # programs for all numbers of rows
    def _decode(
        x_at, weight_at, scales_at, bias_at, y_at, rows, ins, outs, blocks,
        ROWS: tl.constexpr, OUTS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """OUTS outputs of ROWS rows; of PARTS blocks that follow one another, each group of warps takes one."""
        out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        part, word, pitch = tl.arange(0, PARTS), tl.arange(0, 32), tl.cast(outs, tl.int64)
        feature = part[:, None] * 128 + word[None, :]
        weight_at += ((part[:, None] * pitch + out[None, :]) * 32)[:, :, None] + word[None, None, :]
        scales_at += part[:, None] * (GROUPS * pitch) + out[None, :]
        x_at += row.to(tl.int64)[None, None, :] * ins + feature[:, :, None]
        sums = tl.zeros((PARTS, OUTS, ROWS), tl.float32)
        for block in range(0, blocks, PARTS):
            inside = (block + part < blocks)[:, None] & (out < outs)[None, :]
            words = tl.load(weight_at, mask=inside[:, :, None], other=0)
            codes = _unpacked(words, x_at.dtype.element_ty, ASM)
            for group in tl.static_range(GROUPS):
                affine = tl.load(scales_at + group * pitch, mask=inside, other=0)
                zero = _zero(affine, x_at.dtype.element_ty, ASM)[:, :, None]
                product = tl.zeros((PARTS, OUTS, ROWS), tl.float32)
                for j in tl.static_range(group * (4 // GROUPS), (group + 1) * (4 // GROUPS)):
                    start = block * 128 + j * 32
                    inside_x = (start + feature < ins)[:, :, None] & (row < rows)[None, None, :]
                    x = tl.load(x_at + start, mask=inside_x, other=0.0)
                    product = tl.dot(codes[j] - zero, x if ASM else x.to(tl.float32), product)
                sums += product * _scale(affine)[:, :, None]
            weight_at += PARTS * 32 * pitch
            scales_at += PARTS * GROUPS * pitch
        store(tl.sum(sums, 0), bias_at, y_at, row.to(tl.int64), out, rows, outs)

    @triton.jit(do_not_specialize=["rows", "blocks"])  # programs for all numbers of rows
    def _multiply(
        x_at, weight_at, scales_at, bias_at, y_at, rows, ins, outs, blocks,
        ROWS: tl.constexpr, OUTS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """OUTS outputs of ROWS rows; programs of the third dimension share the blocks, each with its own y."""
        out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        word, pitch = tl.arange(0, 32), tl.cast(outs, tl.int64)
        first, step = tl.program_id(2), tl.num_programs(2)
        inside = out < outs
        weight_at += ((first * pitch + out) * 32)[:, None] + word[None, :]
        scales_at += first * (GROUPS * pitch) + out
        x_at += row.to(tl.int64)[None, :] * ins + word[:, None]
        sums = tl.zeros((OUTS, ROWS), tl.float32)
        for block in range(first, blocks, step):
            words = tl.load(weight_at, mask=inside[:, None], other=0)
            codes = _unpacked(words, x_at.dtype.element_ty, ASM)
            for group in tl.static_range(GROUPS):
                affine = tl.load(scales_at + group * pitch, mask=inside, other=0)
                zero = _zero(affine, x_at.dtype.element_ty, ASM)[:, None]
                product = tl.zeros((OUTS, ROWS), tl.float32)
                for j in tl.static_range(group * (4 // GROUPS), (group + 1) * (4 // GROUPS)):
                    start = block * 128 + j * 32
                    inside_x = (start + word < ins)[:, None] & (row < rows)[None, :]
                    x = tl.load(x_at + start, mask=inside_x, other=0.0)
                    product = tl.dot(codes[j] - zero, x if ASM else x.to(tl.float32), product)
                sums += product * _scale(affine)[:, None]
            weight_at += step * 32 * pitch
            scales_at += step * GROUPS * pitch
        y_at += first.to(tl.int64) * rows * outs
        store(sums, bias_at, y_at, row.to(tl.int64), out, rows, outs)

    @triton.jit(do_not_specialize=["first", "count"])
    def _dequantize(
        weight_at, scales_at, output_at, ins, outs, first, count, OUTS: tl.constexpr, GROUPS: tl.constexpr
    ):  # fmt: skip
        """One block of OUTS outputs of those from `first` on -> output [count, ins]."""
        place = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
        block = tl.program_id(1).to(tl.int64)
        word = tl.arange(0, 32)
        inside = place < count
        at = block * outs + first + place
        words = tl.load(weight_at + at[:, None] * 32 + word[None, :], mask=inside[:, None], other=0)
        for j in tl.static_range(4):
            group = block * GROUPS + j * GROUPS // 4
            affine = tl.load(scales_at + group * outs + first + place, mask=inside, other=0)
            codes = ((words >> (4 * j)) & 15).to(tl.float32) - (affine & 15).to(tl.float32)[:, None]
            k = block * 128 + j * 32 + word
            tl.store(
                output_at + place.to(tl.int64)[:, None] * ins + k[None, :],
                (codes * _scale(affine)[:, None]).to(output_at.dtype.element_ty),
                mask=inside[:, None] & (k < ins)[None, :],
            )


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define("linear_int4(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor")
_ops.impl("linear_int4", _linear, "CUDA")


@torch.library.register_fake("bitpress::linear_int4", lib=_ops)
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, _ = inputs
    ctx.save_for_backward(weight, scales)
    ctx.in_features = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight and the bias are constants."""
    weight, scales = ctx.saved_tensors
    whole = grad.new_empty(grad.shape[-1], ctx.in_features)
    dequantize(weight, scales, 0, whole)
    return grad @ whole, None, None, None


torch.library.register_autograd("bitpress::linear_int4", _backward, setup_context=_remember, lib=_ops)


PLUGINS = (TritonInt4(),)
