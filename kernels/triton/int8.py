"""INT8 weights on NVIDIA GPUs, in Triton, x left as it is: codes become 16-bit numbers in tensor cores' registers.

Repacked, a row has steps of 128 input features, of 32 int32 words each: bytes 0 and 2 of word w are features 2 w and
2 w + 1 of its step, bytes 1 and 3 features 64 + 2 w and 65 + 2 w. So one mask gives two neighbours of a tile of 64 in
the halves of a register, as tensor cores want them. Setting bits makes 1024 + c (float16) of a code c, or 128 plus its
lower seven bits (bfloat16); the rest is a subtraction without rounding. Products are summed in float32, by group, and
then scaled: no weight is ever rounded. Computed is y^T = W x^T, as only a first operand may lie in registers.
"""

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

    from .product import INTERPRETED, dot, halves, store
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_TILE = 64
_STEP = 2 * _TILE
_MIDDLE = 128  # which the programs take off a code
_UNPACKED = 32  # rows of the weight that a program dequantizes a step of
TORCH = Config(rows=0, outs=0, depth=_STEP)  # no tile: the weight is dequantized, and torch multiplies
_TORCH_ROWS = 257  # from which on that is the default: each 64 rows cost the fused product the conversion again

_Weight = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, zeros

_CONVERSION = {
    torch.float16: """{
        .reg .b32 t, less;
        mov.b32 less, 0x64806480;
        shr.b32 t, $2, 8;
        lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xea;
        lop3.b32 $1, t, 0x00ff00ff, 0x64006400, 0xea;
        sub.rn.f16x2 $0, $0, less;
        sub.rn.f16x2 $1, $1, less;
    }""",
    # Less 128 for codes from 128 on, less 256 for others. There is a subtraction from capability 9.0 on only.
    torch.bfloat16: """{
        .reg .b32 t, one, less, lesser;
        mov.b32 one, 0x3f803f80;
        shr.b32 t, $2, 8;
        lop3.b32 less, $2, 0x00800080, 0xc300c300, 0xae;
        lop3.b32 lesser, t, 0x00800080, 0xc300c300, 0xae;
        lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 $1, t, 0x007f007f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, $0, one, less;
        fma.rn.bf16x2 $1, $1, one, lesser;
    }""",
}


