"""NF4 on NVIDIA GPUs, in Triton: the codes stay packed until they are in the registers that tensor cores read.

Repacked, a row has steps of 256 input features, of 32 int32 words each: nibble 2 t + p of word w holds the code of
feature 64 t + 2 w + p of its step. So tile t of a step is one block of NF4, whose scale multiplies the float32 sum of
its 64 products, and two neighbours p share a register, as tensor cores want them. Weights are their first operand,
which may lie in registers, and x is the second: y^T = W x^T.

The code book is looked up by byte permutations. One PRMT finds four bytes, each any of eight; the upper and the lower
bytes of both halves of the code book make four of them for four weights, two selections by the codes' highest bits and
two more PRMT bring them into order. No memory is read, so there are no bank conflicts, and 2.6 instructions for each
weight keep up with the memory of an H200 to within a factor of two. Sixteen comparisons would take 15.

Rounded to the dtype of x, the code book would err by up to 2^-9 of its values. It is multiplied by a number first, the
inverse of which is in the scales, that makes its rounded values the closest in mean square.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Kernel, PackedWeight, Serves
from ..qtensor import QTensor
from ..weights.nf4 import NF4, NF4_BLOCK, NF4_CODEBOOK, NestedScales, block_scales, nested_scales
from .launch import Config, choose, row_bucket, unsupported_device
from .product import add_parts, multiply_dequantized

try:
    import triton
    import triton.language as tl

    from .product import INTERPRETED, dot, halves, store
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_TILES = 4  # codes of a word, and blocks of a step
_STEP = _TILES * NF4_BLOCK
_ZERO = NF4_CODEBOOK.index(0.0)
_GAIN = {torch.bfloat16: 0.7185025, torch.float16: 0.838845}

_Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # codes, scales, absmax, levels

# For up to 8 rows memory is what counts, and `split` groups of a program's warps take turns at the steps: many
# programs, and no second one to add up. A step has 128 bytes of each row, so that 16 rows are read no worse than more.
FEW = (
    Config(rows=8, outs=16, depth=_STEP, split=8, warps=8, stages=3),
    Config(rows=8, outs=16, depth=_STEP, split=4, warps=4, stages=4),  # smaller programs, of which more run at once
)

_UNPACKED = 32  # rows of the weight that a program dequantizes a step of

TORCH = Config(rows=0, outs=0, depth=_STEP)  # no tile: the weight is dequantized, and torch multiplies
_TORCH_ROWS = 257  # from which on that is the default: each 64 rows cost the fused product the look-ups again


class NF4Weight(PackedWeight):
    """codes: int32 [out, words]. scales: float32 [steps * 4, out], or with double quantization int32 [steps, out],
    four codes each, levels: float32 [257], code book and offset, and absmax: float32 [ceil(in * out / 64 / 256)]."""

    codes: Tensor
    scales: Tensor
    absmax: Tensor | None
    levels: Tensor | None

    def __init__(self, qtensor: QTensor, dtype: torch.dtype, scales: Tensor, nested: NestedScales | None):
        super().__init__(qtensor, codes=_words(qtensor), scales=scales)
        self.dtype = dtype
        self.register_buffer("absmax", None if nested is None else nested.absmax, persistent=False)
        self.register_buffer("levels", None if nested is None else _levels(nested, dtype), persistent=False)


class TritonNF4(Kernel):
    """nf4 and nf4-dq with in_features divisible by 64; float16 and bfloat16 inputs.

    The double quantization of a row that is no multiple of 256 is undone at load.
    """

    rank: ClassVar[int] = 23
    name: ClassVar[str] = "triton-nf4"
    serves: ClassVar[tuple[Serves, ...]] = (Serves("nf4 and nf4-dq", NF4),)

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := self.unserved(qtensor.scheme):
            return reason
        if dtype not in _GAIN:
            return f"inputs are {dtype}, expected float16 or bfloat16"
        if qtensor.shape[1] % NF4_BLOCK:
            return f"in_features {qtensor.shape[1]} is not divisible by {NF4_BLOCK}: blocks would run across rows"
        return unsupported_device(device)

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        outs, ins = qtensor.shape
        tensors = dict(qtensor.tensors())
        nested = nested_scales(tensors) if ins % _STEP == 0 else None
        if nested is None:
            scales = F.pad(block_scales(tensors).view(outs, -1), (0, -(ins // NF4_BLOCK) % _TILES)) / _GAIN[dtype]
        else:
            scales = qtensor.scales.view(outs, -1, _TILES).contiguous().view(torch.int32).view(outs, -1)
        return NF4Weight(qtensor, dtype, scales.t().contiguous(), nested)

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        """None with double quantization, as each weight has a code book of its own for its scales."""
        if any(part.levels is not None for part in parts):
            return None
        first, joined = parts[0], NF4Weight.joined(parts, {"codes": 0, "scales": 1})
        assert isinstance(first, NF4Weight)
        joined.dtype = first.dtype
        joined.register_buffer("absmax", None)
        joined.register_buffer("levels", None)
        return joined

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, NF4Weight)
        if x.dtype != packed.dtype or x.shape[-1] != packed.shape[1]:  # the kernels trust them
            expected = f"[..., {packed.shape[1]}] of {packed.dtype}"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        return torch.ops.bitpress.linear_nf4(x, packed.codes, packed.scales, packed.absmax, packed.levels, bias)


def _words(qtensor: QTensor) -> Tensor:
    """int32 [out, words]; rows are filled up to whole steps by codes that stand for 0."""
    nibbles = torch.stack([qtensor.codes >> 4, qtensor.codes & 15], -1).view(qtensor.shape)
    padded = F.pad(nibbles, (0, -qtensor.shape[1] % _STEP), value=_ZERO)
    pairs = padded.view(len(padded), -1, _TILES, NF4_BLOCK // 2, 2)
    octets = (pairs[..., 0] | pairs[..., 1] << 4).transpose(2, 3).contiguous()
    return octets.view(torch.int32).view(len(padded), -1)


def _levels(nested: NestedScales, dtype: torch.dtype) -> Tensor:
    return torch.cat([nested.codebook, nested.offset.view(1)]) / _GAIN[dtype]


def _codebook(dtype: torch.dtype) -> tuple[int, ...]:
    """The 16-bit patterns of the code book times its gain."""
    values = (torch.tensor(NF4_CODEBOOK) * _GAIN[dtype]).to(dtype)
    return tuple(pattern & 0xFFFF for pattern in values.view(torch.int16).tolist())


def _assembly(dtype: torch.dtype, half: int) -> str:
    """PTX: $2, a word, to the patterns of its two codes in tile 2 * half, $0, and in tile 2 * half + 1, $1."""

    def table(first: int, shift: int) -> str:
        four = _codebook(dtype)[first : first + 4]
        return hex(sum((pattern >> shift & 255) << 8 * place for place, pattern in enumerate(four)))

    low, high = ([table(first, shift) for first in (0, 4, 8, 12)] for shift in (0, 8))
    align, signs = ("mov.b32 small, $2;", "0xd9c8") if half == 0 else ("shr.b32 small, $2, 16;", "0xfbea")
    # Selectors are nibbles. Their highest bit, a code's own, would copy a byte's highest one: so it is 0 in those that
    # find the code, and what the others find is not selected. The same way it fills a byte of `signs`.
    return f"""{{
        .reg .b32 small, large, signs, lower, upper, other;
        {align}
        xor.b32 large, small, 0x8888;
        shl.b32 other, $2, 4;
        prmt.b32 signs, other, $2, {signs};
        prmt.b32 lower, {low[0]}, {low[1]}, small;
        prmt.b32 other, {low[2]}, {low[3]}, large;
        lop3.b32 lower, signs, other, lower, 0xca;
        prmt.b32 upper, {high[0]}, {high[1]}, small;
        prmt.b32 other, {high[2]}, {high[3]}, large;
        lop3.b32 upper, signs, other, upper, 0xca;
        prmt.b32 $0, lower, upper, 0x5140;
        prmt.b32 $1, lower, upper, 0x7362;
    }}"""


def decoder(dtype: torch.dtype) -> dict[str, Any]:
    """The constants by which a program decodes: PTX, and what Triton's interpreter, which knows none, does instead."""
    book = _codebook(dtype) if INTERPRETED else None
    return {"FIRST": _assembly(dtype, 0), "SECOND": _assembly(dtype, 1), "BOOK": book}


