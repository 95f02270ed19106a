"""One layer of a quantized checkpoint, checked before it is used."""

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError
from ..formats.base import Format
from ..storage.checkpoint import Checkpoint


def read_layer(checkpoint: Checkpoint, format: Format, scheme: Scheme, layer: str) -> QTensor:
    """One layer's tensors, checked before any kernel sees them.

    Raises:
        CheckpointError: names the layer, and what is wrong with its tensors.
    """
    present = [suffix for suffix in format.suffixes if f"{layer}.{suffix}" in checkpoint.tensors]
    tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in present}
    try:
        qtensor = format.read(scheme, tensors)
        qtensor.check()
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {layer}.{error.args[0]} is missing; get the checkpoint again"
        ) from error
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{checkpoint.folder}: {layer}: {error}; get the checkpoint again") from error
    return qtensor


def check_shape(layer: str, expected: tuple[int, ...] | None, qtensor: QTensor) -> None:
    """Raises CheckpointError unless a layer that was read is of the shape that config.json gives it."""
    if expected != qtensor.shape:
        raise CheckpointError(
            f"{layer}: shape {list(qtensor.shape)} in the file, {list(expected or ())} by config.json"
        )
