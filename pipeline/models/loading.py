"""Files -> a transformers model: quantized layers on our kernels, everything else as transformers has it."""

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitpress.kernels.linear import QLinear

from ..config.schema import Calibrate
from ..data.calibration import Calibration, calibrate
from ..errors import ConfigError
from ..formats import open_quantized, quantization_section
from ..hub.download import resolve
from ..storage.artifacts import require_tokenizer
from ..storage.checkpoint import Checkpoint
from ..storage.finite import check_finite, check_range
from ..storage.packed_file import place_to_write
from ..system.collector import no_collection
from ..system.device import pick_device
from ..system.progress import OnStep
from ..system.threads import one_ahead
from .dense import read_dense
from .kv_cache import round_cache
from .modules import assembled_tensors, experts_of, quantized_layers, replace_layers, set_tensor
from .optimize import Trials, optimize_for_decoding
from .packed import Coming, PackedWeights, Packing, open_packed, packed_name, selections, write
from .pretrained import generation_config, load_tokenizer
from .quantized import QuantizedCheckpoint, read_quantized
from .structure import ParameterPath, TensorNames, skeleton
from .transformers import attach

CPU = torch.device("cpu")
_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    on_step: OnStep = lambda done, total: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a folder that bitpress wrote, an unquantized one, or a Hub id.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        dtype: of activations and unquantized weights: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        kernel: "auto", or the name of one kernel (see `bitpress list`), which then serves or raises.
        on_step: called with (quantized layers done, layers in all).
    Raises:
        BitpressError: says what is wrong with the files, the options or the Hub.
    """
    folder = resolve(str(model), revision).folder
    checkpoint = open_quantized(folder)
    require_tokenizer(folder)
    for remark in checkpoint.remarks:
        _log.warning(remark)
    chosen = pick_device(device)
    with no_collection():
        coming = Coming(folder) if chosen.type == "cpu" else None
    loaded = load_model(checkpoint, chosen, dtype, kernel, on_step, coming)
    with no_collection():
        tokenizer = load_tokenizer(folder)  # while the last of the packed weights come from the disk
    if coming:
        coming.wait()
    return loaded, tokenizer


def calibrate_on(checkpoint: Checkpoint, settings: Calibrate) -> Calibration:
    """The windows of text that a checkpoint's model is calibrated on, by its own tokenizer; see calibrate.

    Raises:
        BitpressError: the text or the tokenizer cannot be used, or the text is too short.
    """
    return calibrate(settings, load_tokenizer(checkpoint.folder), skeleton(checkpoint).config)


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: str,
    kernel: str = "auto",
    on_step: OnStep = lambda done, total: None,
    coming: Coming | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint, quantized or not.

    Args:
        on_step: called with (quantized layers done, layers in all).
        coming: packed weights to be used, which are all in memory once it was waited for; what measures or verifies the
            checkpoint reads its own files.
    """
    wanted = _dtype(dtype)
    checkpoint.fetch()
    if quantization_section(checkpoint) is not None:
        return _load_quantized(checkpoint, device, wanted, kernel, on_step, coming)
    return load_dense(checkpoint, device, wanted)


def _dtype(name: str) -> torch.dtype | None:
    """None for "auto"."""
    if name != "auto" and name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; use auto or one of {', '.join(_DTYPES)}")
    return _DTYPES.get(name)


