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
