"""How well a model predicts a text, token by token: alone, or beside its unquantized baseline."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .protocols import Window

OnStep = Callable[[int, int], None]
# The scores of one window by name, one value for each scored token; see score, compare, stored_predictions.compare.
Scores = dict[str, Tensor]
Keep = Callable[[int, Scores], None]
# Logits that are processed at a time: so many that they stay in a core's cache, or keep a GPU busy.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


def logits(model: nn.Module, window: Window) -> Tensor:
    """A causal LM's logits for the window's targets: [targets, vocabulary], in the model's dtype.

    Those of the tokens before are not computed, where the model's forward can leave them out.
    """
    skipped, arguments = window.first, {"input_ids": window.ids.unsqueeze(0), "use_cache": False}
    if skipped and "logits_to_keep" in inspect.signature(model.forward).parameters:
        skipped, arguments["logits_to_keep"] = 0, window.ids.numel() - skipped
    return model(**arguments).logits[0][skipped : skipped + window.targets.numel()]


def rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields a few rows at a time of all tensors, floating-point ones in float32. The first tensor is the widest."""
    widest = tensors[0]
    count = max(1, _CHUNK.get(widest.device.type, _CHUNK["cpu"]) // widest.shape[-1])
    for parts in zip(*(tensor.split(count) for tensor in tensors)):
        yield tuple(part.float() if part.is_floating_point() else part for part in parts)


def best(some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, vocabulary] -> their probabilities, log of the sum of exponentials [rows], best token [rows]."""
    probabilities = torch.softmax(some, -1)
    highest, token = some.max(-1)
    # log sum exp x = max x - log softmax(max x): softmax has summed already
    return probabilities, highest - pick(probabilities, token).log(), token


def pick(table: Tensor, columns: Tensor) -> Tensor:
    """table[i, columns[i]] for each row i."""
    return table.gather(-1, columns.unsqueeze(-1)).squeeze(-1)


def _concatenated(parts: Sequence[Scores]) -> Scores:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _score(model: nn.Module, window: Window) -> Scores:
    parts = []
    for some, targets in rows(logits(model, window), window.targets):
        _, total, _ = best(some)
        parts.append({"nll": total - pick(some, targets)})
    return _concatenated(parts)


def divergence(p: Tensor, one: Tensor, other: Tensor, gap: Tensor) -> Tensor:
    """KL [rows] = sum p (x - y) - (lse x - lse y), of logits x and y [rows, vocabulary], p = softmax(x)."""
    kl = (p * (one - other)).sum(-1) - gap
    unclear = ~torch.isfinite(kl)
    if unclear.any():  # logits of minus infinity: a token that the baseline rules out adds nothing
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
                "kl": divergence(p, one, other, base_sum - own_sum),
                "same": base_best == own_best,
            }
        )
    return _concatenated(parts)


def each(
    windows: Sequence[Window],
    measure: Callable[[int, Window], Scores],
    finished: Mapping[int, Scores],
    keep: Keep,
    on_step: OnStep,
) -> list[Scores]:
    """The scores of all windows in order: finished ones as they are, others by measure(number, window), then kept.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    every = []
    for number, window in enumerate(windows):
        on_step(number, len(windows))
        scores = finished.get(number)
        if scores is None:
            scores = measure(number, window)
            for name, owner in (("baseline_nll", "baseline"), ("nll", "model")):
                if name in scores and scores[name].isnan().any():
                    raise ValueError(f"the {owner}'s logits are NaN")
                if name in scores and scores[name].isinf().any():
                    raise ValueError(f"the {owner} gives a token of the text no chance: its perplexity is infinite")
            if "kl" in scores and not scores["kl"].isfinite().all():
                raise ValueError("the divergence is infinite: the model rules out tokens that the baseline allows")
            keep(number, scores)
        every.append(scores)
    on_step(len(windows), len(windows))
    return every


@torch.inference_mode()
def score(
    model: nn.Module,
    windows: Sequence[Window],
    finished: Mapping[int, Scores] | None = None,
    keep: Keep = lambda number, scores: None,
    on_step: OnStep = lambda done, total: None,
) -> list[Scores]:
    """For each window "nll": minus the log-probability of each target by a causal LM, float32 [targets], in nats.

    Args:
        windows: on the model's device.
        finished: scores of an earlier call by the window's number; they are not computed again.
        keep: called with each new window's number and scores.
    Raises:
        ValueError: the model gives NaN, or a token of the text has no chance at all.
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
    """Scores of both models side by side, window by window; no logits are stored. Arguments as for score.

    Returns:
        For each window, one value per target: "nll" and "baseline_nll" as in score; "kl", float32, the divergence
        KL(p || q) = sum p (log p - log q) over the vocabulary in nats, where p are the baseline's probabilities and q
        the model's; and "same", bool, whether both rank the same token first.
    Raises:
        ValueError: a model gives NaN or infinite figures.
    """
    return each(windows, lambda _, window: _compare(baseline, model, window), finished or {}, keep, on_step)
