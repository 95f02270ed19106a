"""What the files of a quantized checkpoint hold, from headers; and one layer of them, checked before it is used."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, listing
from ..formats import detect
from ..formats.base import Format
from ..formats.compressed_tensors import ORDER_SUFFIX, scattered
from ..storage.checkpoint import Checkpoint
from .structure import ParameterPath, TensorNames, linear_kind, skeleton


@dataclass(frozen=True)
class Layout:
    """A quantized checkpoint as its headers have it, checked against the model of its config.json.

    quantized: layer -> where its weight goes. plain: every other tensor -> where it goes, if the model has it.
    shapes: quantized layer -> [out_features, in_features], by config.json.
    """

    format: Format
    scheme: Scheme
    model: PreTrainedModel
    names: TensorNames
    quantized: dict[str, ParameterPath]
    plain: dict[str, ParameterPath]
    shapes: dict[str, tuple[int, ...] | None]


def detect_scheme(checkpoint: Checkpoint) -> tuple[Format, Scheme]:
    """What a quantized checkpoint says it is.

    Raises:
        CheckpointError: nothing that bitpress reads.
    """
    config = checkpoint.config["quantization_config"]
    try:
        format = detect(config, checkpoint.tensors)
        return format, format.scheme(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: quantization_config: {error}") from error


def read_layout(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, model: PreTrainedModel | None = None
) -> Layout:
    """What each tensor of a quantized checkpoint is, from headers alone.

    Args:
        model: on the meta device; by default it is made of config.json, in this dtype.
    Raises:
        CheckpointError: tensors that are missing, left over, or no layers of the model.
    """
    format, scheme = detect_scheme(checkpoint)
    model = skeleton(checkpoint, dtype) if model is None else model
    names = TensorNames(model)
    layers = _quantized_layers(checkpoint, format, model, names)
    owned = {f"{layer}.{suffix}" for layer in layers for suffix in format.suffixes}
    plain = {name: names.target(name) for name in checkpoint.tensors if name not in owned}
    _check_plain(checkpoint, names, plain, set(layers))
    quantized = {layer: names.target(f"{layer}.weight") for layer in layers}
    if missing := names.missing([*plain.values(), *quantized.values()]):
        raise CheckpointError(f"{checkpoint.folder}: weights of the model are missing:\n{listing(missing)}")
    for layer, target in quantized.items():
        _check_fits(model, names, target, layer, checkpoint)
    lost = [layer for layer in layers if f"{layer}.{ORDER_SUFFIX}" not in checkpoint.tensors]
    if lost and scattered(checkpoint.config["quantization_config"]):
        what = listing([f"{layer}.{ORDER_SUFFIX}" for layer in lost])
        raise CheckpointError(f"{checkpoint.folder}: actorder is 'group', and these tensors are missing:\n{what}")
    shapes = {layer: _shape(model, names, target) for layer, target in quantized.items()}
    return Layout(format, scheme, model, names, quantized, plain, shapes)


def _quantized_layers(checkpoint: Checkpoint, format: Format, model: PreTrainedModel, names: TensorNames) -> list[str]:
    """Every layer with the format's marker, and every linear layer that has lost it but not the rest."""
    telling = [f".{suffix}" for suffix in format.suffixes if suffix != "weight"]
    candidates = dict.fromkeys(
        name.removesuffix(suffix) for name in checkpoint.tensors for suffix in telling if name.endswith(suffix)
    )
    return [
        layer
        for layer in candidates
        if f"{layer}.{format.marker}" in checkpoint.tensors or _is_linear(model, names, names.target(f"{layer}.weight"))
    ]


def _check_plain(
    checkpoint: Checkpoint, names: TensorNames, plain: dict[str, ParameterPath], quantized: set[str]
) -> None:
    """Nothing that quantization left behind is taken for a weight, or left out though it would change the numbers.

    Raises:
        CheckpointError: integers where the model has floats, or an unknown tensor of a quantized layer.
    """
    faults = []
    for name, target in plain.items():
        dtype = checkpoint.tensors[name].dtype
        if names.floating(target) and not dtype.is_floating_point:
            faults.append(f"{name}: dtype {dtype}, expected floating-point numbers; its scales are missing")
        owner = next((prefix for prefix in accumulate(name.split("."), "{}.{}".format) if prefix in quantized), None)
        if owner and name != f"{owner}.bias":
            faults.append(f"{name} does not belong to a quantized layer of this format")
        elif owner and not names.known(target.parameter) and checkpoint.read(name).any():  # AutoGPTQ wrote zeros
            faults.append(f"{name}: the layer has no bias by config.json, and this one is not zero")
    if faults:
        raise CheckpointError(f"{checkpoint.folder} is not a whole quantized checkpoint:\n{listing(faults)}")


def _is_linear(model: PreTrainedModel, names: TensorNames, target: ParameterPath) -> bool:
    return names.known(target.parameter) and linear_kind(model, target) is not None


def _check_fits(
    model: PreTrainedModel, names: TensorNames, target: ParameterPath, layer: str, checkpoint: Checkpoint
) -> None:
    if not _is_linear(model, names, target):
        raise CheckpointError(f"{checkpoint.folder}: {layer} is no linear layer of the model in config.json")


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


def _shape(model: PreTrainedModel, names: TensorNames, target: ParameterPath) -> tuple[int, ...] | None:
    shape = names.shape(target)
    return shape[::-1] if shape and linear_kind(model, target) == "conv1d" else shape


def check_shape(layout: Layout, layer: str, qtensor: QTensor) -> None:
    """Raises CheckpointError unless a layer that was read is of the shape that config.json gives it."""
    expected = layout.shapes[layer]
    if expected != qtensor.shape:
        raise CheckpointError(
            f"{layer}: shape {list(qtensor.shape)} in the file, {list(expected or ())} by config.json"
        )
