"""Codes of 2, 3, 4 or 8 bits as a dense bit stream along the input features, lowest bits first, in int32 words.

This is the layout of compressed-tensors' `weight_packed`, and transposed that of GPTQ's `qweight`.
"""

from functools import reduce

import torch
from torch import Tensor

_PER_CHUNK = {2: 4, 3: 8, 4: 2, 8: 1}  # codes that fill whole bytes: 1 byte, or 3 bytes for 8 codes of 3 bits


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., count] -> int32 words [..., ceil(count * bits / 32)]; the tail is filled with zeros."""
    count = codes.shape[-1]
    per_chunk, padded = _PER_CHUNK[bits], words(count, bits) * 32 // bits
    padded += -padded % per_chunk
    if padded != count:
        codes = torch.nn.functional.pad(codes, (0, padded - count))
    lanes = codes.unflatten(-1, (-1, per_chunk))
    if bits == 8:
        data = codes
    elif bits == 3:
        wide = lanes.to(torch.int32)
        stream = reduce(torch.bitwise_or, (wide[..., i] << (3 * i) for i in range(8)))
        data = torch.stack([(stream >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8).flatten(-2)
    else:
        data = reduce(torch.bitwise_or, (lanes[..., i] << (bits * i) for i in range(per_chunk)))
    # flat: view(dtype) minds the strides of dimensions of size 1, which contiguous() leaves as they are
    return data[..., : words(count, bits) * 4].flatten().view(torch.int32).unflatten(0, (*codes.shape[:-1], -1))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [..., ceil(count * bits / 32)] -> uint8 codes [..., count]."""
    data = packed.flatten().view(torch.uint8).unflatten(0, (*packed.shape[:-1], -1))
    if bits == 8:
        return data[..., :count]
    if bits == 3:
        data = torch.nn.functional.pad(data, (0, -data.shape[-1] % 3)).unflatten(-1, (-1, 3)).to(torch.int32)
        stream = data[..., 0] | data[..., 1] << 8 | data[..., 2] << 16
        lanes = torch.stack([(stream >> (3 * i)) & 7 for i in range(8)], -1).to(torch.uint8)
    else:
        mask = (1 << bits) - 1
        lanes = torch.stack([(data >> (bits * i)) & mask for i in range(_PER_CHUNK[bits])], -1)
    return lanes.flatten(-2)[..., :count]
