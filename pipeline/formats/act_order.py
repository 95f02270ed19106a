"""g_idx, the group of each input feature: on disk columns lie as in the model, in a QTensor group by group.

Act-order ("desc_act") quantizes the inputs by falling importance, so that the members of a group lie scattered.
"""

import torch
from torch import Tensor

from bitpress.kernels.packing import pack, unpack, words
from bitpress.kernels.scheme import Scheme

from .base import require


def read_order(name: str, g_idx: Tensor, scheme: Scheme) -> Tensor | None:
    """The order that puts the columns group by group, int32 [in]; None where they lie so already.

    Args:
        g_idx: an untrusted tensor called `name`; one that is empty is left to QTensor.check.
    Raises:
        ValueError: it is no int32 vector, or not every group has just as many members as the scheme says.
    """
    require(g_idx.dtype == torch.int32, f"{name} has dtype {g_idx.dtype}, expected torch.int32")
    require(g_idx.dim() == 1, f"{name} has {g_idx.dim()} dimensions, expected 1")
    size = scheme.group_size or g_idx.numel()
    if not g_idx.numel() or g_idx.numel() % size:
        return None
    groups = g_idx.numel() // size
    low, high = int(g_idx.min()), int(g_idx.max())
    require(
        low >= 0 and high < groups,
        f"{name} holds group {low if low < 0 else high}, which is out of range 0..{groups - 1} for {g_idx.numel()} "
        f"inputs in groups of {size}",
    )
    members = torch.bincount(g_idx, minlength=groups)
    odd = int((members != size).to(torch.uint8).argmax())
    require(
        bool((members == size).all()),
        f"{name} gives group {odd} {int(members[odd])} members, expected {size} in every group",
    )
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return g_idx.argsort(stable=True).to(torch.int32)


def write_groups(order: Tensor | None, in_features: int, groups: int) -> Tensor:
    """The inverse of read_order: g_idx int32 [in]."""
    g_idx = torch.arange(in_features, dtype=torch.int32) // (in_features // groups)
    return g_idx if order is None else torch.empty_like(g_idx).index_copy_(0, order.long(), g_idx)


def gather_codes(codes: Tensor, order: Tensor | None, bits: int) -> Tensor:
    """Packed codes int32 [out, ceil(in * bits / 32)] in the model's order -> in `order`.

    Raises:
        ValueError: the codes are not of that shape and dtype.
    """
    if order is None:
        return codes
    width = words(order.numel(), bits)
    require(codes.dtype == torch.int32, f"codes have dtype {codes.dtype}, expected torch.int32")
    shape = list(codes.shape)
    require(len(shape) == 2 and shape[1] == width, f"codes have shape {shape}, expected {width} words a row")
    return pack(unpack(codes, bits, order.numel())[:, order], bits)


def scatter_codes(codes: Tensor, order: Tensor | None, bits: int) -> Tensor:
    """The inverse of gather_codes."""
    return codes if order is None else gather_codes(codes, order.argsort(), bits)
