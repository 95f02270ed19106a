"""Tokens per second: prefill (reading a prompt) and decode (one token at a time) apart, with a warm-up and a spread."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements, in tokens per second over the whole batch."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        return Spread(median(values), min(values), max(values))


def fit(context: int, prompt: int, generate: int) -> tuple[int, int]:
    """Prompt and generated tokens that fit a context, in the proportion asked for."""
    if prompt + generate <= context:
        return prompt, generate
    generate = max(1, context * generate // (prompt + generate))
    return context - generate, generate


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(model: nn.Module, prompt: Tensor, generate: int) -> tuple[float, float]:
    """Seconds of the prefill and of the decode; greedy, the model's own key-value cache."""
    device = prompt.device
    _synchronize(device)
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    _synchronize(device)
    middle = time.perf_counter()
    for _ in range(generate):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    _synchronize(device)
    return middle - start, time.perf_counter() - middle


@torch.inference_mode()
def measure(
    model: nn.Module, ids: Tensor, batch: int, prompt: int, generate: int, repeats: int, on_step: OnStep
) -> dict[str, Any]:
    """Speed at one batch size, after one warm-up.

    Args:
        ids: token ids [n] to take prompts from, wrapped round where they are too few.
        prompt, generate: tokens per sequence.
        on_step: called with (runs done, runs in all).
    Returns:
        {"batch", "prompt", "generate", "repeats", "prefill": Spread, "decode": Spread} as plain values.
    """
    positions = torch.arange(batch * prompt) % ids.numel()
    rows = ids.cpu()[positions].view(batch, prompt).to(ids.device)
    prefill, decode = [], []
    for number in range(repeats + 1):
        on_step(number, repeats + 1)
        first, rest = _once(model, rows, generate)
        if number:
            prefill.append(batch * prompt / first)
            decode.append(batch * generate / rest)
    on_step(repeats + 1, repeats + 1)
    return {
        "batch": batch,
        "prompt": prompt,
        "generate": generate,
        "repeats": repeats,
        "prefill": asdict(Spread.of(prefill)),
        "decode": asdict(Spread.of(decode)),
    }
