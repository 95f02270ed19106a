"""Artifact -> metrics: reloaded in a fresh process, proven to be what was quantized, and measured."""

import inspect
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bitpress.eval import memory, quality, speed
from bitpress.kernels.qlinear import QLinear

from .. import store, worker
from ..blocks import Names, Target
from ..checkpoint import Checkpoint
from ..config import Eval
from ..errors import ConfigError, NumericsError
from ..loading import dense_layer, kernels_used, load_model, load_tokenizer, pick_device, replace_layers
from ..machine import machine
from ..plan import make_plan
from ..progress import progress
from ..recipe import Recipe
from ..text import read_text, tokenize
from .calibrated import WITNESS
from .press import quantize_entry

PROBE_TOKENS = 64
# How far apart two forwards of the same weights may be, relative to the largest logit: nothing differs but which
# process runs, so what is left is the order of sums in the matrix library; a few units of the last place per block.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SAMPLE_TOKENS = 48


@torch.inference_mode()
def in_memory_logits(checkpoint: Checkpoint, recipe: Recipe, ids: Tensor, device: torch.device, dtype: str) -> Tensor:
    """Logits [tokens, vocabulary] of the source model, quantized here and never written, by the reference kernel."""
    plan = make_plan(checkpoint, recipe.scheme, recipe.format, recipe.skip)
    model = load_model(checkpoint, device, dtype)
    layers: dict[Target, Any] = {}
    with progress("quantizing in memory") as step:
        for number, entry in enumerate(plan.quantized):
            step(number, len(plan.quantized))
            qtensor, _ = quantize_entry(entry, checkpoint.read(entry.info.name), recipe, plan.dtype)
            qtensor = qtensor.to(device)
            layers[entry.target] = lambda bias, q=qtensor: QLinear(q, bias, model.dtype, "reference")
    names = Names(plan.model)
    _keep_experts_whole(layers, names, checkpoint, model)
    replace_layers(model, names, layers.items())
    return model(input_ids=ids.unsqueeze(0).to(device), use_cache=False).logits[0].cpu()


def _keep_experts_whole(layers: dict[Target, Any], names: Names, checkpoint: Checkpoint, model: Any) -> None:
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


def _crowding(baseline: Checkpoint, device: torch.device) -> str | None:
    """Why the baseline cannot be held beside the model that is there; None if it can."""
    needed = sum(info.nbytes for info in baseline.tensors.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed * 1.2 < free:
        return None
    return f"the baseline needs about {needed * 1.2 / 1e9:.1f} GB beside it, {free / 1e9:.1f} GB are free"


def measure_task(request: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: memory, speed, perplexity, and divergence from the baseline where both fit."""
    settings = Eval.model_validate(request["eval"])
    device = pick_device(request["device"])
    checkpoint = Checkpoint(Path(request["artifact"]))
    tokenizer = load_tokenizer(checkpoint.folder)
    with progress("loading") as step:
        model = load_model(checkpoint, device, settings.dtype, settings.kernel, step)
    context = min(settings.context, getattr(model.config, "max_position_embeddings", None) or settings.context)
    ids = tokenize(tokenizer, read_text(settings.text), context)
    data = quality.windows(ids, context, settings.windows).to(device)
    answer: dict[str, Any] = {"resident_bytes": memory.resident_bytes(model), "kernels": kernels_used(model)}
    answer["sample"] = _sample(model, tokenizer, settings.prompt)
    answer["speed"] = _speeds(model, ids.to(device), settings.speed)
    quality.score(model, data[:1])  # so that the peak has seen a whole window
    answer["memory"] = {
        "resident_bytes": answer.pop("resident_bytes"),
        "peak_rss_bytes": memory.peak_rss_bytes(),
        "peak_cuda_bytes": memory.peak_cuda_bytes(),
    }
    answer["quality"], answer["skipped"] = _quality(model, data, checkpoint, request.get("baseline"), settings)
    answer["machine"] = machine(device)
    answer["protocol"] = {"context": context, "windows": data.shape[0], "tokens": data.shape[0] * (context - 1)}
    answer["dtype"] = str(model.dtype).removeprefix("torch.")
    return answer


def _quality(
    model: Any, data: Tensor, checkpoint: Checkpoint, baseline: str | None, settings: Eval
) -> tuple[dict[str, Any], str | None]:
    try:
        source = Checkpoint(Path(baseline)) if baseline else None
        reason = _crowding(source, model.device) if source else None
        if source is None or reason:
            with progress("perplexity") as step:
                return asdict(quality.score(model, data, step)), reason
        dense = load_model(source, model.device, settings.dtype)
        with progress("perplexity and divergence") as step:
            found = quality.compare(dense, model, data, step)
        if not math.isfinite(found.kl_mean or 0.0):
            raise ValueError("the divergence is infinite: it rules out tokens that the baseline allows")
        return asdict(found), None
    except ValueError as error:
        raise NumericsError(f"{checkpoint.folder.name}: {error}") from error


def _speeds(model: Any, ids: Tensor, settings: Any) -> list[dict[str, Any]]:
    if settings is None or "past_key_values" not in inspect.signature(model.forward).parameters:
        return []  # models that keep a state instead of keys and values decode by other calls
    limit = getattr(model.config, "max_position_embeddings", None) or settings.prompt + settings.generate
    prompt, generate = speed.fit(limit, settings.prompt, settings.generate)
    results = []
    for batch in settings.batch:
        with progress(f"speed, batch {batch}") as step:
            results.append(speed.measure(model, ids, batch, prompt, generate, settings.repeats, step))
    return results


@torch.inference_mode()
def _sample(model: Any, tokenizer: Any, prompt: str) -> dict[str, str]:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    output = model.generate(
        **inputs, max_new_tokens=_SAMPLE_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return {"prompt": prompt, "text": tokenizer.decode(output[0], skip_special_tokens=True)}


def check(checkpoint: Checkpoint, recipe: Recipe, artifact: Path, ids: Tensor, run: dict[str, str]) -> dict[str, Any]:
    """The artifact, reloaded in a fresh process, against the quantized model that was never saved and loaded: the one
    in which a method that learns did its work, or else the same quantization, done in memory here.

    Args:
        run: {"device", "dtype"}.
    """
    if recipe.calibration:
        return _compare(artifact, artifact.parent / WITNESS, run)
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


def measure(artifact: Path, baseline: Path | None, settings: Eval, device: str, folder: Path) -> dict[str, Any]:
    """Everything that is measured of one model, in a fresh process; `seconds` is what it took in all."""
    start = time.perf_counter()
    request = {
        "artifact": str(artifact.resolve()),
        "baseline": str(baseline.resolve()) if baseline else None,
        "eval": settings.model_dump(),
        "device": device,
    }
    return {**worker.call("measure", request, folder), "seconds": time.perf_counter() - start}
