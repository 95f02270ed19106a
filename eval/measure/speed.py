"""Tokens per second of prefill (reading a prompt) and of decode (one token at a time), with a warm-up and a spread.

Each step of decode reads all weights and the cache once. So its bytes per second, as a share of the memory's bandwidth,
tell how near to the limit a kernel is.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .cache import cache_name, cache_of
from .energy import Meter
from .memory import resident_bytes

OnStep = Callable[[int, int], None]
BANDWIDTH_BYTES = 1 << 28
_BANDWIDTH_REPEATS = 4


@dataclass(frozen=True)
class Load:
    """A batch of prompts of so many tokens each, and the number of tokens to generate for each prompt."""

    batch: int
    prompt: int
    generate: int
    repeats: int


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest value of repeated measurements."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase; joules: its energy, None without a meter."""

    seconds: float
    joules: float | None


def fit(context: int, prompt: int, generate: int) -> tuple[int, int]:
    """(prompt, generate) that fit into a context, in the same proportion."""
    if prompt + generate <= context:
        return prompt, generate
    generate = max(1, context * generate // (prompt + generate))
    return context - generate, generate


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Stopwatch:
    """Measures phases one after the other: the time of each, and its energy where there is a meter."""

    def __init__(self, device: torch.device, meter: Meter | None):
        self._device, self._meter = device, meter
        self.start()

    def start(self) -> None:
        _synchronize(self._device)
        self._reading = self._meter.read() if self._meter else []
        self._time = time.perf_counter()

    def stop(self) -> Phase:
        _synchronize(self._device)
        seconds = time.perf_counter() - self._time
        return Phase(seconds, self._meter.since(self._reading) if self._meter else None)


def once(model: nn.Module, prompt: Tensor, generate: int, meter: Meter | None) -> tuple[Phase, Phase]:
    """One prefill and one greedy decode, with the model's own key-value cache.

    A model whose `generate` has a faster step for one sequence is measured by that: `decoding.reader(cache, length)` of
    the model is a function from a token to the likeliest next one, and more.

    Args:
        prompt: ids [batch, prompt]. generate: steps, each of one token for every prompt.
    """
    name = cache_name(model)
    assert name, "a model without a key-value cache decodes by other calls"
    watch = _Stopwatch(prompt.device, meter)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = watch.stop()
    decoding: Any = getattr(model, "decoding", None)
    alone = decoding is not None and len(prompt) == 1 and decoding.unsupported() is None
    watch.start()
    if alone:
        read, number = decoding.reader(cache_of(output), prompt.shape[1]), int(token)
        for _ in range(generate):
            number = read(number)[0]
    else:
        for _ in range(generate):
            output = model(input_ids=token, use_cache=True, **{name: cache_of(output)})
            token = output.logits[:, -1:].argmax(-1)
    return first, watch.stop()


@torch.inference_mode()
def measure(
    model: nn.Module, ids: Tensor, load: Load, meter: Meter | None, on_step: OnStep = lambda done, total: None
) -> dict[str, Any]:
    """Speed under one load, after one warm-up.

    Args:
        ids: token ids [n] from which prompts are taken; too few are repeated.
        on_step: called with (runs done, runs in all).
    Returns:
        The load's fields; "prefill" and "decode", each a Spread of tokens per second over the whole batch;
        "first_token_seconds", a Spread; and "joules_per_token": averages {"prefill", "decode"}, None without a meter.
    """
    positions = torch.arange(load.batch * load.prompt) % ids.numel()
    rows = ids.cpu()[positions].view(load.batch, load.prompt).to(ids.device)
    phases: list[tuple[Phase, Phase]] = []
    for number in range(load.repeats + 1):
        on_step(number, load.repeats + 1)
        phases.append(once(model, rows, load.generate, meter))
    on_step(load.repeats + 1, load.repeats + 1)
    del phases[0]  # the warm-up
    tokens = {"prefill": load.batch * load.prompt, "decode": load.batch * load.generate}
    rates = {
        phase: asdict(Spread.of([tokens[phase] / both[which].seconds for both in phases]))
        for which, phase in enumerate(tokens)
    }
    joules = {
        phase: sum(both[which].joules or 0.0 for both in phases) / (load.repeats * tokens[phase])
        for which, phase in enumerate(tokens)
    }
    return {
        **asdict(load),
        **rates,
        "first_token_seconds": asdict(Spread.of([first.seconds for first, _ in phases])),
        "joules_per_token": joules if meter else None,
    }


def read_bytes(model: Any) -> int | None:
    """Bytes of weights that a step of decode reads: all but the table of embeddings, unless the head is the same table.

    A step looks up only a few rows of the embeddings. None for a mixture of experts: the tokens choose the experts.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and getattr(outputs, "weight", None) is inputs.weight
    return resident_bytes(model) - (0 if tied else inputs.weight.nbytes)


def traffic(speed: dict[str, Any], weights: int | None, cache: float | None, bandwidth: float) -> dict[str, Any]:
    """The bytes that decode moves, from the result of `measure`.

    Args:
        weights: bytes that a step reads; None where that is not known. cache: bytes per token. bandwidth: bytes per
            second, as `bandwidth` measures it.
    Returns:
        {"bytes_per_second", "bandwidth_share"} of decode. A share above 1 says that a cache of the processor holds the
        weights.
    """
    if weights is None:
        return {"bytes_per_second": None, "bandwidth_share": None}
    length = speed["prompt"] + speed["generate"] / 2  # on average over the steps
    moved = (weights + speed["batch"] * length * (cache or 0.0)) * speed["decode"]["median"] / speed["batch"]
    return {"bytes_per_second": moved, "bandwidth_share": moved / bandwidth}


def bandwidth(device: torch.device) -> float:
    """Bytes per second between memory and the processor or GPU: the best of a few copies and a few sums.

    A copy counts bytes read and bytes written, like the benchmark STREAM. The tensor has a quarter of a GiB: hardly any
    cache holds it.
    """
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for work, moved in ((lambda: target.copy_(source), 2 * source.nbytes), (source.sum, source.nbytes)):
        for _ in range(_BANDWIDTH_REPEATS):
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            best = max(best, moved / (time.perf_counter() - start))
    return best
