"""Quality against size, ours and other programs': one table and one plot, as HTML, Markdown and JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from . import render
from . import words as say
from .comparison import front
from .figures import programs_plot
from .runs import terms_of
from .words import DASH

FORMAT_VERSION = 1
OWN = "bitpress"
_HEADER = (
    "recipe",
    "program",
    "bits/weight",
    "size",
    "mean KL",
    "KL to bitpress",
    "kernel's KL",
    "top-1",
    "perplexity",
)
_CAPTION = (
    "KL against bits per weight, all bytes counted; best is the lower left corner. Each line joins a program's Pareto "
    "front: those of its rows that no other of its rows beats in both."
)


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        recipe: as its program calls it. versions: of the program first, then of what it works with.
        nbytes: all bytes of its weights: embeddings, head, scales and zero points with them.
        bits_per_weight: 8 * nbytes / parameters of the unquantized model.
        kl_mean, kl_mean_se: in nats, from the unquantized model; with standard error.
        kernel_kl_mean: what the kernel's own rounding of inputs adds; None where kl_mean holds it, or nothing is added.
        perplexity_ratio: to the unquantized model's.
        seconds: {"quantize", "measure"}.
        notes: what makes its figures other than they seem.
        problem: why there are no figures.
    """

    program: str
    recipe: str
    versions: dict[str, str] = field(default_factory=dict)
    nbytes: int | None = None
    bits_per_weight: float | None = None
    kl_mean: float | None = None
    kl_mean_se: float | None = None
    kernel_kl_mean: float | None = None
    kernel_kl_mean_se: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.program} {self.recipe}"

    @property
    def point(self) -> tuple[float, float] | None:
        """(bits per weight, mean KL); None where it was not measured."""
        if self.bits_per_weight is None or self.kl_mean is None:
            return None
        return self.bits_per_weight, self.kl_mean


def program_front(rows: Sequence[Row], program: str) -> list[Row]:
    """The Pareto front of one program's rows, by bits per weight."""
    own = {row.recipe: row for row in rows if row.program == program and row.point}
    members = front({name: row.point for name, row in own.items() if row.point})
    return sorted((own[name] for name in members), key=lambda row: row.bits_per_weight or 0.0)


def at_equal_bytes(rows: Sequence[Row], row: Row) -> float | None:
    """A row's KL divided by that of bitpress's front at the same bits per weight: above 1, bitpress is better.

    Between two rows of the front the logarithm of the KL is interpolated. Above the largest, that one counts, which is
    smaller and so fits too. Below the smallest there is nothing to compare with: None.
    """
    points = [member.point for member in program_front(rows, OWN) if member.point]
    if row.program == OWN or row.point is None or not points or row.point[0] < points[0][0]:
        return None
    bits, kl = row.point
    own = points[-1][1]
    for (low, above), (high, below) in pairwise(points):
        if low <= bits < high:
            share = (bits - low) / (high - low)
            own = above ** (1 - share) * below**share if min(above, below) > 0 else above
    return kl / own if own > 0 else None


def plain(about: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """All figures as JSON: sizes in bytes, KL in nats."""
    listed = [{**asdict(row), "kl_to_bitpress": at_equal_bytes(rows, row)} for row in rows]
    return {"format_version": FORMAT_VERSION, **about, "rows": listed}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of all rows that were measured, from few bits to many."""
    measured = sorted((row for row in rows if row.point), key=lambda row: row.point or (0.0, 0.0))
    return list(_HEADER), [_cells(rows, row) for row in measured]


def markdown(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table, without the plot."""
    return render.markdown("quality", _view(about, rows))


def html(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Table and plot for a browser: one file that needs no other and no network."""
    view = _view(about, rows)
    drawn = []
    if any(row.point for row in rows):
        series = {
            program: [(row.recipe, *row.point, row in members) for row in rows if row.program == program and row.point]
            for program in dict.fromkeys(row.program for row in rows if row.point)
            for members in [program_front(rows, program)]
        }
        drawn.append((_CAPTION, Markup(programs_plot(series).svg("quality"))))
    return render.html("quality", {**view, "figures": drawn})


def _cells(rows: Sequence[Row], row: Row) -> list[str]:
    ratio = at_equal_bytes(rows, row)
    change = None if row.perplexity_ratio is None else say.increase(row.perplexity_ratio, 1.0)
    return [
        row.recipe,
        row.program,
        say.number(row.bits_per_weight),
        say.size(row.nbytes),
        say.divergence(row.kl_mean, row.kl_mean_se),
        DASH if ratio is None or not math.isfinite(ratio) else say.ratio(ratio),
        say.divergence(row.kernel_kl_mean, row.kernel_kl_mean_se),
        say.percent(row.top1_agreement),
        say.followed(say.number(row.perplexity), change),
    ]


def _view(about: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    about = say.printable(about)
    header, cells = table(rows)
    programs = {row.program: row.versions for row in rows if row.versions}
    took = [
        [row.recipe, row.program, *(say.seconds(row.seconds.get(key)) for key in ("quantize", "measure"))]
        for row in rows
        if row.seconds
    ]
    return say.printable(
        {
            "model": about["model"]["id"],
            "summary": _sentences(rows),
            "header": header,
            "rows": [(row, False) for row in cells],
            "absent": [(row.name, row.problem) for row in rows if row.problem],
            "notes": list(dict.fromkeys(f"{row.name}: {note}" for row in rows for note in row.notes)),
            "took": (["recipe", "program", "quantizing", "measuring"], took),
            "protocol": terms_of(about.get("protocol")),
            "calibration": terms_of(about.get("calibration")),
            "machine": terms_of(about.get("machine")),
            "programs": [
                (program, ", ".join(f"{name} {version}" for name, version in versions.items()))
                for program, versions in programs.items()
            ],
            "command": about.get("command") or DASH,
        }
    )


def _sentences(rows: Sequence[Row]) -> list[str]:
    """For each other program, how its rows compare with bitpress's front at equal bytes."""
    sentences = []
    for program in dict.fromkeys(row.program for row in rows if row.program != OWN and row.point):
        ratios = {row.recipe: r for row in rows if row.program == program and (r := at_equal_bytes(rows, row))}
        if not ratios:
            sentences.append(f"{program}: no row of it lies at a size that {OWN}'s front reaches.")
            continue
        worse = [recipe for recipe, ratio in ratios.items() if ratio < 1]
        span = " to ".join(dict.fromkeys(say.ratio(ratio) for ratio in (min(ratios.values()), max(ratios.values()))))
        ahead = f"; it is ahead with {', '.join(worse)}" if worse else ""
        sentences.append(f"{program}: its KL is {span} that of {OWN}'s front at the same bits{ahead}.")
    return sentences
