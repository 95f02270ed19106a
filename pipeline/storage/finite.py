"""Finds NaN and infinite values in tensors of any size, a piece at a time."""

import torch
from torch import Tensor

from ..errors import NumericsError

_PIECE = 1 << 22  # values looked at together: a mask of a whole tensor would take as much memory again


def count_not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite; 0 for a tensor of integers."""
    if not tensor.is_floating_point():
        return 0
    count = 0
    for piece in tensor.flatten().split(_PIECE):
        piece = piece.to(torch.float32) if tensor.element_size() == 1 else piece  # torch has no aminmax of float8
        if piece.numel() and not torch.isfinite(torch.stack(torch.aminmax(piece))).all():
            count += int((~torch.isfinite(piece)).sum())
    return count


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a checkpoint with NaN or infinite values.

    Raises:
        NumericsError: says how many there are and where the first one is.
    """
    if count := count_not_finite(tensor):
        first = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
        raise NumericsError(
            f"{name}: {count} of {tensor.numel()} values are NaN or infinite, the first at {first}; "
            "the checkpoint is damaged: get it again"
        )


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor with values that become infinite in a narrower dtype, as float16 is.

    Raises:
        NumericsError: says how large they are, and how large they may be.
    """
    if not (tensor.is_floating_point() and dtype.is_floating_point and tensor.numel()):
        return
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max <= limit:
        return
    largest = max(-float(tensor.min()), float(tensor.max()))
    if largest > limit:
        raise NumericsError(
            f"{name}: values up to {largest:.3g}, {dtype} ends at {limit:.3g}; use dtype bfloat16 or float32"
        )
