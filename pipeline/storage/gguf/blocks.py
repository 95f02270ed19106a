"""The blocks of ggml's types that hold plain integers, one scale to a block, or E2M1 values: written and read exactly.

Layouts: ggml-common.h and dequantize_row_* in ggml-quants.c of llama.cpp.
"""

import torch
from torch import Tensor

# of Q3_K: sixteen scales of 33, 6 bits each, which stand for 33 - 32 = 1
_ONES_Q3_K = [0x11] * 8 + [0xAA] * 4
_E2M1_RUNS = {"MXFP4": (32, 1), "NVFP4": (16, 4)}  # values of a scale, scales of a block
_LARGEST = {"Q4_0": 7, "Q5_0": 15, "Q8_0": 127, "Q3_K": 3}  # value; the smallest is one further from 0


def encode(kind: str, values: Tensor, scales: Tensor) -> Tensor:
    """Blocks of a type, uint8 [rows, blocks, bytes]: each stands for its values times its scale.

    Args:
        values: int8 [rows, blocks, values of a block]. scales: float16 [rows, blocks].
    """
    least, most = (int(limit) for limit in values.aminmax())
    assert -_LARGEST[kind] - 1 <= least <= most <= _LARGEST[kind]
    scale = scales.unsqueeze(-1).contiguous().view(torch.uint8)
    if kind == "Q8_0":
        return torch.cat([scale, values.contiguous().view(torch.uint8)], -1)
    codes = (values + (_LARGEST[kind] + 1)).view(torch.uint8)
    if kind == "Q3_K":
        runs = codes.unflatten(-1, (2, 4, 32))  # halves, shifts, bytes
        low = _bits([(runs[..., shift, :] & 3) << 2 * shift for shift in range(4)]).flatten(-2)
        high = _bits([(codes.unflatten(-1, (8, 32))[..., bit, :] >> 2) << bit for bit in range(8)])
        ones = torch.tensor(_ONES_Q3_K, dtype=torch.uint8).expand(*scale.shape[:-1], -1)
        return torch.cat([high, low, ones, scale], -1)
    nibbles = _bits([codes[..., :16] & 15, (codes[..., 16:] & 15) << 4])
    if kind == "Q4_0":
        return torch.cat([scale, nibbles], -1)
    fifth = _bits([(codes.unflatten(-1, (4, 8))[..., bit] >> 4) << bit for bit in range(8)])
    return torch.cat([scale, fifth, nibbles], -1)


def decode(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of encode: (values, scales).

    Raises:
        ValueError: Q3_K whose scales are not all alike.
    """
    if kind == "Q3_K":
        high, low, ones, scale = blocks.split([32, 64, 12, 2], -1)
        if not torch.equal(ones, torch.tensor(_ONES_Q3_K, dtype=torch.uint8).expand_as(ones)):
            raise ValueError("the scales of its Q3_K blocks differ within a block, as bitpress never writes them")
        lows = torch.stack([low.unflatten(-1, (2, 32)) >> 2 * shift & 3 for shift in range(4)], -2).flatten(-3)
        highs = torch.stack([high >> bit & 1 for bit in range(8)], -2).flatten(-2)
        codes = lows | highs << 2
    else:
        scale, rest = blocks[..., :2], blocks[..., 2:]
        if kind == "Q8_0":
            return rest.contiguous().view(torch.int8), _float16(scale)
        nibbles = rest[..., -16:]
        codes = torch.cat([nibbles & 15, nibbles >> 4], -1)
        if kind == "Q5_0":
            codes = codes | torch.stack([rest[..., :4] >> bit & 1 for bit in range(8)], -1).flatten(-2) << 4
    return codes.view(torch.int8) - (_LARGEST[kind] + 1), _float16(scale)


def encode_with_minimum(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Blocks of Q4_1, uint8 [rows, blocks, 20]: codes times a scale, plus a minimum, which float16 rounds.

    Args:
        codes: uint8 [rows, blocks, 32], 0..15. scales: float16 [rows, blocks]. zeros: uint8 [rows, blocks], the codes
            that stand for 0.
    Raises:
        ValueError: a minimum that float16 cannot hold.
    """
    least = minimum(scales, zeros)
    if bad := int((~least.isfinite()).sum()):
        raise ValueError(f"{bad} minima are too large for float16, in which Q4_1 has them")
    halves = torch.stack([scales, least], -1).view(torch.uint8)
    return torch.cat([halves, _bits([codes[..., :16], codes[..., 16:] << 4])], -1)


def decode_with_minimum(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of encode_with_minimum: (codes, scales, zeros).

    Raises:
        ValueError: a minimum that is not that of a zero point.
    """
    scales, least = _float16(blocks[..., :2]), _float16(blocks[..., 2:4])
    zeros = (-least.float() / scales.float()).round().nan_to_num(-1).clamp(-1, 16)
    if strange := int(((minimum(scales, zeros) != least) | (zeros < 0) | (zeros > 15)).sum()):
        raise ValueError(
            f"{strange} minima of its Q4_1 blocks are those of no zero point, as bitpress never writes them"
        )
    nibbles = blocks[..., 4:]
    return torch.cat([nibbles & 15, nibbles >> 4], -1), scales, zeros.to(torch.uint8)


def minimum(scales: Tensor, zeros: Tensor) -> Tensor:
    """The float16 minima of groups with these scales and zero points."""
    return (-scales.float() * zeros.float()).to(torch.float16)


def encode_e2m1(kind: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Blocks of MXFP4 or NVFP4, uint8 [rows, blocks, bytes], with these codes and these scales.

    Args:
        codes: uint8 [rows, in / 2], E2M1, two to a byte, the even input in the low half. scales: uint8 [rows, groups].
    """
    run, count = _E2M1_RUNS[kind]
    each = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).unflatten(-1, (-1, count, 2, run // 2))
    nibbles = each[..., 0, :] | each[..., 1, :] << 4
    return torch.cat([scales.unflatten(-1, (-1, count)), nibbles.flatten(-2)], -1)


def decode_e2m1(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of encode_e2m1: (codes, scales)."""
    run, count = _E2M1_RUNS[kind]
    nibbles = blocks[..., count:].unflatten(-1, (count, run // 2))
    codes = torch.cat([nibbles & 15, nibbles >> 4], -1).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, blocks[..., :count].flatten(1)


def _bits(parts: list[Tensor]) -> Tensor:
    """The parts' bits in one tensor of bytes."""
    whole = parts[0].clone()
    for part in parts[1:]:
        whole |= part
    return whole


def _float16(scale: Tensor) -> Tensor:
    return scale.contiguous().view(torch.float16).squeeze(-1)
