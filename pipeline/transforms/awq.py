"""AWQ (arXiv 2306.00978): weights that meet large inputs are scaled up before they are rounded, and lose less."""

from collections.abc import Iterator

from torch import Tensor

from .scaling import InputRange, Scaling

_ALPHAS = tuple(step / 20 for step in range(1, 21))
_SMALLEST = 1e-4


class Awq(Scaling):
    """Scales s = mean|X|^alpha per input channel, alpha the best for each group of layers (equation 5)."""

    name = "awq"
    rank = 20
    version = 3
    solves = 3  # unscaled, and with what either figure chooses
    about = "scales weights that meet large inputs up before they are rounded; for schemes that leave inputs alone"

    def propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        mean = inputs.mean.clamp(min=_SMALLEST)
        for alpha in _ALPHAS:
            yield f"alpha {alpha:.2f}", mean.pow(alpha)


PLUGINS = (Awq(),)
