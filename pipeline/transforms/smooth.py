"""SmoothQuant (arXiv 2211.10438): what is hard to round in a layer's inputs moves into its weights."""

from collections.abc import Iterator

from torch import Tensor

from .scaling import InputRange, Scaling

_ALPHAS = tuple(step / 20 for step in range(4, 20))
_SMALLEST = 1e-5  # as in the paper's code: a channel that is never used gets no scale of zero


class Smooth(Scaling):
    """Scales s = max|X|^alpha / max|W|^(1 - alpha) per input channel (equation 4), alpha the best for each group."""

    name = "smooth"
    rank = 10
    version = 2
    about = "moves what is hard to round in a layer's inputs into its weights; for schemes that quantize inputs"

    def propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        largest, weights = inputs.largest.clamp(min=_SMALLEST), weights.clamp(min=_SMALLEST)
        for alpha in _ALPHAS:
            yield f"alpha {alpha:.2f}", largest.pow(alpha) / weights.pow(1 - alpha)


PLUGINS = (Smooth(),)
