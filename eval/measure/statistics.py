"""Scores of tokens -> the figures of a report, each with its standard error.

Tokens of one window share their context, so their scores are not independent. Windows nearly are. Each error is
therefore the error of a mean over clusters (Cochran, Sampling Techniques, 3rd ed., 9A.1, the ratio estimator). With
the sum S_w over the T_w tokens of window w, the mean m = sum S / sum T, and W windows,

    error = sqrt(W / (W - 1) * sum (S_w - m T_w)^2) / sum T

Figures that compare two models are sums of differences, token by token: both models read the same tokens. The spread
of the text itself is many times larger than the spread of the differences, and it cancels. Such errors are called
paired.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scores import Scores

_LARGEST = 700.0  # exp of a larger number is no float
_BOUND = 4.0  # standard deviations: a normal sampling error is larger once in 16,000 times


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def mean_and_error(values: Sequence[Tensor]) -> tuple[float, float | None]:
    """Mean over all values of all windows, and its standard error; None for the error of a single window.

    Args:
        values: for each window a tensor with one value per token.
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
    """The figures of one model, or of a model beside its baseline, as plain values. Divergences are in nats.

    Returns:
        "perplexity" with "perplexity_se", and "windows": the sums of each window, from which two runs on the same
        tokens can be compared later. Beside a baseline also "perplexity_ratio" to the baseline's; "kl_mean",
        "kl_median", "kl_p99", "kl_max"; "top1_agreement"; "rms_dp", the root of the mean squared change of the
        probability of the true token; and "kl_mean_bound" and "kl_token_bound": the largest error that the sampling of
        stored predictions may have put into kl_mean and into the KL of one token (0 where nothing was sampled).
    """

    def sums(name: str) -> list[float]:
        return [window[name].double().sum().item() for window in scores]

    value, error = perplexity(scores, units)
    figures: dict[str, Any] = {"perplexity": value, "perplexity_se": error}
    windows = {"tokens": [window["nll"].numel() for window in scores], "nll": sums("nll")}
    if "kl" not in scores[0]:
        return figures | {"windows": windows}
    windows |= {"baseline_nll": sums("baseline_nll"), "kl": sums("kl")}
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
    figures |= {
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
    return figures | {"windows": windows}
