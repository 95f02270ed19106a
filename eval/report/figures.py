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
from .runs import ReportedRun, SpeedPoint
from .svg import COLOURS, FONT, INK, STYLE, WIDTH, Drawing, Point, clean, grid, label_points, log_if_wide, unit_of

MARKERS = "osD^vPX<>h"
SHALLOW = 12  # blocks that lines can show


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
        drawn += _error_figures(run)
    if points:
        caption = (
            "Speed, with the ratio to the baseline: blue is faster, orange slower, grey the same within the "
            "spread of the repeats (the thin line on each bar). The dashed line is the baseline."
        )
        rows = [(name, _speeds(runs, p, "prefill"), _speeds(runs, p, "decode")) for p, name in points.items()]
        drawn.append((caption, speed_plot(rows)))
    return drawn


def _error_figures(run: ReportedRun) -> list[tuple[str, Drawing]]:
    """Errors by depth: of the layers' outputs where they were measured, else of their weights."""
    outputs = [
        {**layer, "relative_error": layer["output_error"]}
        for layer in run.get("output_errors", "layers") or []
        if finite(layer["output_error"]) and layer["block"] is not None
    ]
    if outputs:
        caption = f"{run.label}: relative error of each layer's outputs, on the unquantized model's inputs."
        drawn = [(caption, error_plot(outputs, as_map=True))]
        blocks = [block for block in run.get("output_errors", "blocks") if finite(block["output_error"])]
        caption = f"{run.label}: relative error of each block's output: by itself, and with what it inherits."
        return [*drawn, (caption, depth_plot(blocks))] if len(blocks) > 1 else drawn
    layers = [
        layer
        for layer in run.get("coverage", "layers") or []
        if finite(layer.get("relative_error")) and layer.get("block") is not None  # lm_head has no depth
    ]
    if not layers:
        return []
    measured = "relative error of the quantized layers"
    if all(finite(layer.get("output_error")) for layer in layers):  # a calibrated method keeps this error small
        layers = [{**layer, "relative_error": layer["output_error"]} for layer in layers]
        measured = "relative error of the quantized layers' outputs"
    return [(f"{run.label}: {measured}, by depth.", error_plot(layers))]


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


def front_plot(points: Sequence[Point], members: Collection[str], quantity: tuple[str, str, float]) -> Drawing:
    """Divergence from the unquantized model against size or speed; the Pareto front is filled and joined.

    Args:
        points: y is a mean KL, in nats. A baseline's is 0, so a dashed line at its x stands for it.
        members: labels of the points on the front.
        quantity: what x is: its name for a screen reader, the axis' label, and the number that x is divided by.
    """
    name, words, divisor = quantity
    points = [replace(point, x=point.x / divisor) for point in points]
    runs = [point for point in points if not point.baseline]
    best = sorted((point for point in runs if point.label in members), key=lambda point: (point.x, point.y))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9 + 0.1 * max(0, len(runs) - 8)), layout="constrained")
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
        figure = Figure(figsize=(WIDTH, 3.2 + 0.19 * lines + 0.05 * max(0, len(points) - 8)), layout="constrained")
        axes = figure.add_subplot()
        for index, (program, rows) in enumerate(series.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            best = sorted((x, y) for _, x, y, member in rows if member)
            axes.plot([x for x, _ in best], [y for _, y in best], color=colour, lw=1.2, alpha=0.6)
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5.5, "ls": ""}
            axes.plot([x for _, x, _, _ in rows], [y for _, _, y, _ in rows], label=clean(program, 22), **style)
        log_if_wide(axes, [point.y for point in points])
        axes.margins(0.14, 0.12)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("bits per weight, all bytes; fewer is better")
        axes.set_ylabel("mean KL (nats), lower is better")
        grid(axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=FONT - 1, handlelength=1.2)
        figure.draw_without_rendering()
        label_points(axes, points)
        return Drawing(figure, "mean KL against bits per weight, by program")


def depth_plot(blocks: Sequence[Mapping[str, Any]]) -> Drawing:
    """Relative error of each decoder block's output: its own, and together with the errors of the blocks before it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        series = {
            name: {x["block"]: x[key] for x in blocks if finite(x[key])}
            for name, key in (("by itself", "output_error"), ("with what it inherits", "cumulative_error"))
        }
        _error_lines(figure, axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block, first to last")
        return Drawing(figure, "relative error of each block's output by depth")


def error_plot(layers: Sequence[Mapping[str, Any]], as_map: bool = False) -> Drawing:
    """Relative error by depth for each kind of projection, from a run's `coverage.layers`.

    Lines for a shallow model, a heat map for a deep one or where `as_map` asks for it. Where a block has several layers
    of one kind (experts), the worst is drawn.
    """
    series = _errors_by_kind(layers)
    draw = _error_map if as_map or max(map(len, series.values())) > SHALLOW else _error_lines
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(figure, axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block, first to last")
        return Drawing(figure, "relative error of each quantized layer by depth")


def _error_lines(figure: Figure, axes: Axes, series: Mapping[str, Mapping[int, float]]) -> None:
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
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)  # the highest marker stays whole
    axes.set_ylabel("relative error (%)")
    grid(axes)
    figure.set_figheight(2.5 + 0.19 * math.ceil(len(series) / 3))
    legend = {"frameon": False, "fontsize": FONT - 1, "columnspacing": 1.0, "handlelength": 1.6}
    figure.legend(loc="outside lower center", ncols=3, **legend)


def _error_map(figure: Figure, axes: Axes, series: Mapping[str, Mapping[int, float]]) -> None:
    blocks = range(max(max(by_block) for by_block in series.values()) + 1)
    cells = [[100 * by_block.get(block, math.nan) for block in blocks] for by_block in series.values()]
    # Few colours: they can be told apart, and matplotlib would draw a finer scale as a bitmap.
    colours = mpl.colormaps["viridis"].resampled(10)
    mesh = axes.pcolormesh(blocks, range(len(series)), cells, cmap=colours, edgecolor="face", linewidth=0.2)
    axes.set_yticks(range(len(series)), [clean(kind, 16) for kind in series])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    figure.set_figheight(1.3 + 0.24 * len(series))
    figure.colorbar(mesh, ax=axes, location="bottom", label="relative error (%)", aspect=32, pad=0.04)


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
