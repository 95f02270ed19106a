"""Proves an artifact: reloaded in a fresh process, it gives the logits of the model that was quantized in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.linear import QEmbedding, QLinear
from bitpress.kernels.products import Products

from ..errors import ConfigError, NumericsError
from ..formats import open_quantized
from ..models.dtypes import in_dtype
from ..models.kv_cache import CacheRounding, intercept
from ..models.loading import load_model
from ..models.modules import dense_layer, replace_layers
from ..models.structure import ParameterPath, TensorNames, tied
from ..quantize.plan import make_plan
from ..quantize.recipe import Recipe
from ..quantize.sequential import REFERENCE_LOGITS
from ..quantize.weights import quantize_weight
from ..storage import files as store
from ..storage.checkpoint import Checkpoint
from ..system.device import pick_device
from ..system.progress import progress
from . import worker

# How far apart two forwards of the same weights may be, relative to the largest logit: nothing differs but which
# process runs, so what is left is the order of sums in the matrix library; a few units of the last place per block.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The same where inputs are rounded, and the reference was stored, perhaps by another machine or with other threads: an
# input that lies between two codes may fall to the other, a whole step away. Where it was made, no bit differs.
_TOLERANCE_OF_ROUNDED = 3e-2


@torch.inference_mode()
def in_memory_logits(checkpoint: Checkpoint, recipe: Recipe, ids: Tensor, device: torch.device, dtype: str) -> Tensor:
    """Logits [tokens, vocabulary] of the source model, quantized here and never written, by the reference kernel."""
    plan = make_plan(checkpoint, recipe)
    model = load_model(in_dtype(checkpoint, recipe.dtype), device, dtype)
    layers: dict[ParameterPath, Any] = {}
    with progress("quantizing in memory") as step:
        for number, tensor in enumerate(plan.quantized):
            step(number, len(plan.quantized))
            qtensor, _ = quantize_weight(tensor, plan.checkpoint.read(tensor.info.name), plan)
            qtensor = qtensor.to(device)
            linear = lambda bias, q=qtensor: QLinear(q, bias, model.dtype, "reference")  # noqa: E731
            if tensor.kind == "embedding":
                layers[tensor.target] = lambda bias, q=qtensor: QEmbedding(q, model.dtype)
                heads = [copy for copy, origin in tied(plan.model).items() if origin == tensor.target.parameter]
                layers |= {ParameterPath(head): linear for head in heads}
            else:
                layers[tensor.target] = linear
    # experts of which only some are quantized keep the others as they are in the checkpoint
    parameters = {target.parameter for target in layers if target.expert}
    for tensor in plan.tensors:
        target = tensor.target
        if target.expert and target.parameter in parameters and target not in layers:
            layers[target] = dense_layer(plan.checkpoint.read(tensor.info.name).to(model.device, model.dtype))
    replace_layers(model, TensorNames(plan.model), layers.items())
    for path in plan.cache.shapes if plan.cache else ():
        assert plan.cache
        intercept(model.get_submodule(path), CacheRounding(plan.cache.cache))  # it is dynamic: nothing was calibrated
    return _logits(model, ids)


@torch.inference_mode()
def verify_task(request: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: logits from the files alone, against those of the in-memory model.

    Args:
        request: "artifact", a folder; "reference", a file; "stored", whether that is older than this call; "device" and
            "dtype" to load with.
    Raises:
        NumericsError: they differ by more than the order of sums explains.
    """
    artifact = open_quantized(Path(request["artifact"]))
    with progress("loading") as step:
        model = load_model(artifact, pick_device(request["device"]), request["dtype"], "reference", step)
    reference = Checkpoint.single(Path(request["reference"]))
    ids, expected = reference.read("ids"), reference.read("logits")
    logits = _logits(model, ids)
    difference = (logits.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    tolerance = _TOLERANCE[model.dtype]
    if request["stored"] and any(isinstance(each, QLinear) and each.scheme.activations for each in model.modules()):
        tolerance = max(tolerance, _TOLERANCE_OF_ROUNDED)
    if not difference <= tolerance:
        raise NumericsError(
            f"{artifact.folder.name}: reloaded from its files it gives other logits than in memory: they differ by "
            f"{difference:.3g} of the largest, expected at most {tolerance:.3g}; please report this as a bug"
        )
    return {"tokens": ids.numel(), "max_difference": difference, "tolerance": tolerance}


def verify_artifact(
    checkpoint: Checkpoint, recipe: Recipe, artifact: Path, ids: Tensor, device: str, dtype: str
) -> dict[str, Any]:
    """The artifact, reloaded in a fresh process, against the quantized model that was never saved and loaded.

    A calibrated method left the reference logits of that model in the work folder; for any other, the same quantization
    is done again, in memory.

    Args:
        ids: int64 [tokens], which both models read.
    Raises:
        NumericsError: see verify_task. ConfigError: the reference logits of a calibrated method are missing.
    """
    if recipe.calibration:
        reference = artifact.parent / REFERENCE_LOGITS
        if not reference.exists():
            raise ConfigError(f"{reference} is missing, by which the artifact is verified; move {artifact.parent} away")
    else:
        reference = artifact.parent / ".reference.safetensors"
        logits = in_memory_logits(checkpoint, recipe, ids, pick_device(device), dtype)
        store.write_safetensors(reference, {"ids": ids, "logits": logits})
    try:
        request = {
            "artifact": str(artifact.resolve()),
            "reference": str(reference.resolve()),
            "device": device,
            "stored": bool(recipe.calibration),
            "dtype": str(Checkpoint.single(reference).tensors["logits"].dtype).removeprefix("torch."),
        }
        return worker.call("verify", request)
    finally:
        if not recipe.calibration:
            reference.unlink()


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence, on the CPU."""
    with Products():
        logits: Tensor = model(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False).logits
    return logits[0].cpu()
