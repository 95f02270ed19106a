"""What is measured of one model, in a fresh process: memory, speed, perplexity, and how far it is from its baseline.

Quality belongs to the file: perplexity, divergence, tasks and errors by depth are those of the weights, with layers'
inputs left as the scheme has them. Memory and speed are those of the kernels as they run; what a kernel's own rounding
of inputs costs is measured by itself.
"""

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from bitpress.eval.measure import (
    bos,
    energy,
    layer_errors,
    memory,
    scores,
    speed,
    statistics,
    stored_predictions,
    tasks,
)
from bitpress.eval.measure.cache import cache_name
from bitpress.eval.measure.protocols import Window, beginning
from bitpress.eval.measure.sample import sample
from bitpress.eval.report.words import size
from bitpress.kernels.linear import inputs_left_alone
from bitpress.kernels.products import Products

from ..config.schema import AUTO, Eval, Speed
from ..data.text import Text, read_text
from ..data.tokens import BoundedTokenizer, encode, longest
from ..errors import CheckpointError, ConfigError, NumericsError
from ..formats import open_quantized, quantization_section, quantized_cache
from ..models.dtypes import computing_dtype
from ..models.kv_cache import cache_token_bytes
from ..models.loading import kernels_used, load_model
from ..models.modules import names_of_experts, part_experts
from ..models.pretrained import load_tokenizer
from ..models.structure import decoder, skeleton
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import Fingerprint
from ..system.device import pick_device
from ..system.machine import machine
from ..system.progress import progress
from .resume import WindowStore
from .windows import windows

_ROOM = 1.2  # times a baseline's weights, or a cache: what it takes with the activations that come along
_FAR = 1 << 40  # a context that no model has
_SAMPLE = "sample.json"
_COMPARED = 20_000  # characters of the text on which two tokenizers are compared
_ROUNDED_WINDOWS = 8  # on which the cost of rounded inputs is measured, but at most a tenth of all


@dataclass(frozen=True)
class Resume:
    """Where an evaluation keeps what is finished, each folder with what it depends on (see WindowStore).

    predictions: the baseline's, for a model that does not fit beside it; those of one baseline serve many models.
    """

    folder: str
    fingerprint: Fingerprint
    predictions: str
    predictions_fingerprint: Fingerprint


