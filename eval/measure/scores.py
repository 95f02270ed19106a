"""How well a model predicts a text, token by token, alone or beside the model that it was made from."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .protocols import Window

OnStep = Callable[[int, int], None]
# What is found of one window, by name, one value for each scored token; see score, compare and predictions.compare.
Scores = dict[str, Tensor]
Keep = Callable[[int, Scores], None]
# Logits that are worked on at a time: as many as stay in a core's cache, or as keep a GPU busy.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


def logits(model: nn.Module, window: Window) -> Tensor:
    """What a causal LM predicts of the window's targets: [targets, vocabulary], in the model's dtype."""
    found = model(input_ids=window.ids.unsqueeze(0), use_cache=False).logits[0]
    return found[window.first : window.first + window.targets.numel()]


def rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows at a time of tensors, the first of them the widest, floating-point ones in float32."""
    widest = tensors[0]
    count = max(1, _CHUNK.get(widest.device.type, _CHUNK["cpu"]) // widest.shape[-1])
    for parts in zip(*(tensor.split(count) for tensor in tensors)):
        yield tuple(part.float() if part.is_floating_point() else part for part in parts)


def best(some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [rows, vocabulary]: probabilities, log of the sum of exponentials [rows], and the best token [rows]."""
    probabilities = torch.softmax(some, -1)
    highest, token = some.max(-1)
    # log sum exp x = max x - log softmax(max x): softmax has summed already
    return probabilities, highest - pick(probabilities, token).log(), token


def pick(table: Tensor, columns: Tensor) -> Tensor:
    """table[i, columns[i]] for each row i."""
    return table.gather(-1, columns.unsqueeze(-1)).squeeze(-1)


def _joined(parts: Sequence[Scores]) -> Scores:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _score(model: nn.Module, window: Window) -> Scores:
    parts = []
    for some, targets in rows(logits(model, window), window.targets):
        _, total, _ = best(some)
        parts.append({"nll": total - pick(some, targets)})
    return _joined(parts)


def _divergence(p: Tensor, one: Tensor, other: Tensor, gap: Tensor) -> Tensor:
    """KL [rows] = sum p (x - y) - (lse x - lse y), of logits x and y [rows, vocabulary], p = softmax(x)."""
    kl = (p * (one - other)).sum(-1) - gap
    unclear = ~torch.isfinite(kl)
    if unclear.any():  # logits of minus infinity: what the baseline rules out adds nothing
        p, one, other = p[unclear], one[unclear], other[unclear]
        terms = torch.where(p > 0, p * (F.log_softmax(one, -1) - F.log_softmax(other, -1)), 0.0)
        kl[unclear] = terms.sum(-1)
    return kl


def _compare(baseline: nn.Module, model: nn.Module, window: Window) -> Scores:
    parts = []
    for one, other, targets in rows(logits(baseline, window), logits(model, window), window.targets):
        p, base_sum, base_best = best(one)
        _, own_sum, own_best = best(other)
        parts.append(
            {
                "baseline_nll": base_sum - pick(one, targets),
                "nll": own_sum - pick(other, targets),
                "kl": _divergence(p, one, other, base_sum - own_sum),
                "same": base_best == own_best,
            }
        )
    return _joined(parts)


def _check(scores: Scores) -> None:
    for name, whose in (("baseline_nll", "baseline"), ("nll", "model")):
        if name in scores and scores[name].isnan().any():
            raise ValueError(f"the {whose}'s logits are NaN")
        if name in scores and scores[name].isinf().any():
            raise ValueError(f"the {whose} gives a token of the text no chance: its perplexity is infinite")
    if "kl" in scores and not scores["kl"].isfinite().all():
        raise ValueError("the divergence is infinite: the model rules out tokens that the baseline allows")


def each(
    windows: Sequence[Window],
    find: Callable[[int, Window], Scores],
    finished: Mapping[int, Scores],
    keep: Keep,
    on_step: OnStep,
) -> list[Scores]:
    """find(number, window) for every window that is not finished, each kept as soon as it is there; all in order.

    Raises:
        ValueError: what was found is NaN or infinite.
    """
    found = []
    for number, window in enumerate(windows):
        on_step(number, len(windows))
        scores = finished.get(number)
        if scores is None:
            scores = find(number, window)
            _check(scores)
            keep(number, scores)
        found.append(scores)
    on_step(len(windows), len(windows))
    return found


@torch.inference_mode()
def score(
    model: nn.Module,
    windows: Sequence[Window],
    finished: Mapping[int, Scores] | None = None,
    keep: Keep = lambda number, scores: None,
    on_step: OnStep = lambda done, total: None,
) -> list[Scores]:
    """A causal LM on windows: of each, "nll", minus the log-probability of each target, float32 [targets], in nats.

    Args:
        windows: on the model's device.
        finished: what an earlier call found, by the window's number; it is not computed again.
        keep: called with each window's number and what was found.
    Raises:
        ValueError: the model gives NaN, or a token of the text no chance at all.
    """
    return each(windows, lambda _, window: _score(model, window), finished or {}, keep, on_step)


@torch.inference_mode()
def compare(
    baseline: nn.Module,
    model: nn.Module,
    windows: Sequence[Window],
    finished: Mapping[int, Scores] | None = None,
    keep: Keep = lambda number, scores: None,
    on_step: OnStep = lambda done, total: None,
) -> list[Scores]:
    """Both models side by side, window by window; no logits are stored. Arguments as of score.

    Returns:
        Of each window, one value for each target: "nll" and "baseline_nll" as of score; "kl", float32, the divergence
        KL(p || q) = sum p (log p - log q) over the vocabulary, p the baseline's probabilities and q the model's, in
        nats; and "same", bool, whether both rank the same token first.
    Raises:
        ValueError: a model gives NaN or infinite figures.
    """
    return each(windows, lambda _, window: _compare(baseline, model, window), finished or {}, keep, on_step)
