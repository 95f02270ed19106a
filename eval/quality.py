"""Perplexity by GPTQ's protocol (arXiv 2210.17323), and the divergence of one model from another on the same tokens.

Protocol "gptq": documents joined by a blank line, tokenized once, cut into non-overlapping windows of `context`
tokens, the tail dropped; in each window every token but the first is scored; perplexity = exp(mean NLL).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OnStep = Callable[[int, int], None]
PROTOCOL = "gptq"
_ROWS = 512  # rows of logits that are widened to float32 at a time: a vocabulary of 128k makes 260 MB of them


@dataclass(frozen=True)
class Quality:
    """What scoring one model, or a model against a baseline, found; sums are in float64.

    tokens: scored tokens. kl_*: KL(baseline || model) per token, in nats. top1_agreement: share of tokens at which
    both models rank the same next token first. None where there was no baseline.
    """

    perplexity: float
    windows: int
    tokens: int
    baseline_perplexity: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None


def windows(ids: Tensor, context: int, limit: int | None = None) -> Tensor:
    """Token ids [n] -> windows [count, context], the tail dropped.

    Raises:
        ValueError: the text fills no window.
    """
    count = ids.numel() // context
    if count == 0:
        raise ValueError(f"the text has {ids.numel()} tokens, less than one window of {context}")
    count = min(count, limit) if limit else count
    return ids[: count * context].view(count, context)


def _log_probabilities(model: nn.Module, window: Tensor) -> Iterator[Tensor]:
    """float32 log-probabilities [rows, vocabulary] of what follows each token but the last, a few rows at a time."""
    logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
    for rows in logits.split(_ROWS):
        yield F.log_softmax(rows.float(), -1)


def _nll(log_probabilities: Tensor, targets: Tensor) -> float:
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).double().sum().item()


@torch.inference_mode()
def score(model: nn.Module, data: Tensor, on_step: OnStep = lambda done, total: None) -> Quality:
    """Perplexity of a causal LM on windows of token ids [count, context].

    Raises:
        ValueError: the model gives NaN.
    """
    total = 0.0
    for number, window in enumerate(data):
        on_step(number, len(data))
        targets = window[1:].split(_ROWS)
        for log_q, target in zip(_log_probabilities(model, window), targets):
            total += _nll(log_q, target)
    on_step(len(data), len(data))
    tokens = data.shape[0] * (data.shape[1] - 1)
    return Quality(_perplexity(total, tokens), data.shape[0], tokens)


@torch.inference_mode()
def compare(baseline: nn.Module, model: nn.Module, data: Tensor, on_step: OnStep = lambda done, total: None) -> Quality:
    """Both models side by side on windows of token ids [count, context]: no logits are stored.

    KL(p || q) = sum p (log p - log q) over the vocabulary, p the baseline's distribution.

    Raises:
        ValueError: a model gives NaN.
    """
    base_nll = nll = divergence = 0.0
    largest, same = 0.0, 0
    for number, window in enumerate(data):
        on_step(number, len(data))
        pairs = zip(_log_probabilities(baseline, window), _log_probabilities(model, window), window[1:].split(_ROWS))
        for log_p, log_q, target in pairs:
            base_nll += _nll(log_p, target)
            nll += _nll(log_q, target)
            p = log_p.exp()
            # a token that the baseline rules out adds nothing, even if its logit is minus infinity
            kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
            divergence += kl.double().sum().item()
            largest = max(largest, kl.max().item())
            same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    on_step(len(data), len(data))
    tokens = data.shape[0] * (data.shape[1] - 1)
    return Quality(
        _perplexity(nll, tokens),
        data.shape[0],
        tokens,
        _perplexity(base_nll, tokens, "baseline"),
        divergence / tokens,
        largest,
        same / tokens,
    )


def _perplexity(nll: float, tokens: int, whose: str = "model") -> float:
    if math.isnan(nll):
        raise ValueError(f"the {whose}'s logits are NaN")
    return math.exp(min(nll / tokens, 700.0))