class Int8Weight(PackedWeight):
    """codes: int32 [out, words]. scales: float32 [groups, out]. zeros: [groups, out] of dtype, zero points less 128."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, qtensor: QTensor, dtype: torch.dtype):
        super().__init__(qtensor, codes=_words(qtensor), scales=qtensor.scales.to(torch.float32).t().contiguous())
        self.dtype, zeros = dtype, None
        if qtensor.zeros is not None:
            zeros = (qtensor.zeros.to(torch.float32) - _MIDDLE).to(dtype).t().contiguous()
        self.register_buffer("zeros", zeros, persistent=False)


class TritonInt8Weights(Kernel):
    """int8-channel, and int8 in groups of a multiple of 64, symmetric or not; float16 and bfloat16 inputs."""

    rank: ClassVar[int] = 22
    name: ClassVar[str] = "triton-int8-weights"
    serves: ClassVar[tuple[Serves, ...]] = (
        Serves("8-bit integer weights with inputs that stay as they are", Integer, (8,)),
    )

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = qtensor.scheme
        if reason := self.unserved(scheme):
            return reason
        if dtype not in _CONVERSION:
            return f"inputs are {dtype}, expected float16 or bfloat16"
        if scheme.group_size and scheme.group_size % _TILE:
            return f"group_size {scheme.group_size} is not a multiple of {_TILE}"
        return unsupported_device(device)

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        return Int8Weight(qtensor, dtype)

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        first = parts[0]
        assert isinstance(first, Int8Weight)
        asymmetric = first.zeros is not None
        joined = Int8Weight.joined(parts, {"codes": 0, "scales": 1, **({"zeros": 1} if asymmetric else {})})
        joined.dtype = first.dtype
        if not asymmetric:
            joined.register_buffer("zeros", None)
        return joined

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Int8Weight)
        if x.dtype != packed.dtype or x.shape[-1] != packed.shape[1]:  # the kernels trust them
            expected = f"[..., {packed.shape[1]}] of {packed.dtype}"
            raise ValueError(f"inputs are {list(x.shape)} of {x.dtype}, expected {expected}")
        return torch.ops.bitpress.linear_int8_weights(x, packed.codes, packed.scales, packed.zeros, bias)


def _words(qtensor: QTensor) -> Tensor:
    """int32 [out, words]; rows are filled up to whole steps by codes that stand for 0 if the zero point does not."""
    codes = unpack(qtensor.codes, 8, qtensor.shape[1])
    codes = F.pad(codes, (0, -qtensor.shape[1] % _STEP), value=_MIDDLE)
    pairs = codes.view(len(codes), -1, 2, _TILE // 2, 2)
    return pairs.permute(0, 1, 3, 4, 2).flatten(-2).view(torch.int32).view(len(codes), -1)


def configs(rows: int) -> list[Config]:
    """Those that may suit, the default first: 64 outputs are what four warps of Hopper's multiply
    by at once, and 64 rows take the registers of eight. Where outputs are few, `split` programs share them."""
    tile = min(max(8, row_bucket(rows)), 64)
    outs, warps, stages = {8: (64, 4, 4), 16: (64, 4, 4), 32: (64, 4, 3), 64: (128, 8, 3)}[tile]
    fused = [Config(tile, outs, _STEP, split, warps, stages) for split in (1, 4, 8)]
    if rows <= 64:
        return fused
    return [TORCH, *fused] if rows >= _TORCH_ROWS else [*fused, TORCH]


def _linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    outs, ins = len(codes), x.shape[-1]
    rows = x.reshape(-1, ins).contiguous()
    weight = (codes, scales, zeros)
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

    bucket = f"{outs}x{ins}x{row_bucket(rows)}, {len(weight[1])} groups, {x.dtype}"
    return run(choose("int8-weights", bucket, configs(rows), run, x.device))


def _launch(config: Config, x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    """The fused product."""
    (rows, ins), outs = x.shape, len(weight[0])
    y = x.new_empty(rows, outs)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(outs, config.outs), config.split)
    constants = constants_of(x.dtype, ins, len(weight[1]))
    constants |= {"ROWS": config.rows, "OUTS": config.outs, "STAGES": config.stages, "num_warps": config.warps}
    parts = y if config.split == 1 else x.new_empty(config.split, rows, outs, dtype=torch.float32)
    added = bias if config.split == 1 else None
    _product[grid](x, *weight, added, parts, rows, outs, ins, **constants)
    if config.split > 1:
        add_parts(parts, y, bias)
    return y


def _dequantize(first: int, piece: Tensor, weight: _Weight) -> None:
    """Writes the rows of the weight from `first` on into `piece`."""
    some, ins = piece.shape
    grid = (triton.cdiv(ins, _STEP), triton.cdiv(some, _UNPACKED))
    constants = constants_of(piece.dtype, ins, len(weight[1]))
    with torch.cuda.device_of(piece):
        _unpack[grid](*weight, piece, first, some, len(weight[0]), ins, **constants, OUTS=_UNPACKED)


def constants_of(dtype: torch.dtype, ins: int, groups: int) -> dict[str, Any]:
    """PTX for x of this dtype; how many of a row's weights share a scale, None if all do."""
    return {"PTX": _CONVERSION[dtype], "GROUP": ins // groups if groups > 1 else None}


if triton is not None:

    @triton.jit
    def _values(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
        """Codes less 128 of both tiles of a step, [OUTS, 64] each."""
        if INTERPRETED:
            lower = tl.join((words & 255) - 128, ((words >> 16) & 255) - 128)
            upper = tl.join(((words >> 8) & 255) - 128, ((words >> 24) & 255) - 128)
            shape: tl.constexpr = (words.shape[0], 2 * words.shape[1])
            return tl.reshape(lower.to(tl.float32).to(DTYPE), shape), tl.reshape(upper.to(tl.float32).to(DTYPE), shape)
        else:
            halved = tl.inline_asm_elementwise(PTX, "=&r,=&r,r", [words], (tl.int32, tl.int32), is_pure=True, pack=1)
            return halves(halved[0], DTYPE), halves(halved[1], DTYPE)

    @triton.jit
    def _centred(values, zeros_at, place, real):
        """Codes less their zero points, which is exact."""
        if zeros_at is None:
            return values
        else:
            zeros = tl.load(zeros_at + place, mask=real, other=0.0)[:, None]
            if INTERPRETED:  # it would take bfloat16's bits for integers
                return (values.to(tl.float32) - zeros.to(tl.float32)).to(values.dtype)
            else:
                return values - zeros

    @triton.jit(do_not_specialize=["rows"])
    def _product(
        x_at, codes_at, scales_at, zeros_at, bias_at, y_at, rows, outs, ins,
        PTX: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """ROWS of x by OUTS of the weight's, over one of several parts of the steps."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        out = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
        word, place = tl.arange(0, 32), tl.arange(0, 64)
        inside, real = (row < rows)[None, :], out < outs
        steps = tl.cdiv(ins, 128)
        x_at += row[None, :] * ins + place[:, None]
        codes_at += out[:, None] * (steps * 32) + word[None, :]
        total = tl.zeros([OUTS, ROWS], tl.float32)
        share = tl.cdiv(steps, tl.num_programs(2))
        first = tl.program_id(2) * share
        for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
            words = tl.load(codes_at + step * 32, mask=real[:, None], other=0)
            values = _values(words, x_at.dtype.element_ty, PTX)
            for tile in tl.static_range(2):
                feature = step * 128 + tile * 64
                x = tl.load(x_at + feature, mask=inside & (place < ins - feature)[:, None], other=0.0)
                here = out
                if GROUP is not None:
                    here += tl.cast(tl.minimum(feature, ins - 1) // GROUP, tl.int64) * outs
                product = dot(_centred(values[tile], zeros_at, here, real), x)
                if GROUP is not None:
                    product *= tl.load(scales_at + here, mask=real, other=0.0)[:, None]
                total += product
        if GROUP is None:
            total *= tl.load(scales_at + out, mask=real, other=0.0)[:, None]
        store(total, bias_at, y_at + tl.program_id(2).to(tl.int64) * rows * outs, row, out, rows, outs)

    @triton.jit(do_not_specialize=["first"])
    def _unpack(
        codes_at, scales_at, zeros_at, weight_at, first, some, outs, ins,
        PTX: tl.constexpr, GROUP: tl.constexpr, OUTS: tl.constexpr,
    ):  # fmt: skip
        """One step of OUTS of the weight's rows `first` and after, to weight [some, ins]."""
        step = tl.program_id(0)
        here = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
        out, real = first + here, here < some
        word, place = tl.arange(0, 32), tl.arange(0, 64)
        at = codes_at + (out * tl.cdiv(ins, 128) + step)[:, None] * 32 + word[None, :]
        values = _values(tl.load(at, mask=real[:, None], other=0), weight_at.dtype.element_ty, PTX)
        for tile in tl.static_range(2):
            feature = step * 128 + tile * 64
            scaled_by = out
            if GROUP is not None:
                scaled_by += tl.cast(tl.minimum(feature, ins - 1) // GROUP, tl.int64) * outs
            weight = _centred(values[tile], zeros_at, scaled_by, real).to(tl.float32)
            weight *= tl.load(scales_at + scaled_by, mask=real, other=0.0)[:, None]
            to = weight_at + here[:, None] * ins + feature + place[None, :]
            tl.store(to, weight, mask=real[:, None] & (place < ins - feature)[None, :])


_ops = torch.library.Library("bitpress", "FRAGMENT")
_ops.define("linear_int8_weights(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor")
_ops.impl("linear_int8_weights", _linear, "CompositeExplicitAutograd")  # on the CPU by Triton's interpreter


@torch.library.register_fake("bitpress::linear_int8_weights", lib=_ops)
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


PLUGINS = (TritonInt8Weights(),)
