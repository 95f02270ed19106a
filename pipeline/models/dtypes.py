"""The dtype of a checkpoint's weights, and the one that its model computes with."""

from collections import Counter
from collections.abc import Iterable
from math import prod

import torch

from ..formats.base import dtype_name
from ..storage.checkpoint import Checkpoint, TensorInfo


def computing_dtype(checkpoint: Checkpoint) -> str:
    """The name of the dtype that a checkpoint's model computes with: what config.json says, or that of most weights."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return str(stated or dtype_name(dtype_of_most(checkpoint.tensors.values())))


def dtype_of_most(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The floating dtype that most elements of these tensors have; float32 where there are none."""
    elements = Counter({torch.float32: 0})
    for info in tensors:
        if info.dtype.is_floating_point:
            elements[info.dtype] += prod(info.shape)
    return elements.most_common(1)[0][0]
