"""4-bit integer weights through PyTorch's own int4 operators: vectorized on x86 CPUs, tensor cores on CUDA.

Both read bfloat16 inputs and compute (code - 8) * scale + zero in float32 with bfloat16 scales and zeros, so that
a weight w = s (q - z) enters as scale = s, zero = (8 - z) s. Rounding those two to bfloat16 puts a weight at most
2^-8 (|w| + |zero|) from its value; the product, rounded too, stays within a relative RMS of 2^-8 of the exact one.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..base import Kernel, PackedWeight, Serves
from ..packing import unpack
from ..products import product
from ..qtensor import QTensor
from ..weights.integer import Integer

_OPERATOR_GROUPS = (256, 128, 64, 32)
_PADDING = 64  # output features; the CPU operator's largest block, and a multiple of CUDA's tile of 8

# The CPU operator spends 0.40 ms a row at 16.8 million weights (AVX512, one core), however many rows there are;
# dequantizing once and multiplying in bfloat16 (AMX, likewise) 16 to 17 ms up to 64 rows. They meet at 40.
_OPERATOR_ROWS = 40

# Output features dequantized at once: beyond 1024 the pieces fall out of cache, below 512 the product slows down.
_PIECE = 512


class Int4Weight(PackedWeight):
    """`codes`: the operator's own layout; `scales_and_zeros`: bfloat16 [in / group, padded out, 2]."""

    codes: Tensor
    scales_and_zeros: Tensor

    def __init__(self, qtensor: QTensor, codes: Tensor, scales_and_zeros: Tensor, block: int | None):
        super().__init__(qtensor, codes=codes, scales_and_zeros=scales_and_zeros)
        self.group, self.block = qtensor.shape[1] // scales_and_zeros.shape[0], block


class TorchInt4(Kernel):
    """int4-g<multiple of 32> and int4-channel, symmetric or not, bfloat16 inputs."""

    rank: ClassVar[int] = 30
    name: ClassVar[str] = "torch-int4"
    serves: ClassVar[tuple[Serves, ...]] = (Serves("4-bit integer weights", Integer, (4,)),)
    only_calls_library: ClassVar[bool] = True

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme, in_features = qtensor.scheme, qtensor.shape[1]
        if reason := self.unserved(scheme):
            return reason
        if dtype != torch.bfloat16:
            return f"inputs are {dtype}: the operator is fast for torch.bfloat16 only"
        if _operator_group(qtensor) is None:
            if scheme.group_size is None:
                return f"in_features {in_features} is not divisible by 32"
            return f"group_size {scheme.group_size} is not a multiple of 32"
        if device.type == "cpu":
            if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
                return "the operator is vectorized for CPUs with AVX2 or AVX512 only"
        elif device.type != "cuda" or torch.version.hip:
            return "the operator is tried on x86 CPUs and NVIDIA GPUs only"
        elif torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or higher"
        return None

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        out_features, in_features = qtensor.shape
        padding = (0, 0, 0, -out_features % _PADDING)
        codes = torch.nn.functional.pad(unpack(qtensor.codes, 4, in_features), padding)
        if codes.is_cuda:
            inner_tiles = next(tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0)
            pairs = codes[:, ::2] << 4 | codes[:, 1::2]
            operand, block = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles), None
        else:
            operand, block = _pack_cpu(codes), _packed_block()
        scales = qtensor.scales.to(torch.bfloat16)
        zeros = torch.zeros_like(scales)
        if qtensor.zeros is not None:
            zeros = ((8 - qtensor.zeros.to(torch.float32)) * scales.to(torch.float32)).to(torch.bfloat16)
        both = torch.nn.functional.pad(torch.stack([scales, zeros], -1), (0, 0, *padding))
        group = _operator_group(qtensor)
        assert group is not None
        both = both.transpose(0, 1).repeat_interleave(in_features // group // both.shape[1], 0)
        return Int4Weight(qtensor, operand, both.contiguous(), block)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(packed, Int4Weight)
        out_features, in_features = packed.shape
        rows = x.reshape(-1, in_features).contiguous()
        if len(rows) == 0:
            y = rows.new_empty(0, out_features)
        elif rows.is_cuda:
            y = torch.ops.aten._weight_int4pack_mm(rows, packed.codes, packed.group, packed.scales_and_zeros)
        elif packed.block is None or len(rows) <= _OPERATOR_ROWS:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed.codes, packed.group, packed.scales_and_zeros)
        else:
            y = _multiply_dequantized(rows, packed, packed.block)
        y = y[:, :out_features]
        y = y.contiguous() if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], out_features)


def _operator_group(qtensor: QTensor) -> int | None:
    """The operator's largest group size of which the scheme's groups are multiples: their scales are repeated."""
    size = qtensor.scheme.group_size or qtensor.shape[1]
    return next((group for group in _OPERATOR_GROUPS if size % group == 0), None)


def _pack_cpu(codes: Tensor) -> Tensor:
    """uint8 codes [out, in] -> the operator's uint8 [out, in / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


def _packed_block() -> int | None:
    """Rows per block where the CPU's packed layout is [out / block, in, block / 2], else None.

    Byte d of a block's column then holds row d in its low nibble and row d + block / 2 in its high one. The layout is
    private to PyTorch and differs between instruction sets, so it is read off a matrix that holds its row numbers.
    """
    rows = torch.arange(2 * _PADDING, dtype=torch.uint8)
    units, sixteens = (_pack_cpu(part.unsqueeze(1).expand(-1, 2)) for part in (rows & 15, rows >> 4))
    low, high = units & 15 | sixteens << 4, units >> 4 | sixteens & 240
    for block in (64, 32):
        expected = rows.view(-1, 1, 2, block // 2).expand(-1, 2, -1, -1)
        actual = torch.stack([nibbles.view(-1, 2, block // 2) for nibbles in (low, high)], 2)
        if torch.equal(actual, expected):
            return block
    return None


def _multiply_dequantized(x: Tensor, packed: Int4Weight, block: int) -> Tensor:
    """bfloat16 x [rows, in] -> [rows, padded out], the weight dequantized a piece at a time from the packed layout."""
    in_features = x.shape[1]
    scales, zeros = packed.scales_and_zeros.movedim(-1, 0).contiguous()
    # zero / scale is within 2^-4 of the integer 8 - z, so rounding undoes what bfloat16 lost.
    offsets = (8 - torch.round(zeros / scales).nan_to_num_(0)).to(torch.int8)
    y = x.new_empty(len(x), scales.shape[1])
    for start in range(0, scales.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        pairs = packed.codes[piece].view(-1, in_features, block // 2)
        codes = pairs.new_empty(in_features, len(pairs), 2, block // 2)
        for half, nibbles in enumerate((pairs & 15, pairs >> 4)):
            codes[:, :, half] = nibbles.transpose(0, 1)
        centred = codes.view(torch.int8).view(len(scales), packed.group, -1)
        centred -= offsets[:, None, piece]
        weight = centred.to(x.dtype)
        weight *= scales[:, None, piece]
        y[:, piece] = product(x, weight.view(in_features, -1))
    return y


PLUGINS = (TorchInt4(),)
