"""What the files of a quantized checkpoint hold, from headers."""

from dataclasses import astuple, dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, listing
from ..formats import quantization_section, quantized_cache, read_config
from ..formats.base import CACHE_SCALES, Format
from ..storage.checkpoint import Checkpoint
from ..system.remembered import remembered
from .kv_cache import StoredCache, stored_cache
from .structure import ParameterPath, TensorNames, skeleton, tied, tied_copies, weight_kind


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint as its headers have it, checked against the model of its config.json.

    quantized: layer -> where its weight goes. schemes: layer -> its scheme. kinds: layer -> see weight_kind.
    shapes: layer -> [out_features, in_features], by config.json.
    plain: every other tensor -> where it goes, if the model has it.
    shared: layer -> the linear layers that are tied to it, such as a head to an embedding.
    cache: what keys and values are rounded to; None where they stay as they are.
    """

    format: Format
    model: PreTrainedModel
    names: TensorNames
    quantized: dict[str, ParameterPath]
    schemes: dict[str, Scheme]
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...] | None]
    plain: dict[str, ParameterPath]
    shared: dict[str, list[ParameterPath]]
    cache: StoredCache | None = None

    def tensors_of(self, checkpoint: Checkpoint, layer: str) -> list[str]:
        """The names of a quantized layer's tensors in the files."""
        names = (f"{layer}.{suffix}" for suffix in self.format.suffixes)
        return [name for name in names if name in checkpoint.tensors]


def read_quantized(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, model: PreTrainedModel | None = None
) -> QuantizedCheckpoint:
    """What each tensor of a quantized checkpoint is, from headers alone.

    Args:
        model: on the meta device; by default it is made of config.json, in this dtype.
    Raises:
        CheckpointError: tensors that are missing, left over, or no layers of the model.
    """
    format, rules = read_config(checkpoint)
    model = skeleton(checkpoint, dtype) if model is None else model
    candidates = _candidates(checkpoint, format)
    names = _names(checkpoint, format, model, candidates)
    quantized = _quantized_layers(checkpoint, format, model, names, candidates)
    owned = {f"{layer}.{suffix}" for layer in quantized for suffix in format.suffixes}
    plain = {name: names.target(name) for name in checkpoint.tensors if name not in owned}
    cache: StoredCache | None = None
    if cache_type := quantized_cache(checkpoint):
        weights = {f"{layer}.weight": target for layer, target in quantized.items()}
        cache = stored_cache(checkpoint, model, cache_type, weights | plain)
        for name in cache.tensors:
            del plain[name]
    _check_plain(checkpoint, names, plain, set(quantized))
    if missing := names.missing([*plain.values(), *quantized.values()]):
        raise CheckpointError(f"{checkpoint.folder}: weights of the model are missing:\n{listing(missing)}")
    schemes: dict[str, Scheme] = {}
    kinds: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for layer, target in quantized.items():
        kind = weight_kind(model, target) if names.known(target.parameter) else None
        if kind is None:
            raise CheckpointError(f"{checkpoint.folder}: {layer} is no linear layer of the model in config.json")
        if (scheme := rules.get(layer)) is None:
            raise CheckpointError(f"{checkpoint.folder}: {layer} is quantized, and config.json gives it no scheme")
        shape = names.shape(target)
        schemes[layer], kinds[layer] = scheme, kind
        shapes[layer] = shape[::-1] if shape and kind == "conv1d" else shape
    if lost := format.missing_tensors(quantization_section(checkpoint), quantized, checkpoint.tensors):
        raise CheckpointError(f"{checkpoint.folder}: {lost}")
    shared = _untie(checkpoint, model, quantized, plain)
    tied_copies(checkpoint, plain, model)  # refuses copies that differ
    return QuantizedCheckpoint(format, model, names, quantized, schemes, kinds, shapes, plain, shared, cache)


