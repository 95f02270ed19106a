"""Artifact -> metrics: reloaded in a fresh process, proven to be what was quantized, and measured."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.linear import QLinear

from ..errors import ConfigError, NumericsError
from ..models.loading import load_model
from ..models.modules import dense_layer, replace_layers
from ..models.structure import ParameterPath, TensorNames
from ..quantize.plan import make_plan
from ..quantize.recipe import Recipe
from ..quantize.sequential import REFERENCE_LOGITS
from ..quantize.weights import quantize_weight
from ..storage import files as store
from ..storage.checkpoint import Checkpoint
from ..system.device import pick_device
from ..system.progress import progress
from . import worker

PROBE_TOKENS = 64
# How far apart two forwards of the same weights may be, relative to the largest logit: nothing differs but which
# process runs, so what is left is the order of sums in the matrix library; a few units of the last place per block.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@torch.inference_mode()
def in_memory_logits(checkpoint: Checkpoint, recipe: Recipe, ids: Tensor, device: torch.device, dtype: str) -> Tensor:
    """Logits [tokens, vocabulary] of the source model, quantized here and never written, by the reference kernel."""
    plan = make_plan(checkpoint, recipe)
    model = load_model(checkpoint, device, dtype)
    layers: dict[ParameterPath, Any] = {}
    with progress("quantizing in memory") as step:
        for number, entry in enumerate(plan.quantized):
            step(number, len(plan.quantized))
            qtensor, _ = quantize_weight(entry, checkpoint.read(entry.info.name), plan)
            qtensor = qtensor.to(device)
            layers[entry.target] = lambda bias, q=qtensor: QLinear(q, bias, model.dtype, "reference")
    names = TensorNames(plan.model)
    _keep_experts_whole(layers, names, checkpoint, model)
    replace_layers(model, names, layers.items())
    return model(input_ids=ids.unsqueeze(0).to(device), use_cache=False).logits[0].cpu()


def _keep_experts_whole(
    layers: dict[ParameterPath, Any], names: TensorNames, checkpoint: Checkpoint, model: Any
) -> None:
    """Experts of which only some are quantized keep the others as they are in the checkpoint."""
    touched = {target.parameter for target in layers if target.expert}
    for name in checkpoint.tensors:
        target = names.target(name)
        if target.expert and target.parameter in touched and target not in layers:
            layers[target] = dense_layer(checkpoint.read(name).to(model.device, model.dtype))


@torch.inference_mode()
def check_task(request: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: logits from the files alone, against those of the in-memory model.

    Raises:
        NumericsError: they differ by more than the order of sums explains.
    """
    artifact = Checkpoint(Path(request["artifact"]))
    with progress("loading") as step:
        model = load_model(artifact, pick_device(request["device"]), request["dtype"], "reference", step)
    expected_file = Checkpoint.single(Path(request["expected"]))
    ids, expected = expected_file.read("ids"), expected_file.read("logits")
    found = model(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False).logits[0].cpu()
    difference = (found.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    tolerance = _TOLERANCE[model.dtype]
    if not difference <= tolerance:
        raise NumericsError(
            f"{artifact.folder.name}: reloaded from its files it gives other logits than in memory: they differ by "
            f"{difference:.3g} of the largest, expected at most {tolerance:.3g}; please report this as a bug"
        )
    return {"tokens": ids.numel(), "max_difference": difference, "tolerance": tolerance}


def check(checkpoint: Checkpoint, recipe: Recipe, artifact: Path, ids: Tensor, run: dict[str, str]) -> dict[str, Any]:
    """The artifact, reloaded in a fresh process, against the quantized model that was never saved and loaded: the one
    in which a method that learns did its work, or else the same quantization, done in memory here.

    Args:
        run: {"device", "dtype"}.
    """
    if recipe.calibration:
        return _compare(artifact, artifact.parent / REFERENCE_LOGITS, run)
    expected = artifact.parent / ".expected.safetensors"
    logits = in_memory_logits(checkpoint, recipe, ids, pick_device(run["device"]), run["dtype"])
    store.write_safetensors(expected, {"ids": ids, "logits": logits})
    try:
        return _compare(artifact, expected, run)
    finally:
        expected.unlink()


def _compare(artifact: Path, expected: Path, run: dict[str, str]) -> dict[str, Any]:
    if not expected.exists():
        raise ConfigError(f"{expected} is missing, with which the artifact is checked; move {artifact.parent} away")
    dtype = str(Checkpoint.single(expected).tensors["logits"].dtype).removeprefix("torch.")
    request = {"artifact": str(artifact.resolve()), "expected": str(expected.resolve()), **run, "dtype": dtype}
    return worker.call("check", request, artifact.parent)