def configs(rows: int) -> list[Config]:
    """Those that may suit, the default first.

    64 outputs are what four warps of Hopper's multiply by at once. 64 rows take eight warps: sums, products of one
    block and weights of so many would not fit into the registers of four. Either two warps look up the same weights, or
    there are 128 outputs and no register is left. Where outputs are few, `split` programs share them.
    """
    tile = min(max(8, row_bucket(rows)), 64)
    warps, stages = {8: (4, 4), 16: (4, 4), 32: (4, 3), 64: (8, 2)}[tile]
    shared = [Config(tile, 64, _STEP, split, warps, stages) for split in (1, 4, 8)]
    if tile == 8:
        return [*FEW, *shared]
    if tile == 64:
        shared.append(Config(64, 128, _STEP, warps=8, stages=3))
    if rows <= 64:
        return shared
    return [TORCH, *shared] if rows >= _TORCH_ROWS else [*shared, TORCH]


def _linear(
    x: Tensor, codes: Tensor, scales: Tensor, absmax: Tensor | None, levels: Tensor | None, bias: Tensor | None
) -> Tensor:
    outs, ins = len(codes), x.shape[-1]
    rows = x.reshape(-1, ins).contiguous()
    weight = (codes, scales, absmax, levels)
    y = _multiply(rows, weight, bias) if len(rows) else x.new_empty(0, outs)
    return y.view(*x.shape[:-1], outs)


