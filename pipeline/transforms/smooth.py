"""SmoothQuant (arXiv 2211.10438): what is hard to round in a layer's inputs moves into its weights."""

from collections.abc import Iterator

from torch import Tensor

from .scaling import InputRange, Scaling

_ALPHAS = tuple(step / 10 for step in range(2, 10))
_SMALLEST = 1e-5  # as in the paper's code: a channel that is never used gets no scale of zero


class Smooth(Scaling):
    """Scales s = max|X|^alpha / max|W|^(1 - alpha) per input channel (equation 4), alpha the best for each group.

    The mean of |X| is tried in place of its largest value, too. On SmolLM2-135M it left 0.78, 0.89 and 0.95 of the
    error of the block's outputs in down_proj of layers 24, 14 and 4, where few values are far above the others.
    """

    name = "smooth"
    rank = 10
    version = 4
    about = "moves what is hard to round in a layer's inputs into its weights; for schemes that quantize inputs"

    def propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        largest, weights = inputs.largest.clamp(min=_SMALLEST), weights.clamp(min=_SMALLEST)
        mean = inputs.mean.clamp(min=_SMALLEST)
        for alpha in _ALPHAS:
            yield f"alpha {alpha:.1f}", largest.pow(alpha) / weights.pow(1 - alpha)
            yield f"alpha {alpha:.1f} of the mean", mean.pow(alpha) / weights.pow(1 - alpha)


PLUGINS = (Smooth(),)
