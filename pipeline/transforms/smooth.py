"""SmoothQuant (arXiv 2211.10438): what is hard to round in a layer's inputs moves into its weights."""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..methods.base import BlockView
from .base import Transformed
from .scaling import InputRange, search_scales

_ALPHAS = tuple(step / 20 for step in range(4, 20))
_SMALLEST = 1e-5  # as in the paper's code: a channel that is never used gets no scale of zero


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Smooth:
    """Scales s = max|X|^alpha / max|W|^(1 - alpha) per input channel (equation 4).

    alpha: how much of the difficulty moves into the weights; 0 chooses the best for each group of layers.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0

    name: ClassVar[str] = "smooth"
    rank: ClassVar[int] = 10
    version: ClassVar[int] = 1
    about: ClassVar[str] = (
        "moves what is hard to round in a layer's inputs into its weights; for schemes that quantize inputs"
    )

    def transform(self, block: BlockView) -> list[Transformed]:
        return search_scales(block, self._propose)

    def _propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        largest, weights = inputs.largest.clamp(min=_SMALLEST), weights.clamp(min=_SMALLEST)
        for alpha in (self.alpha,) if self.alpha else _ALPHAS:
            yield f"alpha {alpha:.2f}", largest.pow(alpha) / weights.pow(1 - alpha)


PLUGINS = (Smooth(),)