def _multiply(x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    """x [rows, in] -> [rows, out]."""
    (rows, ins), outs = x.shape, len(weight[0])

    def run(config: Config) -> Tensor:
        if config == TORCH:
            return multiply_dequantized(x, outs, lambda first, piece: _dequantize(first, piece, weight), bias)
        with torch.cuda.device_of(x):  # Triton would launch on the current one
            return _launch(config, x, weight, bias)

    kind = "nf4" if weight[3] is None else "nf4-dq"
    bucket = f"{outs}x{ins}x{row_bucket(rows)}, {x.dtype}"
    return run(choose(kind, bucket, configs(rows), run, x.device))


def _launch(config: Config, x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    """The fused product."""
    (rows, ins), outs = x.shape, len(weight[0])
    y = x.new_empty(rows, outs)
    tiles, sizes = (triton.cdiv(rows, config.rows), triton.cdiv(outs, config.outs)), (rows, outs, ins)
    constants = decoder(x.dtype) | {"ROWS": config.rows, "OUTS": config.outs, "STAGES": config.stages}
    constants["num_warps"] = config.warps
    if config in FEW:
        _few[tiles](x, *weight, bias, y, *sizes, PARTS=config.split, **constants)
    elif config.split == 1:
        _many[tiles](x, *weight, bias, y, *sizes, **constants)
    else:
        parts = x.new_empty(config.split, rows, outs, dtype=torch.float32)
        _many[(*tiles, config.split)](x, *weight, None, parts, *sizes, **constants)
        add_parts(parts, y, bias)
    return y


def _dequantize(first: int, piece: Tensor, weight: _Weight) -> None:
    """Writes the rows of the weight from `first` on into `piece`."""
    some, ins = piece.shape
    grid = (triton.cdiv(ins, _STEP), triton.cdiv(some, _UNPACKED))
    with torch.cuda.device_of(piece):
        _unpack[grid](*weight, piece, first, some, len(weight[0]), ins, **decoder(piece.dtype), OUTS=_UNPACKED)


if triton is not None:

    @triton.jit
    def _patterns(words, TILE: tl.constexpr, BOOK: tl.constexpr):
        """int32, two 16-bit patterns of a tile of each word."""
        lower, upper = (words >> 8 * TILE) & 15, (words >> (8 * TILE + 4)) & 15
        patterns = tl.zeros(words.shape, tl.int32)
        for code in tl.static_range(16):
            patterns |= tl.where(lower == code, BOOK[code], 0) | (tl.where(upper == code, BOOK[code], 0) << 16)
        return patterns

    @triton.jit
    def _look_up(words, HALF: tl.constexpr, PTX: tl.constexpr, BOOK: tl.constexpr):
        """The patterns of tiles 2 * HALF and 2 * HALF + 1."""
        if INTERPRETED:
            return _patterns(words, 2 * HALF, BOOK), _patterns(words, 2 * HALF + 1, BOOK)
        else:
            return tl.inline_asm_elementwise(PTX, "=&r,=&r,r", [words], (tl.int32, tl.int32), is_pure=True, pack=1)

    @triton.jit
    def _nested(scales_at, absmax_at, levels_at, step, out, steps, real):
        """The four codes of double-quantized scales, and what the scales of this step are multiplied by."""
        if levels_at is None:
            return 0, 0.0
        else:
            coded = tl.load(scales_at, mask=real, other=0)
            return coded, tl.load(absmax_at + (out * steps + step) // 64, mask=real, other=0.0)

    @triton.jit
    def _scale(scales_at, levels_at, coded, spread, tile, outs, real):
        """float32 scales of a tile."""
        if levels_at is None:
            return tl.load(scales_at + tile * outs, mask=real, other=0.0)
        else:
            return tl.load(levels_at + ((coded >> 8 * tile) & 255)) * spread + tl.load(levels_at + 256)

    @triton.jit
    def _add_step(
        total, words, x_at, inside, left, scales_at, levels_at, coded, spread, real, outs,
        FIRST: tl.constexpr, SECOND: tl.constexpr, BOOK: tl.constexpr,
    ):  # fmt: skip
        """total + x @ weight of one step, `left` features before the last; scales_at: those of its first tile."""
        for tile in tl.static_range(4):
            if tile % 2 == 0:
                patterns = _look_up(words, tile // 2, FIRST if tile == 0 else SECOND, BOOK)
            x = tl.load(x_at + tile * 64, mask=inside & (tile * 64 < left), other=0.0)
            scale = _scale(scales_at, levels_at, coded, spread, tile, outs, real)
            total += dot(halves(patterns[tile % 2], x.dtype), x) * tl.expand_dims(scale, -1)
        return total

    @triton.jit(do_not_specialize=["rows"])
    def _few(
        x_at, codes_at, scales_at, absmax_at, levels_at, bias_at, y_at, rows, outs, ins,
        FIRST: tl.constexpr, SECOND: tl.constexpr, BOOK: tl.constexpr,
        ROWS: tl.constexpr, OUTS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """ROWS of x by OUTS of the weight's; groups of warps take turns at the steps, and add up at the end."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        out = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
        word, place = tl.arange(0, 32), tl.arange(0, 64)
        steps = tl.cdiv(ins, 256)
        total = tl.zeros([PARTS, OUTS, ROWS], tl.float32)
        for turn in tl.range(tl.cdiv(steps, PARTS), num_stages=STAGES):
            step = (turn * PARTS + tl.arange(0, PARTS)).to(tl.int64)[:, None]
            real = (step < steps) & (out < outs)[None, :]
            at = codes_at + (out[None, :] * steps + step)[:, :, None] * 32 + word[None, None, :]
            words = tl.load(at, mask=real[:, :, None], other=0)
            here = scales_at + (step * 4 if levels_at is None else step) * outs + out[None, :]
            coded, spread = _nested(here, absmax_at, levels_at, step, out[None, :], steps, real)
            feature = step[:, :, None] * 256 + place[None, :, None]
            inside, left = (row < rows)[None, None, :], (ins - step * 256)[:, :, None]
            total = _add_step(
                total, words, x_at + row[None, None, :] * ins + feature, inside, left,
                here, levels_at, coded, spread, real, outs, FIRST, SECOND, BOOK,
            )  # fmt: skip
        store(tl.sum(total, 0), bias_at, y_at, row, out, rows, outs)

    @triton.jit(do_not_specialize=["rows"])
    def _many(
        x_at, codes_at, scales_at, absmax_at, levels_at, bias_at, y_at, rows, outs, ins,
        FIRST: tl.constexpr, SECOND: tl.constexpr, BOOK: tl.constexpr,
        ROWS: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """ROWS of x by OUTS of the weight's, over one of several parts of the steps."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        out = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
        word, place = tl.arange(0, 32), tl.arange(0, 64)
        inside, real = (row < rows)[None, :], out < outs
        steps = tl.cdiv(ins, 256)
        x_at += row[None, :] * ins + place[:, None]
        codes_at += out[:, None] * (steps * 32) + word[None, :]
        total = tl.zeros([OUTS, ROWS], tl.float32)
        share = tl.cdiv(steps, tl.num_programs(2))
        first = tl.program_id(2) * share
        for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
            words = tl.load(codes_at + step * 32, mask=real[:, None], other=0)
            here = scales_at + tl.cast(step * (4 if levels_at is None else 1), tl.int64) * outs + out
            coded, spread = _nested(here, absmax_at, levels_at, step, out, steps, real)
            total = _add_step(
                total, words, x_at + step * 256, inside, ins - step * 256,
                here, levels_at, coded, spread, real, outs, FIRST, SECOND, BOOK,
            )  # fmt: skip
        store(total, bias_at, y_at + tl.program_id(2).to(tl.int64) * rows * outs, row, out, rows, outs)

    @triton.jit(do_not_specialize=["first"])
    def _unpack(
        codes_at, scales_at, absmax_at, levels_at, weight_at, first, some, outs, ins,
        FIRST: tl.constexpr, SECOND: tl.constexpr, BOOK: tl.constexpr, OUTS: tl.constexpr,
    ):  # fmt: skip
        """One step of OUTS of the weight's rows `first` and after, to weight [some, ins]."""
        step = tl.program_id(0)
        here = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
        out, real = first + here, here < some
        word, place = tl.arange(0, 32), tl.arange(0, 64)
        steps = tl.cdiv(ins, 256)
        words = tl.load(codes_at + (out * steps + step)[:, None] * 32 + word[None, :], mask=real[:, None], other=0)
        scales_at += tl.cast(step * (4 if levels_at is None else 1), tl.int64) * outs + out
        coded, spread = _nested(scales_at, absmax_at, levels_at, step, out, steps, real)
        weight_at += here[:, None] * ins + step * 256 + place[None, :]
        for tile in tl.static_range(4):
            if tile % 2 == 0:
                patterns = _look_up(words, tile // 2, FIRST if tile == 0 else SECOND, BOOK)
            scale = _scale(scales_at, levels_at, coded, spread, tile, outs, real)
            weight = halves(patterns[tile % 2], weight_at.dtype.element_ty).to(tl.float32) * scale[:, None]
            tl.store(weight_at + tile * 64, weight, mask=real[:, None] & (step * 256 + tile * 64 < ins))


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define("linear_nf4(Tensor x, Tensor codes, Tensor scales, Tensor? absmax, Tensor? levels, Tensor? bias) -> Tensor")
_ops.impl("linear_nf4", _linear, "CompositeExplicitAutograd")  # on the CPU it is Triton's interpreter that runs it


@torch.library.register_fake("bitpress::linear_nf4", lib=_ops)
def _(
    x: Tensor, codes: Tensor, scales: Tensor, absmax: Tensor | None, levels: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


PLUGINS = (TritonNF4(),)
