"""What the files of an unquantized checkpoint hold, from headers; checked as quantizing checks them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..storage.checkpoint import Checkpoint
from .structure import ParameterPath, TensorNames, skeleton, tied_copies


@dataclass(frozen=True)
class DenseCheckpoint:
    """An unquantized checkpoint as its headers have it, checked against the model of its config.json.

    model: its parameters on the meta device. plain: tensor -> where it goes, if the model has it; without the tensors
    that repeat a weight they are tied to.
    """

    model: PreTrainedModel
    names: TensorNames
    plain: dict[str, ParameterPath]


def read_dense(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> DenseCheckpoint:
    """Where each tensor of an unquantized checkpoint goes, from headers alone (tied copies excepted, see tied_copies).

    Args:
        dtype: of the model; by default the config's.
    Raises:
        CheckpointError: all tensors that are missing, of another shape or of another kind of numbers.
    """
    model = skeleton(checkpoint, dtype)
    names = TensorNames(model)
    plain = {name: names.target(name) for name in checkpoint.tensors}
    faults = [*names.mismatches(checkpoint.tensors, plain).values(), *names.missing(plain.values())]
    if faults:
        raise names.does_not_match(checkpoint, plain, faults)
    for copy in tied_copies(checkpoint, plain, model):
        del plain[copy]
    return DenseCheckpoint(model, names, plain)
