"""What every transform is: it makes a block's tensors easier to quantize, and changes nothing of what they compute."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..methods.base import BlockView


@dataclass(frozen=True)
class Transformed:
    """What a transform did for one group of layers that read the same input.

    layers: their names in the files. before, after: how far quantizing these layers alone moves the block's outputs,
    without and with the transform (see BlockView.error). note: how it was done, or why not.
    """

    layers: tuple[str, ...]
    before: float
    after: float
    note: str


class Transform(Protocol):
    """A step before the methods.

    rank: as of methods. version: goes up whenever the same input would give other bytes.
    about: what it does and for which schemes, in one sentence for `bitpress list`.
    solves: how often, at most, each layer is quantized by its method to judge what becomes of it; for plans of time.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    version: ClassVar[int]
    about: ClassVar[str]
    solves: ClassVar[int]

    def transform(self, block: BlockView) -> list[Transformed]:
        """Change the block; returns a line for each group of layers that it looked at."""
        ...
