"""AWQ (arXiv 2306.00978): weights that meet large inputs are scaled up before they are rounded, and lose less."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..methods.base import BlockView
from .base import Transformed
from .scaling import InputRange, search_scales

_EXPONENTS = tuple(step / 20 for step in range(1, 21))
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Awq:
    """Scales s = mean|X|^alpha per input channel, alpha the best for each group of layers (equation 5)."""

    name: ClassVar[str] = "awq"
    rank: ClassVar[int] = 20
    version: ClassVar[int] = 1
    about: ClassVar[str] = (
        "scales weights that meet large inputs up before they are rounded; for schemes that leave inputs alone"
    )

    def transform(self, block: BlockView) -> list[Transformed]:
        return search_scales(block, self._propose)

    def _propose(self, inputs: InputRange, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        mean = inputs.mean.clamp(min=_SMALLEST)
        for alpha in _EXPONENTS:
            yield f"alpha {alpha:.2f}", mean.pow(alpha)


PLUGINS = (Awq(),)
