"""What of a model runs in one call, and what trials of it showed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# What a model may raise that is called in another way than its own code would call it.
FAILURES = (TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Fusing:
    """How many of the model's `of` decoder layers run in one call. why: reason against it -> number of layers.

    apart: why all layers together do not run in one call, though each does; None if they do, or some layers do not.
    around: why the embedding and the head do not run in that call; None if they do, or there is no such call.
    """

    fused: int
    of: int
    why: dict[str, int]
    apart: str | None = None
    around: str | None = None


class Unfit(Exception):
    """Why a part of a model, or its `generate`, is left as it is."""


class Trials:
    """What trials of a model's parts showed. What is known from the same weights and programs is not tried again.

    Attributes:
        outcomes: trial -> why not, None where all agreed.
    """

    def __init__(self, known: Mapping[str, str | None] | None = None):
        self.outcomes = dict(known or {})

    def run(self, name: str, trial: Callable[[], None]) -> None:
        """Raises Unfit where the trial does, or did."""
        if name not in self.outcomes:
            try:
                trial()
            except Unfit as reason:
                self.outcomes[name] = str(reason)
                raise
            self.outcomes[name] = None
        elif (why := self.outcomes[name]) is not None:
            raise Unfit(why)
