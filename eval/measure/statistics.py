"""Scores of tokens -> the figures of a report, each with its standard error.

Tokens of one window share their context, so their scores are not independent; windows nearly are. The errors are
therefore those of a mean over clusters (Cochran, Sampling Techniques, 3rd ed., 9A.1, the ratio estimator): with sums
S_w over T_w tokens of window w, mean m = sum S / sum T, of W windows

    error = sqrt(W / (W - 1) * sum (S_w - m T_w)^2) / sum T

What compares the two models is summed over differences token by token (both read the same tokens), so the spread of
the text itself, many times that of the difference, cancels: the errors are paired.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scores import Scores

_LARGEST = 700.0  # exp of more than that is no float
_BOUND = 4.0  # standard deviations of a sampling error: a normal one is beyond them once in 16,000 times


def mean_and_error(values: Sequence[Tensor]) -> tuple[float, float | None]:
    """Mean over all values of all windows, and its standard error; None for the error of a single window.

    Args:
        values: of each window, one for each token.
    """
    sums = torch.stack([window.double().sum() for window in values])
    counts = torch.tensor([window.numel() for window in values], dtype=torch.float64)
    return ratio_and_error(sums, counts)


def ratio_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean and standard error from each window's sum and number of tokens, float64 [windows]."""
    mean = sums.sum() / counts.sum()
    if len(sums) < 2:
        return mean.item(), None
    residuals = (sums - mean * counts).square().sum()
    return mean.item(), (residuals * len(sums) / (len(sums) - 1)).sqrt().item() / counts.sum().item()


def perplexity(scores: Sequence[Scores], units: int, of: str = "nll") -> tuple[float, float | None]:
    """exp(total loss / units) and its standard error.

    Args:
        units: tokens, or words for a perplexity of words.
    """
    mean, error = mean_and_error([window[of] for window in scores])
    per_unit = sum(window[of].numel() for window in scores) / units
    value = math.exp(min(mean * per_unit, _LARGEST))
    error = value * error * per_unit if error is not None else math.inf
    return value, error if math.isfinite(error) else None


def summarize(scores: Sequence[Scores], units: int) -> dict[str, Any]:
    """The figures of one model, or of one beside its baseline, in plain values; of divergences in nats.

    Where they were compared: "perplexity_ratio" to the baseline's; "kl_mean", "kl_median", "kl_p99", "kl_max";
    "top1_agreement"; "rms_dp", the root of the mean squared change of the probability given to the true token; and
    "kl_mean_bound" with "kl_token_bound": how far a kl_mean, and a single token's, may be off for being sampled (0
    where nothing is). "windows" are the sums of each, from which two runs on the same tokens can be compared.
    """
    value, error = perplexity(scores, units)
    found: dict[str, Any] = {"perplexity": value, "perplexity_se": error}
    by_window = {"tokens": [window["nll"].numel() for window in scores], "nll": _sums(scores, "nll")}
    if "kl" in scores[0]:
        found |= _compared(scores, units)
        by_window |= {"baseline_nll": _sums(scores, "baseline_nll"), "kl": _sums(scores, "kl")}
    return found | {"windows": by_window}


def _sums(scores: Sequence[Scores], name: str) -> list[float]:
    return [window[name].double().sum().item() for window in scores]


def _compared(scores: Sequence[Scores], units: int) -> dict[str, Any]:
    kl = torch.cat([window["kl"] for window in scores]).double()
    median, p99 = np.quantile(kl.numpy(), [0.5, 0.99]).tolist()
    variance = torch.cat([w.get("kl_variance", torch.zeros_like(w["kl"])) for w in scores]).double()
    changes = [window["nll"].double() - window["baseline_nll"].double() for window in scores]
    ratio, ratio_error = perplexity([{"nll": change} for change in changes], units)
    squares = [((-w["nll"].double()).exp() - (-w["baseline_nll"].double()).exp()).square() for w in scores]
    dp, dp_error = mean_and_error(squares)
    rms = math.sqrt(dp)
    baseline, baseline_error = perplexity(scores, units, "baseline_nll")
    mean, error = mean_and_error([window["kl"] for window in scores])
    same, same_error = mean_and_error([window["same"] for window in scores])
    return {
        "baseline_perplexity": baseline,
        "baseline_perplexity_se": baseline_error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio_error,
        "kl_mean": mean,
        "kl_mean_se": error,
        "kl_median": median,
        "kl_p99": p99,
        "kl_max": kl.max().item(),
        "kl_mean_bound": _BOUND * variance.sum().sqrt().item() / kl.numel(),
        "kl_token_bound": _BOUND * variance.max().sqrt().item(),
        "top1_agreement": same,
        "top1_agreement_se": same_error,
        "rms_dp": rms,
        # d sqrt(x) = dx / (2 sqrt(x))
        "rms_dp_se": None if dp_error is None else dp_error / (2 * rms) if rms else 0.0,
    }
