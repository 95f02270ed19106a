"""How much a model depends on the special tokens that begin a text."""

import math

import torch
from torch import Tensor, nn

from .protocols import Window
from .scores import score

_TOKENS = 256  # of the text: enough to tell a model that predicts something from one that does not
TENFOLD = 10.0


def bos_effect(model: nn.Module, start: Tensor, ids: Tensor) -> dict[str, float] | None:
    """{"with", "without"}: the perplexity of a piece of text after `start`, and with nothing before it, on the same
    tokens; None for a text of fewer than two tokens.

    Args:
        start, ids: int64 [n], on the model's device; the text's tokens without those that begin it.
    Raises:
        ValueError: the model gives NaN.
    """
    ids = ids[:_TOKENS]
    if ids.numel() < 2:
        return None
    windows = {"with": Window(torch.cat([start, ids]), ids[1:], start.numel()), "without": Window(ids, ids[1:], 0)}
    losses = {name: score(model, [window])[0]["nll"].double().mean().item() for name, window in windows.items()}
    return {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()}


def bos_warning(effect: dict[str, float], begin: bool) -> str | None:
    """A sentence where the two perplexities differ tenfold or more; None where they do not.

    Args:
        begin: whether the windows that were measured begin with BOS.
    """
    ratio = effect["without"] / effect["with"]
    if 1 / TENFOLD < ratio < TENFOLD:
        return None
    figures = f"its perplexity on a piece of text is {effect['with']:.3g} after BOS, {effect['without']:.3g} without"
    if begin == (ratio > 1):
        return f"this model depends on BOS: {figures}; the windows begin as it needs them"
    change = "bos: every" if ratio > 1 else "bos: first"
    return f"this model depends on BOS, and the windows do not begin as it needs them: {figures}; set eval.{change}"
