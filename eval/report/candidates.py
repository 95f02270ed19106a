"""One run as a candidate for a choice, and the difference of two."""

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
        """Whether they differ by more than chance; None for a single window, which has no standard error."""
        return None if self.standard_error is None else abs(self.difference) > SURE * self.standard_error


@dataclass(frozen=True)
class Candidate:
    """One run in plain figures: sizes in bytes, KL in nats, speed in tokens per second; None for what was not measured.

    kl_mean belongs to the file; kernel_kl_mean is what the kernel's rounding of inputs adds to it. decode: median,
    lowest, highest.
    """

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
    kernel_kl_mean: float | None
    kernel_kl_mean_se: float | None
    perplexity: float | None
    top1_agreement: float | None
    decode: tuple[float, float, float] | None
    missed_gates: list[str]
    fronts: list[str] = field(default_factory=list)
    next_better: Difference | None = None