def _candidates(checkpoint: Checkpoint, format: Format) -> list[str]:
    """What has a tensor that a quantized layer of this format has, and others have not."""
    telling = [f".{suffix}" for suffix in format.suffixes if suffix != "weight"]
    named = (name.removesuffix(suffix) for name in checkpoint.tensors for suffix in telling if name.endswith(suffix))
    return list(dict.fromkeys(named))


def _names(checkpoint: Checkpoint, format: Format, model: PreTrainedModel, candidates: list[str]) -> TensorNames:
    """The names of a checkpoint's tensors and layers; they are worked out once, and then remembered.

    Raises:
        CheckpointError: see TensorNames.target.
    """
    names = TensorNames(model)
    parts = {f"{layer}.{suffix}" for layer in candidates for suffix in format.suffixes}
    asked = [f"{layer}.weight" for layer in candidates] + [name for name in checkpoint.tensors if name not in parts]
    key = {"config": checkpoint.config, "model": type(model).__name__, "names": asked}
    answer = remembered(
        "names", key, lambda: {name: astuple(names.target(name)) for name in asked}, keep=lambda answer: True
    )
    for name, (parameter, expert, *others) in answer.items():
        names.known_targets[name] = ParameterPath(parameter, expert and tuple(expert), *others)
    return names


def _quantized_layers(
    checkpoint: Checkpoint, format: Format, model: PreTrainedModel, names: TensorNames, candidates: list[str]
) -> dict[str, ParameterPath]:
    """Every layer with the format's marker, and every linear layer that has lost it but not the rest: its weight."""
    layers, marked = {}, set(format.layers(checkpoint.tensors))
    for layer in candidates:
        target = names.target(f"{layer}.weight")
        linear = names.known(target.parameter) and weight_kind(model, target) is not None
        if linear or layer in marked:
            layers[layer] = target
    return layers


def _check_plain(
    checkpoint: Checkpoint, names: TensorNames, plain: dict[str, ParameterPath], quantized: set[str]
) -> None:
    """Nothing that quantization left behind is taken for a weight, or left out though it would change the numbers.

    Raises:
        CheckpointError: a tensor does not fit (see TensorNames.mismatches), or an unknown one of a quantized layer.
    """
    faults = list(names.mismatches(checkpoint.tensors, plain).values())
    for name, target in plain.items():
        owner = next((prefix for prefix in accumulate(name.split("."), "{}.{}".format) if prefix in quantized), None)
        if owner and name.removeprefix(f"{owner}.") in CACHE_SCALES:
            continue
        if owner and name != f"{owner}.bias":
            faults.append(f"{name} does not belong to a quantized layer of this format")
        elif owner and not names.known(target.parameter) and checkpoint.read(name).any():  # AutoGPTQ wrote zeros
            faults.append(f"{name}: the layer has no bias by config.json, and this one is not zero")
    if faults:
        raise CheckpointError(f"{checkpoint.folder} is not a whole quantized checkpoint:\n{listing(faults)}")


def _untie(
    checkpoint: Checkpoint, model: PreTrainedModel, quantized: dict[str, ParameterPath], plain: dict[str, ParameterPath]
) -> dict[str, list[ParameterPath]]:
    """What is tied to a quantized layer, by that layer; transformers, which ties weights, ties none of it any more.

    A head that has tensors of its own keeps them, whatever config.json says.

    Raises:
        CheckpointError: something that is no linear layer is tied to a quantized one.
    """
    layers = {target.parameter: layer for layer, target in quantized.items()}
    own = layers.keys() | {target.parameter for target in plain.values()}
    shared: dict[str, list[ParameterPath]] = {}
    for parameter, origin in tied(model).items():
        if parameter in layers:
            model.all_tied_weights_keys.pop(parameter)
            model.config.tie_word_embeddings = False
        elif origin in layers:
            model.all_tied_weights_keys.pop(parameter)
            if parameter in own:
                continue
            if weight_kind(model, ParameterPath(parameter)) != "linear":
                raise CheckpointError(f"{checkpoint.folder}: {parameter} is tied to {origin}, which is quantized")
            shared.setdefault(layers[origin], []).append(ParameterPath(parameter))
    return shared
