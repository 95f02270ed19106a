"""A comparison as a page: one HTML file, Markdown, and JSON, all with the same figures."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from . import render
from . import words as say
from .candidates import SURE
from .comparison import Section
from .figures import front_plot
from .runs import circumstances
from .svg import Point, unit_of
from .tables import recipe_table
from .words import DASH

FORMAT_VERSION = 1


def plain(sections: Sequence[Section]) -> dict[str, Any]:
    """All figures as JSON: sizes in bytes, KL in nats, speeds in tokens per second [median, lowest, highest]."""
    models = [
        {
            "model": section.model,
            "windows": section.windows,
            "context": section.context,
            "notes": section.notes,
            "protocol": section.reported[0].get("protocol"),
            "decode_load": section.load,
            "runs": [asdict(run) for run in section.runs],
            "differences": [{**asdict(pair), "differ": pair.differ} for pair in section.differences],
            "choices": [asdict(choice) for choice in section.choices],
        }
        for section in sections
    ]
    return {"format_version": FORMAT_VERSION, "standard_errors": SURE, "models": models}


def markdown(sections: Sequence[Section]) -> str:
    """The comparison as Markdown for a pull request, without the plots."""
    return render.markdown("compare", _view(sections))


def html(sections: Sequence[Section]) -> str:
    """The comparison for a browser: one file that needs no other and no network."""
    return render.html("compare", {**_view(sections), "figures_of": _figures})


def _view(sections: Sequence[Section]) -> dict[str, Any]:
    reported = [run for section in sections for run in section.reported]
    quantized = sum(not run.baseline for section in sections for run in section.runs)
    rounded = any(run.kernel_kl_mean is not None for section in sections for run in section.runs)
    return {
        "title": sections[0].model if len(sections) == 1 else f"{len(sections)} models",
        "quantized": f"{quantized} quantized run{'' if quantized == 1 else 's'}",
        "sections": [(section, *table(section), _significance(section)) for section in sections],
        "external": [run.title for run in reported if run.get("checkpoint")],
        "kernel_kl": say.KERNEL_KL if rounded else "",
        "recipes": recipe_table(reported),
        **circumstances(reported),
    }


def table(section: Section) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Header, and rows with whether each is a baseline."""
    gates = any(run.missed_gates for run in section.runs)
    kernel = any(run.kernel_kl_mean is not None for run in section.runs)
    header = ["run", "method/format", "mean KL"] + ["KL added by the kernel"] * kernel
    header += ["KL above the next better run's", "memory", "file size", "bits/weight"]
    header += ["top-1", "perplexity", "decode tok/s", "Pareto front"] + ["gates"] * gates
    rows = []
    for run, reported in zip(section.runs, section.reported, strict=True):
        above = DASH
        if pair := run.next_better:
            difference, error = say.known(pair.difference, pair.standard_error)
            sign = "+" if pair.differ else "≈ +"
            above = f"{sign}{difference} ({f'± {error} ' if error else ''}to {pair.other})"
        row = [run.run, reported.method_and_format]
        row.append("0" if run.baseline else say.divergence(run.kl_mean, run.kl_mean_se))
        row += [say.divergence(run.kernel_kl_mean, run.kernel_kl_mean_se)] * kernel
        row += [above, say.size(run.memory_bytes), say.size(run.file_bytes), say.number(run.bits_per_weight)]
        row += [say.percent(run.top1_agreement), say.number(run.perplexity)]
        row += [say.count(run.decode and run.decode[0]), ", ".join(run.fronts) or DASH]
        row += [f"misses {', '.join(run.missed_gates)}" if run.missed_gates else DASH] * gates
        rows.append((row, run.baseline))
    return header, rows


def _significance(section: Section) -> list[str]:
    """Sentences that say which runs do not differ by more than chance."""
    known = [pair for pair in section.differences if pair.differ is not None]
    if not known:
        return ["Which runs differ by more than chance is not known: it takes two quantized runs on several windows."]
    alike = [
        f"{pair.run} and {pair.other} do not differ by more than {SURE:g} standard errors "
        f"(+{' ± '.join(say.known(pair.difference, pair.standard_error))})."
        for pair in known
        if not pair.differ
    ]
    rest = len(known) - len(alike)
    if not alike:
        pairs = "The two quantized runs differ" if rest == 1 else f"All {rest} pairs of quantized runs differ"
        return [f"{pairs} in KL by more than {SURE:g} standard errors."]
    return [*alike, f"The other {rest} pairs differ by more."] if rest else alike


def _figures(section: Section, ident: str) -> list[tuple[str, Markup, bool]]:
    """(caption, SVG, whether it is large): KL against size and against speed."""
    runs = [run for run in section.runs if run.kl_mean is not None]
    sizes = [Point(run.run, run.file_bytes, run.kl_mean or 0, run.baseline) for run in runs if run.file_bytes]
    speeds = [Point(run.run, run.decode[0], run.kl_mean or 0, run.baseline) for run in runs if run.decode]
    drawn = []
    for kind, points in (("size", sizes), ("speed", speeds)):
        if all(point.baseline for point in points):
            continue
        members = {run.run for run in section.runs if kind in run.fronts}
        if kind == "size":
            unit, one = unit_of([point.x for point in points])
            quantity, corner = ("file size", f"file size ({unit}), smaller is better", one), "lower left"
        else:
            quantity, corner = ("decode speed", f"decode tokens/s, {section.load}, more is better", 1.0), "lower right"
        caption = (
            f"KL against {quantity[0]}; best is the {corner} corner. Filled and joined: the Pareto front, those runs "
            "that no other beats in both. The dashed line is the baseline, whose KL is 0."
        )
        drawing = front_plot(points, members, quantity)
        drawn.append((caption, Markup(drawing.svg(f"{ident}-{kind}")), kind == "size"))
    return drawn
