"""The report's figures, drawn by matplotlib."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..measure.statistics import finite
from .comparison import front
from .runs import ReportedRun, SpeedPoint
from .svg import COLOURS, FONT, INK, STYLE, WIDTH, Drawing, Point, clean, grid, label_points, log_if_wide, unit_of

MARKERS = "osD^vPX<>h"
SHALLOW = 12  # blocks that lines can show
LARGE = 4.8  # inches; a phone's letters are then 9 px high
Series = Mapping[str, Mapping[int, float]]  # kind of a layer, or of an error -> block -> relative error


@dataclass(frozen=True)
class Bar:
    """One measured speed (tokens per second) with its spread."""

    label: str
    value: float
    low: float
    high: float
    note: str
    verdict: str  # baseline, faster, slower or same


def model_figures(runs: Sequence[ReportedRun], points: Mapping[SpeedPoint, str]) -> list[tuple[str, Drawing]]:
    """(caption, drawing) of each plot of one model's runs; what was not measured is not drawn.

    Args:
        points: the loads at which speed was measured, with their names.
    """
    drawn = []
    quantized = [run for run in runs if not run.is_baseline]
    losses = [
        Point(run.label, bits, kl)
        for run in quantized
        if finite(bits := run.get("size", "bits_per_weight", "decoder")) and finite(kl := run.get("quality", "kl_mean"))
    ]
    if losses:
        caption = (
            "KL against bits per weight; best is the lower left corner. KL: how far the predictions of the next token "
            "moved from the unquantized model's, in nats; 0 is not at all. Bits: of the decoder blocks, with scales "
            "and zero points. Filled and joined: no other run is better in both."
        )
        members = front({point.label: (point.x, point.y) for point in losses})
        bits = ("bits per weight", "bits per weight in the decoder blocks, fewer is better", 1.0)
        drawn.append((caption, replace(front_plot(losses, members, bits, LARGE), large=True)))
    sizes = [
        Point(run.label, size, perplexity, run.is_baseline)
        for run in runs
        if finite(size := run.get("size", "file_bytes")) and finite(perplexity := run.get("quality", "perplexity"))
    ]
    if sizes:
        caption = "Perplexity against file size. Best is the lower left corner; the open circle is the baseline."
        drawn.append((caption, size_plot(sizes)))
    for run in runs:
        if chosen := run.get("budget"):
            every = [Point("", point["bits"], point["predicted_kl"]) for point in chosen["curve"]]
            every += [Point(each["choice"], each["bits"], each["predicted_kl"]) for each in chosen["uniform"]]
            every += [Point(f"{chosen['budget']}, measured", chosen["bits"], chosen["measured_kl"], True)]
            caption = (
                f"{run.label}: predicted KL against bits per weight. The line joins the best choices; other points "
                "have one scheme everywhere; the open circle is the chosen model, measured on the same tokens."
            )
            drawn.append((caption, budget_plot(every)))
    drawn += _error_figures(quantized)
    if points:
        caption = (
            "Speed, with the ratio to the baseline: blue is faster, orange slower, grey the same within the "
            "spread of the repeats (the thin line on each bar). The dashed line is the baseline."
        )
        rows = [(name, _speeds(runs, p, "prefill"), _speeds(runs, p, "decode")) for p, name in points.items()]
        drawn.append((caption, speed_plot(rows)))
    return drawn


def _error_figures(runs: Sequence[ReportedRun]) -> list[tuple[str, Drawing]]:
    """Errors by depth, a panel for each run and one scale for all of them: of the layers' outputs where they were
    measured, else of their weights."""
    maps, depths, weights, calibrated = (dict[str, Series]() for _ in range(4))
    for run in runs:
        outputs = [
            {**layer, "relative_error": layer["output_error"]}
            for layer in run.get("output_errors", "layers") or []
            if finite(layer["output_error"]) and layer["block"] is not None
        ]
        layers = [
            layer
            for layer in run.get("coverage", "layers") or []
            if finite(layer.get("relative_error")) and layer.get("block") is not None  # lm_head has no depth
        ]
        if outputs:
            maps[run.label] = _errors_by_kind(outputs)
            blocks = [block for block in run.get("output_errors", "blocks") if finite(block["output_error"])]
            if len(blocks) > 1:
                depths[run.label] = {
                    name: {block["block"]: block[key] for block in blocks if finite(block[key])}
                    for name, key in (("by itself", "output_error"), ("with what it inherits", "cumulative_error"))
                }
        elif layers and all(finite(layer.get("output_error")) for layer in layers):
            # a calibrated method keeps this error small, not that of the weights
            calibrated[run.label] = _errors_by_kind([{**x, "relative_error": x["output_error"]} for x in layers])
        elif layers:
            weights[run.label] = _errors_by_kind(layers)
    panels = [
        ("Relative error of each layer's outputs, on the unquantized model's inputs", maps, True),
        ("Relative error of each block's output: by itself, and with what it inherits", depths, False),
        ("Relative error of the quantized layers", weights, None),
        ("Relative error of the quantized layers' outputs on the calibration tokens", calibrated, None),
    ]
    return [
        (f"{words}, by depth{'; one scale for all runs' if len(own) > 1 else ''}.", error_plot(own, as_map))
        for words, own, as_map in panels
        if own
    ]


def size_plot(points: Sequence[Point]) -> Drawing:
    """Perplexity against file size, every point labelled; lower left is better."""
    unit, divisor = unit_of([p.x for p in points])
    points = [replace(point, x=point.x / divisor) for point in points]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9 + 0.1 * max(0, len(points) - 8)), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            colour = INK if point.baseline else COLOURS[0]
            face = "none" if point.baseline else colour
            axes.plot(point.x, point.y, "o", ms=6, mec=colour, mfc=face)
            if point.baseline:
                axes.axhline(point.y, color=INK, alpha=0.35, lw=0.8, ls=(0, (4, 3)))
        log_if_wide(axes, [p.y for p in points])
        axes.margins(0.14, 0.16)
        axes.set_xlabel(f"file size ({unit}), smaller is better")
        axes.set_ylabel("perplexity, lower is better")
        grid(axes)
        figure.draw_without_rendering()  # settles the layout: only then data coordinates have a place on the page
        label_points(axes, points)
        return Drawing(figure, "perplexity against file size")


def budget_plot(points: Sequence[Point]) -> Drawing:
    """Mean KL against bits per weight: points without a label are joined, the others are named."""
    curve, named = [point for point in points if not point.label], [point for point in points if point.label]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([p.x for p in curve], [p.y for p in curve], "o-", ms=3, color=COLOURS[0], lw=1.2)
        for point in named:
            colour = INK if point.baseline else COLOURS[1]
            axes.plot(point.x, point.y, "o", ms=6, mec=colour, mfc="none" if point.baseline else colour)
        log_if_wide(axes, [point.y for point in points])
        axes.margins(0.14, 0.16)
        axes.set_xlabel("bits per weight of the layers that have a choice")
        axes.set_ylabel("mean KL (nats), lower is better")
        grid(axes)
        figure.draw_without_rendering()
        label_points(axes, named)
        return Drawing(figure, "mean KL against bits per weight")


def front_plot(
    points: Sequence[Point], members: Collection[str], quantity: tuple[str, str, float], width: float = WIDTH
) -> Drawing:
    """Divergence from the unquantized model against size or speed; the Pareto front is filled and joined.

    Args:
        points: y is a mean KL, in nats. A baseline's is 0, so a dashed line at its x stands for it.
        members: labels of the points on the front.
        quantity: what x is: its name for a screen reader, the axis' label, and the number that x is divided by.
        width: inches.
    """
    name, words, divisor = quantity
    points = [replace(point, x=point.x / divisor) for point in points]
    runs = [point for point in points if not point.baseline]
    best = sorted((point for point in runs if point.label in members), key=lambda point: (point.x, point.y))
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(width, 2.9 + 0.3 * (width > WIDTH) + 0.1 * max(0, len(runs) - 8)), layout="constrained"
        )
        axes = figure.add_subplot()
        axes.plot([p.x for p in best], [p.y for p in best], color=COLOURS[0], lw=1.2, alpha=0.6)
        for point in runs:
            colour = COLOURS[0] if point.label in members else COLOURS[-1]
            axes.plot(point.x, point.y, "o", ms=6, mec=colour, mfc=colour if point.label in members else "none")
        for point in points:
            if point.baseline:
                axes.axvline(point.x, color=INK, alpha=0.35, lw=0.8, ls=(0, (4, 3)))
        log_if_wide(axes, [point.y for point in runs])
        axes.margins(0.14, 0.16)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(words)
        axes.set_ylabel("mean KL (nats), lower is better")
        grid(axes)
        figure.draw_without_rendering()
        label_points(axes, runs)
        return Drawing(figure, f"mean KL against {name}")


def programs_plot(series: Mapping[str, Sequence[tuple[str, float, float, bool]]]) -> Drawing:
    """Divergence from the unquantized model against bits per weight, each program with a colour and a marker.

    Args:
        series: program -> its rows: label, bits per weight, mean KL in nats, and whether it is on the program's front.
    """
    points = [Point(label, x, y) for rows in series.values() for label, x, y, _ in rows]
    with mpl.rc_context(STYLE):
        lines = math.ceil(len(series) / 3)
        figure = Figure(figsize=(LARGE, 3.4 + 0.19 * lines + 0.05 * max(0, len(points) - 8)), layout="constrained")
        axes = figure.add_subplot()
        for index, (program, rows) in enumerate(series.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            best = sorted((x, y) for _, x, y, member in rows if member)
            axes.plot([x for x, _ in best], [y for _, y in best], color=colour, lw=1.2, alpha=0.6)
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5.5, "ls": ""}
            axes.plot([x for _, x, _, _ in rows], [y for _, _, y, _ in rows], label=clean(program, 22), **style)
        log_if_wide(axes, [point.y for point in points])
        axes.margins(0.18, 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("bits per weight, all bytes; fewer is better")
        axes.set_ylabel("mean KL (nats), lower is better")
        grid(axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=FONT - 1, handlelength=1.2)
        figure.draw_without_rendering()
        label_points(axes, points)
        return Drawing(figure, "mean KL against bits per weight, by program")


def error_plot(runs: Mapping[str, Series], as_map: bool | None = None) -> Drawing:
    """Relative error by depth, a panel for each run, all on one scale: a line, or a row of colours, for each kind of
    projection.

    Args:
        as_map: colours; None for colours where a model is too deep for lines.
    """
    if as_map is None:
        as_map = any(len(by_block) > SHALLOW for series in runs.values() for by_block in series.values())
    worst = 100 * max(error for series in runs.values() for by_block in series.values() for error in by_block.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        if as_map:
            heights = [0.45 + 0.24 * len(series) for series in runs.values()]
            figure.set_figheight(0.85 + sum(heights))
        else:
            kinds = max(map(len, runs.values()))
            heights = [2.0 if len(runs) == 1 else 1.6] * len(runs)
            figure.set_figheight(0.5 + sum(heights) + 0.19 * math.ceil(kinds / 3))
        panels = figure.subplots(len(runs), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        mesh = None
        for axes, (label, series) in zip(panels, runs.items(), strict=True):
            if len(runs) > 1:
                axes.set_title(clean(label, 40), loc="left")
            if as_map:
                mesh = _error_map(axes, series, worst)
            else:
                _error_lines(axes, series, worst)
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        panels[-1].set_xlabel("decoder block, first to last")
        if mesh is not None:
            figure.colorbar(mesh, ax=list(panels), location="bottom", label="relative error (%)", aspect=32, pad=0.02)
        else:
            legend = {"frameon": False, "fontsize": FONT - 1, "columnspacing": 1.0, "handlelength": 1.6}
            most = max(panels, key=lambda axes: len(axes.get_lines()))
            figure.legend(handles=most.get_lines(), loc="outside lower center", ncols=3, **legend)
        return Drawing(figure, "relative error by depth")


def _error_lines(axes: Axes, series: Series, worst: float) -> None:
    for index, (kind, by_block) in enumerate(series.items()):
        blocks = sorted(by_block)
        axes.plot(
            blocks,
            [100 * by_block[b] for b in blocks],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            ms=4.5,
            lw=1.2,
            ls="-" if index < len(COLOURS) else "--",
            label=clean(kind, 22),
        )
    axes.set_ylim(0, 1.1 * worst or 1.0)  # the highest marker stays whole
    axes.set_ylabel("relative error (%)")
    grid(axes)


def _error_map(axes: Axes, series: Series, worst: float) -> Any:
    blocks = range(max(max(by_block) for by_block in series.values()) + 1)
    cells = [[100 * by_block.get(block, math.nan) for block in blocks] for by_block in series.values()]
    # Few colours: they can be told apart, and matplotlib would draw a finer scale as a bitmap.
    colours = mpl.colormaps["viridis"].resampled(10)
    rows = range(len(series))
    mesh = axes.pcolormesh(
        blocks, rows, cells, cmap=colours, vmin=0, vmax=worst or 1.0, edgecolor="face", linewidth=0.2
    )
    axes.set_yticks(rows, [clean(kind, 16) for kind in series])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return mesh


def _errors_by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """{"q_proj": {block: worst error}}, with a longer name where the last part of it is ambiguous."""
    kinds = [re.sub(r"(?<=\.)\d+(?=\.)", "*", re.split(r"\.\d+\.", x["name"], maxsplit=1)[-1]) for x in layers]
    last = Counter(kind.rpartition(".")[2] for kind in set(kinds))
    series: dict[str, dict[int, float]] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        short = kind.rpartition(".")[2]
        worst = series.setdefault(short if last[short] == 1 else kind, {})
        worst[layer["block"]] = max(layer["relative_error"], worst.get(layer["block"], 0.0))
    return series


def speed_plot(rows: Sequence[tuple[str, Sequence[Bar], Sequence[Bar]]]) -> Drawing:
    """Tokens per second: one row of panels for each load (its title, prefill bars, decode bars)."""
    with mpl.rc_context(STYLE):
        heights = [0.2 * max(len(prefill), len(decode)) + 0.6 for _, prefill, decode in rows]
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
        for row, (title, prefill, decode) in enumerate(rows):
            for column, (phase, bars) in enumerate((("prefill", prefill), ("decode", decode))):
                axes = figure.add_subplot(grid[row, column])
                axes.set_title(f"{phase}, {clean(title, 24)}", loc="left")
                _bars(axes, bars, named=column == 0)
        figure.supxlabel("tokens per second, more is better", fontsize=FONT)
        return Drawing(figure, "speed of prefill and decode, tokens per second")


def _speeds(runs: Sequence[ReportedRun], point: SpeedPoint, phase: str) -> list[Bar]:
    bars = []
    for run in runs:
        if speed := run.speed(point, phase):
            ratio, verdict = run.speed_against(point, phase)
            short = f"{speed[0] / 1000:.3g}k" if speed[0] >= 1000 else f"{speed[0]:.3g}"
            note = short if ratio is None else f"{ratio:.2f}x"
            bars.append(Bar(run.label, *speed, note, "baseline" if run.is_baseline else verdict))
    return bars


def _bars(axes: Axes, bars: Sequence[Bar], named: bool) -> None:
    """Horizontal bars, the first on top: each with its spread as a line, and its note at the right."""
    colours = {"baseline": INK, "same": COLOURS[-1], "faster": COLOURS[0], "slower": COLOURS[1]}
    top = max((bar.high for bar in bars), default=1.0) or 1.0
    for index, bar in enumerate(bars):
        alpha = 0.45 if bar.verdict == "baseline" else 1.0
        axes.barh(index, bar.value, height=0.7, color=colours[bar.verdict], alpha=alpha, lw=0)
        axes.plot([bar.low, bar.high], [index, index], color=INK, lw=1)
        # The notes have a column of their own, so they collide with nothing.
        axes.text(1.6 * top, index, bar.note, va="center", ha="right", fontsize=FONT - 1)
        if bar.verdict == "baseline":
            axes.axvline(bar.value, color=INK, alpha=0.35, lw=0.8, ls=(0, (4, 3)))
    axes.set_xlim(0, 1.6 * top)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [clean(bar.label, 16) for bar in bars] if named else [""] * len(bars))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    divisor, unit = (1000, "k") if top >= 5000 else (1, "")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / divisor:g}{unit if x else ''}"))
    axes.spines["left"].set_visible(False)
