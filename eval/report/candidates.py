"""One run as a candidate for a choice, and how two differ."""

from dataclasses import dataclass, field

SURE = 2.0  # standard errors beyond which two runs differ


@dataclass(frozen=True)
class Difference:
    """How much larger the KL of `run` is than that of `other`, in nats, with the standard error of the difference."""

    run: str
    other: str
    difference: float
    standard_error: float | None

    @property
    def differ(self) -> bool | None:
        """None for a single window, of which nothing can be told."""
        return None if self.standard_error is None else abs(self.difference) > SURE * self.standard_error


@dataclass(frozen=True)
class Candidate:
    """One run in plain figures: sizes in bytes, speed in tokens per second; None for what was not measured."""

    run: str
    baseline: bool
    scheme: str
    method: str | None
    format: str | None
    file_bytes: float | None
    memory_bytes: float | None
    bits_per_weight: float | None
    kl_mean: float | None
    kl_mean_se: float | None
    perplexity: float | None
    top1_agreement: float | None
    decode: tuple[float, float, float] | None
    missed_gates: list[str]
    fronts: list[str] = field(default_factory=list)
    next_better: Difference | None = None