def load_dense(checkpoint: Checkpoint, device: torch.device = CPU, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """An unquantized checkpoint, by the weights of its own files alone: transformers builds the model and opens none.

    Raises:
        CheckpointError: weights that are missing or do not fit config.json. NumericsError: NaN or infinite weights.
    """
    contents = read_dense(checkpoint, dtype)
    _fill(checkpoint, contents.model, contents.names, contents.plain, device)
    return _finish(checkpoint, contents.model, device)


def _load_quantized(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    kernel: str,
    on_step: OnStep,
    coming: Coming | None,
) -> PreTrainedModel:
    with no_collection():  # of what is small; weights that are read and packed would be kept too long
        contents = read_quantized(checkpoint, dtype)
        weights = open_packed(coming, checkpoint, contents, kernel) if coming else None
        if weights:
            return _build(checkpoint, contents, device, kernel, on_step, weights)[0]
    return _build(checkpoint, contents, device, kernel, on_step, None)[0]


def _build(
    checkpoint: Checkpoint,
    contents: QuantizedCheckpoint,
    device: torch.device,
    kernel: str,
    on_step: OnStep,
    packed: PackedWeights | None,
) -> tuple[PreTrainedModel, list[str], Trials]:
    """The model; its parameters and buffers that came from the files as they are; what trials of its parts showed."""
    scheme = contents.format.cache_scheme(quantization_section(checkpoint))
    if scheme and contents.cache is None:
        _log.warning(
            "its config quantizes the key-value cache in a way that bitpress has not: it is left as it is: %s", scheme
        )
    model, experts = contents.model, experts_of(contents)
    if packed:
        packed.fill(model)
        filled = list(packed.plain)
    else:
        plain = {name: target for name, target in contents.plain.items() if target.parameter not in experts}
        filled = _fill(checkpoint, model, contents.names, plain, device)
    restored = packed.layers if packed else {}
    layers = quantized_layers(checkpoint, contents, lambda target: device, kernel, on_step, restored)
    replace_layers(model, contents.names, layers)
    model = _finish(checkpoint, model, device)
    if contents.cache:
        round_cache(model, checkpoint, contents.cache)
    trials = Trials(packed.trials if packed else {})
    optimize_for_decoding(model, trials)
    attach(model, checkpoint, contents)
    return model, filled, trials


def optimize(
    model: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    user_cache: bool = False,
    on_step: OnStep = lambda done, total: None,
) -> Packing:
    """Write a checkpoint's packed weights beside it, which `load` then maps on CPUs; see packed.

    Args:
        dtype: as for `load`, which uses them for that dtype alone.
        user_cache: write them into this user's cache, for a folder that cannot be written to.
        on_step: called with (quantized layers done, layers in all).
    Raises:
        ConfigError: it is not quantized, or no kernel here keeps packed weights, or the folder cannot be written to.
        BitpressError: as `load` and write_packed raise it.
    """
    folder = resolve(str(model), revision).folder
    checkpoint = open_quantized(folder)
    if quantization_section(checkpoint) is None:
        raise ConfigError(f"{folder} is not quantized: there is nothing to pack; give a quantized checkpoint")
    checkpoint.fetch()
    contents = read_quantized(checkpoint, _dtype(dtype))
    name = packed_name(contents, "auto")
    if name is None:
        kernels = sorted({selection.kernel.name for selection in selections(contents, "auto").values()})
        raise ConfigError(f"{folder}: its layers run on {', '.join(kernels)} here, which keep no packed weights")
    path = place_to_write(folder, user_cache) / name
    built, filled, trials = _build(checkpoint, contents, CPU, "auto", on_step, None)
    return write(path, checkpoint, contents, built, filled, trials.outcomes)


def _fill(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    names: TensorNames,
    plain: dict[str, ParameterPath],
    device: torch.device,
) -> list[str]:
    """Put the tensors that are not quantized into the skeleton; those that the model does not have are left out.

    Returns:
        The parameters and buffers that were filled.
    Raises:
        NumericsError: NaN or infinite values, or values beyond the range of the model's dtype.
    """
    known = {name: target for name, target in plain.items() if names.known(target.parameter)}
    filled: list[str] = []
    parts: dict[str, Tensor] = {}  # of parameters that are made of several tensors
    for (name, target), tensor in zip(known.items(), one_ahead(checkpoint.read, known)):
        check_finite(name, tensor)
        check_range(name, tensor, names.dtype(target))
        if target.expert or target.converter is not None:
            parts[name] = tensor
        else:
            set_tensor(model, target, tensor, device)
            filled.append(target.parameter)
    places = {name: known[name] for name in parts}
    for target, tensor in assembled_tensors(names, places, parts.pop):
        set_tensor(model, target, tensor, device)
        filled.append(target.parameter)
    return filled


def _finish(checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    model.tie_weights(recompute_mapping=False)  # quantized layers are tied to nothing any more
    model.generation_config = generation_config(checkpoint, model.config)
    return model.to(device)  # type: ignore[arg-type]


def kernels_used(model: nn.Module) -> dict[str, Any]:
    """{"selected": kernel -> layers, "rejected": kernel -> reason} over a model's quantized layers, "quantized_inputs":
    how many of them have a scheme that quantizes inputs, and "fused": how many decoder layers run in one call, and
    why others do not (None where it was not tried)."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    rejected: dict[str, str] = {}
    for layer in layers:
        rejected |= layer.selection.rejected
    selected = dict(Counter(layer.selection.kernel.name for layer in layers))
    fusing = getattr(model, "fusing", None)
    inputs = sum(layer.scheme.activations is not None for layer in layers)
    used = {"selected": selected, "rejected": rejected, "quantized_inputs": inputs}
    return used | {"fused": asdict(fusing) if fusing else None}
