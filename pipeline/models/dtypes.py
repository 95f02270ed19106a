"""The dtype of a checkpoint's weights, and the one that its model computes with."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from ..formats.base import dtype_name
from ..storage.checkpoint import Checkpoint, CheckpointView
from ..storage.finite import count_not_finite
from ..storage.tensor_info import TensorInfo


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


def in_dtype(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint, read in a dtype; as it is where that is None."""
    return checkpoint if dtype is None else CastCheckpoint(checkpoint, dtype)


class CastCheckpoint(CheckpointView):
    """A checkpoint that is read in another dtype, which its config.json names too.

    Tensors that lie there in a dtype other than most, such as float32 among bfloat16, have a reason and stay so.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        super().__init__(checkpoint)
        self.dtype, most = dtype, dtype_of_most(checkpoint.tensors.values())
        self._cast = {info.name for info in checkpoint.tensors.values() if info.dtype == most != dtype}
        size = dtype.itemsize / most.itemsize
        self.tensors = {
            name: replace(info, dtype=dtype, nbytes=round(info.nbytes * size)) if name in self._cast else info
            for name, info in checkpoint.tensors.items()
        }

    @property
    def config(self) -> dict[str, Any]:
        return _computing_in(self.whole.config, self.dtype)

    def part(self, name: str) -> Tensor | None:
        return self._in_range(name, self.whole.read(name)) if name in self._cast else None

    def read_rows(self, name: str, counts: Iterable[int], first: int = 0) -> Iterator[Tensor]:
        for rows in self.whole.read_rows(name, counts, first):
            yield self._in_range(name, rows) if name in self._cast else rows

    def _in_range(self, name: str, tensor: Tensor) -> Tensor:
        """The values in the dtype. Raises NumericsError where it has none that are as large."""
        cast = tensor.to(self.dtype)
        if beyond := count_not_finite(cast) - count_not_finite(tensor):
            raise NumericsError(
                f"{name}: {beyond} of its values are beyond {torch.finfo(self.dtype).max:g}, the largest of "
                f"{dtype_name(self.dtype)}; take dtype out of the recipe, or use bfloat16"
            )
        return cast


def _computing_in(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json whose model, and the models within it, compute with a dtype."""
    own: dict[str, Any] = {
        key: _computing_in(value, dtype) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    named = [key for key in ("dtype", "torch_dtype") if key in own]
    return own | dict.fromkeys(named, dtype_name(dtype))