@dataclass(frozen=True)
class _Measurement:
    """One model to measure, as a request asks for it, ready to load."""

    settings: Eval
    device: torch.device
    checkpoint: Checkpoint
    baseline: Checkpoint | None
    folder: Path
    resume: Resume | None

    @staticmethod
    def of(request: dict[str, Any]) -> "_Measurement":
        baseline, resume = request.get("baseline"), request.get("resume")
        return _Measurement(
            Eval.model_validate(request["eval"]),
            pick_device(request["device"]),
            (Checkpoint if request.get("dequantize") else open_quantized)(Path(request["artifact"])),
            Checkpoint(Path(baseline)) if baseline else None,
            Path(request["folder"]),
            Resume(**resume) if resume else None,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The baseline's, so that all that is compared with it reads the same tokens."""
        return load_tokenizer((self.baseline or self.checkpoint).folder)

    def check_vocabulary(self) -> None:
        """Raises CheckpointError where the baseline is visibly another model."""
        if self.baseline is None:
            return
        own, other = (skeleton(c).config.get_text_config().vocab_size for c in (self.checkpoint, self.baseline))
        if own != other:
            raise CheckpointError(
                f"{self.checkpoint.folder.name} has a vocabulary of {own} tokens, its baseline "
                f"{self.baseline.folder.name} one of {other}: it was not made from that; give the model that it was"
            )

    def other_tokens(self) -> Iterator[str]:
        """A sentence where the checkpoint's own tokenizer gives other tokens than the baseline's, which is used."""
        if self.baseline is None:
            return
        content = read_text(self.settings.text).content[:_COMPARED]
        try:
            own, used = (encode(t, Text("", content)) for t in (load_tokenizer(self.checkpoint.folder), self.tokenizer))
        except CheckpointError as error:
            yield f"the checkpoint's own tokenizer cannot be compared with the baseline's, which is used: {error}"
            return
        if not torch.equal(own, used):
            first = next((n for n, (one, other) in enumerate(zip(own.tolist(), used.tolist())) if one != other), None)
            place = "one has more" if first is None else f"the first that differs is number {first + 1}"
            yield (
                f"the checkpoint's own tokenizer gives other tokens than its baseline's ({place}): the figures are of "
                "the baseline's tokens, and whoever loads this checkpoint with its tokenizer gets others"
            )

    @property
    def dtype(self) -> str:
        """What both models compute with: the settings' dtype or, with "auto", the baseline's. A checkpoint that is
        stored in another one would be charged for how far the two dtypes are apart."""
        if self.settings.dtype != AUTO or self.baseline is None:
            return self.settings.dtype
        own, other = computing_dtype(self.checkpoint), computing_dtype(self.baseline)
        return AUTO if own == other else other

    def load(self) -> Any:
        with progress("loading") as step:
            return load_model(self.checkpoint, self.device, self.dtype, self.settings.kernel, step)

    def load_baseline(self) -> Any:
        assert self.baseline is not None
        return load_model(self.baseline, self.device, self.dtype)

    def sample(self, model: Any) -> str:
        """What a model writes after the prompt of the settings.

        Raises:
            ConfigError: the prompt is empty, and nothing begins a text of this model.
        """
        try:
            return sample(model, BoundedTokenizer(self.tokenizer), self.settings.prompt)
        except ValueError as error:
            raise ConfigError(f"eval.prompt: {error}") from error

    def crowding(self) -> str | None:
        """Why the baseline cannot be held beside the model that is there; None if it can, or there is none."""
        if self.baseline is None:
            return None
        needed = _ROOM * sum(info.nbytes for info in self.baseline.tensors.values())
        free = memory.free_bytes(self.device)
        if needed < free:
            return None
        return f"the baseline needs about {size(needed)} beside it, {size(free)} are free"

    @contextlib.contextmanager
    def numbers(self) -> Iterator[None]:
        """NaN and the like are errors of the checkpoint, which is named."""
        try:
            yield
        except ValueError as error:
            raise NumericsError(f"{self.checkpoint.folder.name}: {error}") from error

    @contextlib.contextmanager
    def finished(self) -> Iterator[tuple[Mapping[int, scores.Scores], scores.Keep]]:
        """Windows that an earlier process finished, and what keeps those of this one."""
        if self.resume is None:
            yield {}, lambda number, window_scores: None
            return
        with WindowStore(Path(self.resume.folder), self.resume.fingerprint) as store:
            yield store, store.keep

    @contextlib.contextmanager
    def predictions(self) -> Iterator[WindowStore]:
        """The baseline's predictions, on the disk; no other process writes them meanwhile."""
        folder = Path(self.resume.predictions) if self.resume else self.folder / "predictions"
        files.make_folder(folder)
        fingerprint = self.resume.predictions_fingerprint if self.resume else {}
        # whoever holds it computes what this job needs, too
        with journal.locked(folder, math.inf), WindowStore(folder, fingerprint) as stored:
            yield stored


def measure_task(request: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: everything that is measured of one model, or with "speed_only" what is the machine's of it.

    Raises:
        BitpressError: of the files, the text or the numbers.
    """
    job = _Measurement.of(request)
    job.check_vocabulary()
    with memory.Peak(job.device) as loading:
        model = job.load()
    plan = windows(read_text(job.settings.text), job.tokenizer, job.settings, model.config)
    text = [window.to(job.device) for window in plan.windows]
    answer = _costs(job, model, text, loading)
    if request.get("speed_only"):
        with job.numbers():
            answer["kernels"]["rounded_inputs"] = _rounded_inputs(model, text)
        return answer
    answer["protocol"] = {
        "name": plan.name,
        "context": plan.context,
        "windows": len(plan.windows),
        "tokens": plan.tokens,
        "unit": plan.unit,
        "units": plan.units,
        **({"bos": plan.bos} if plan.bos else {}),
    }
    answer["dtype"] = str(model.dtype).removeprefix("torch.")
    answer["sample"] = {"prompt": job.settings.prompt, "text": job.sample(model)}
    with Products():
        answer["tasks"] = _tasks(job, model)
        answer["warnings"] = [*job.other_tokens(), *_bos_warnings(job, model, text, plan.bos)]
        reason = job.crowding()
        if reason:
            del model  # one after the other, where both do not fit
            _free()
            _predict(job, text)
            model = job.load()
        with job.numbers():
            with inputs_left_alone(model):
                answer |= _quality(job, model, text, reason)
            answer["kernels"]["rounded_inputs"] = _rounded_inputs(model, text)
    answer["quality"] |= statistics.summarize(answer.pop("scores"), plan.units)
    answer["sample"] |= {"baseline_text": answer.pop("baseline_text")}
    return answer


def _bos_warnings(job: _Measurement, model: Any, text: list[Window], begins: str | None) -> Iterator[str]:
    """A sentence where the model's perplexity with BOS and without differ tenfold."""
    first = text[0].ids
    start = beginning(job.tokenizer, first.cpu()).to(first.device)
    rest = first[start.numel() :]
    if not start.numel():
        if job.tokenizer.bos_token_id is None:
            return
        start = first.new_tensor([job.tokenizer.bos_token_id])
        rest = first[1:] if first[0] == start[0] else first
    if int(start.max()) >= model.config.get_text_config().vocab_size:
        return
    with job.numbers(), inputs_left_alone(model):
        effect = bos.bos_effect(model, start, rest[: longest(model.config, _FAR) - start.numel()])
    if effect and (warning := bos.bos_warning(effect, begins in ("each window", "each page"))):
        yield warning


class _InputsLeftAlone(torch.nn.Module):
    """The same model, its layers' inputs left as the scheme has them."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with inputs_left_alone(self.model):
            return self.model(**inputs)


def _rounded_inputs(model: Any, text: list[Window]) -> dict[str, Any] | None:
    """The loss of kernels that round the inputs of weight-only layers: the model's KL from itself without that, on some
    windows; None where no kernel does."""
    with inputs_left_alone(model) as layers:
        pass
    if not layers:
        return None
    some = text[: max(1, min(_ROUNDED_WINDOWS, len(text) // 10))]
    rounding = scores.compare(_InputsLeftAlone(model), model, some)
    summary = statistics.summarize(rounding, sum(window.targets.numel() for window in some))
    return {"layers": layers, "windows": len(some), "kl_mean": summary["kl_mean"], "kl_mean_se": summary["kl_mean_se"]}


def _free() -> None:
    """Give back what nothing refers to any more, so that another model finds room."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _costs(job: _Measurement, model: Any, text: list[Window], loading: memory.Peak) -> dict[str, Any]:
    """Memory and speed."""
    resident = memory.resident_bytes(model)
    cache = quantized_cache(job.checkpoint)
    token_bytes = partial(cache_token_bytes, cache) if cache else None
    prompt, reading = memory.prefill(model, max((window.ids for window in text), key=len), token_bytes)
    rates = _speeds(model, text, job.settings.speed, prompt)
    with memory.Peak(job.device) as scoring, job.numbers():
        scores.score(model, text[:1])
    peaks = (loading, reading, scoring)
    activations = prompt["activation_peak_bytes"]
    per_token = None if activations is None else activations / prompt["prompt"]
    limit = longest(model.config, _FAR)
    if cache and (kept := prompt.pop("kv_cache", None)):  # as a runtime has it that keeps codes; bitpress keeps numbers
        keys = ("kv_cache_bytes_per_token", "kv_cache_windows")
        prompt["kv_cache"] = {"type": cache.name, **{key: prompt[key] for key in keys if key in prompt}}
        prompt["kv_cache_bytes_per_token"] = kept["bytes_per_token"]
        if kept["windows"]:
            prompt["kv_cache_windows"] = kept["windows"]
    return {
        "memory": {
            "resident_bytes": resident,
            "loading_peak_bytes": loading.growth,
            **prompt,
            "peak_rss_bytes": max(peak.rss for peak in peaks),
            "peak_cuda_bytes": scoring.cuda if scoring.cuda is None else max(peak.cuda or 0 for peak in peaks),
            "fits": memory.fitting(
                resident,
                prompt["kv_cache_bytes_per_token"],
                per_token,
                None if limit == _FAR else limit,
                prompt.get("kv_cache_windows", ()),
            ),
        },
        **rates,
        "kernels": kernels_used(model),
        "machine": machine(job.device),
    }


def _speeds(model: Any, text: list[Window], settings: Speed | None, costs: dict[str, Any]) -> dict[str, Any]:
    """Rates of each load. costs: of a prompt, see memory.prefill."""
    if settings is None or cache_name(model) is None:
        return {"speed": [], "bandwidth": None, "energy_meter": None}  # those that keep a state decode by other calls
    ids, meter = torch.cat([window.ids for window in text]), energy.meter(model.device)
    bandwidth, weights = speed.bandwidth(model.device), speed.read_bytes(model)
    prompts = settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]
    limits = (longest(model.config, prompt + settings.generate) for prompt in prompts)
    lengths = dict.fromkeys(speed.fit(limit, prompt, settings.generate) for limit, prompt in zip(limits, prompts))
    results = []
    for batch in settings.batch:
        for prompt, generate in lengths:
            load = speed.Load(batch, prompt, generate, settings.repeats)
            per_token, length = costs["kv_cache_bytes_per_token"], prompt + generate
            cache: float | None = None
            if per_token is not None:  # on average: layers with a window keep its tokens only
                cache = memory.cache_size(length, per_token, costs.get("kv_cache_windows", ())) / length
            if reason := _too_large(load, cache, model.device):
                results.append({**asdict(load), "skipped": reason})
                continue
            with progress(f"speed, batch {batch}, prompt {prompt}") as step:
                rates = speed.measure(model, ids, load, meter, step)
            results.append(rates | speed.traffic(rates, weights, cache, bandwidth))
    return {"speed": results, "bandwidth": bandwidth, "energy_meter": meter.name if meter else None}


def _too_large(load: speed.Load, cache: float | None, device: torch.device) -> str | None:
    """Why a load would not fit into memory; None where it does, or cannot be told."""
    needed = _ROOM * (cache or 0.0) * load.batch * (load.prompt + load.generate)
    if needed < (free := memory.free_bytes(device)):
        return None
    return f"its cache needs about {size(needed)}, {size(free)} are free"


def _tasks(job: _Measurement, model: Any) -> list[dict[str, Any]]:
    if not job.settings.tasks:
        return []
    try:
        with inputs_left_alone(model):
            own = job.settings
            return tasks.run_tasks(model, job.tokenizer, own.tasks, own.task_limit, own.task_fewshot, own.task_chat)
    except ValueError as error:
        raise ConfigError(f"eval.tasks: {error}") from error


def _predict(job: _Measurement, text: list[Window]) -> None:
    """Put the baseline's predictions on the disk, as far as they are not there."""
    with job.predictions() as stored:
        if len(stored) == len(text) and (stored.folder / _SAMPLE).exists():
            return
        files.preflight(
            stored.folder, stored_predictions.bytes_per_token() * sum(window.targets.numel() for window in text)
        )
        baseline = job.load_baseline()
        with progress("the baseline's predictions") as step:
            for number, window in enumerate(text):
                step(number, len(text))
                if number not in stored:
                    stored.keep(number, stored_predictions.predict(baseline, window, number))
        text_of_baseline = job.sample(baseline)
        files.write_json(stored.folder / _SAMPLE, {"text": text_of_baseline})
    del baseline
    _free()


def _quality(job: _Measurement, model: Any, text: list[Window], crowded: str | None) -> dict[str, Any]:
    """Scores of all windows, the baseline's sample, and errors by depth; without a baseline the scores alone."""
    alone: dict[str, Any] = {"quality": {"path": None}, "output_errors": None, "baseline_text": None}
    with job.finished() as (finished, keep):
        if job.baseline is None:
            with progress("perplexity") as step:
                return {**alone, "scores": scores.score(model, text, finished, keep, step)}
        if crowded:
            with job.predictions() as stored, progress("perplexity and divergence") as step:
                every = scores.each(
                    text, lambda n, window: stored_predictions.compare(stored[n], model, window), finished, keep, step
                )
                baseline_text = read_json(stored.folder / _SAMPLE)["text"]
            counts = f"{stored_predictions.TOP} stored and {stored_predictions.SAMPLES} sampled probabilities"
            return {
                "quality": {"path": f"{counts} of each token, as {crowded}"},
                "output_errors": {"skipped": crowded} if job.settings.output_errors else None,
                "scores": every,
                "baseline_text": baseline_text,
            }
        dense = job.load_baseline()
        with progress("perplexity and divergence") as step:
            every = scores.compare(dense, model, text, finished, keep, step)
    return {
        "quality": {"path": "side by side"},
        "scores": every,
        "output_errors": _output_errors(job, dense, model, text[: job.settings.output_errors]),
        "baseline_text": job.sample(dense),
    }


def _output_errors(job: _Measurement, dense: Any, model: Any, text: list[Window]) -> dict[str, Any] | None:
    """By the checkpoint's names of layers; None where no window is asked for."""
    if not text:
        return None
    part_experts(dense, model)
    with progress("errors by depth") as step:
        errors = layer_errors.output_errors(dense, model, text, decoder(dense), step)
    if quantization_section(job.checkpoint) is not None:
        names = names_of_experts(model.hf_quantizer.contents)
        for layer in errors["layers"]:
            layer["name"] = names.get(layer["name"], layer["name"])
    return errors
