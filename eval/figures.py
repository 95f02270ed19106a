"""The report's figures: matplotlib drawings as SVG that sits inline in an HTML page.

Every figure is one `<svg>` element as text: text stays text in the page's own font, ink is `currentColor` (so
dark mode works), no width or height (the page scales it), ids carry the caller's prefix, and the same data
give the same bytes. The figures are small in inches because a phone shows them at about that size.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from .report import Entry, SpeedPoint

WIDTH = 4.2  # inches: about a phone's screen, so that 10 pt stay about 10 px there
FONT = 10.0  # points
SHALLOW = 12  # blocks that lines can show
INK = "#010203"  # stands for currentColor until the SVG is written
# Readable on white and on near-black alike.
COLOURS = (
    "#3b7dd8",
    "#d9730d",
    "#2e9e5b",
    "#d64550",
    "#9461d1",
    "#1a9aa8",
    "#b08a1e",
    "#d05aa5",
    "#7a9a2a",
    "#7d8590",
)
MARKERS = "osD^vPX<>h"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bitpress",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: layout is the same on every machine
    "font.size": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": FONT,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
ANGLES = (0, 180, 90, 270, 30, 150, 210, 330, 60, 120, 240, 300)  # of a label from its point, best first
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Point:
    """One run in the plot of perplexity against file size (bytes)."""

    label: str
    size: float
    perplexity: float
    baseline: bool = False


@dataclass(frozen=True)
class Bar:
    """One measured speed (tokens per second) with its spread."""

    label: str
    value: float
    low: float
    high: float
    note: str
    verdict: str  # baseline, faster, slower or same


def model_figures(entries: Sequence["Entry"], points: Mapping["SpeedPoint", str], ident: str) -> list[tuple[str, str]]:
    """(caption, SVG) of the plots of one model's runs; what was not measured is not drawn.

    `points` names the measured speeds, `ident` keeps the ids of several models on one page apart.
    """
    drawn = []
    sizes = [
        Point(entry.label, size, perplexity, entry.is_baseline)
        for entry in entries
        if _finite(size := entry.get("size", "file_bytes"))
        and _finite(perplexity := entry.get("quality", "perplexity"))
    ]
    if sizes:
        caption = "Perplexity against file size. Best is the lower left corner; the open circle is the baseline."
        drawn.append((caption, size_plot(sizes, f"{ident}-size")))
    for number, entry in enumerate(entries):
        drawn += _error_figures(entry, f"{ident}-error{number}")
    if points:
        caption = (
            "Speed, with the ratio to the baseline: blue is faster, orange slower, grey the same within the "
            "spread of the repeats (the thin line on each bar). The dashed line is the baseline."
        )
        rows = [(name, _speeds(entries, p, "prefill"), _speeds(entries, p, "decode")) for p, name in points.items()]
        drawn.append((caption, speed_plot(rows, f"{ident}-speed")))
    return drawn


def _error_figures(entry: "Entry", ident: str) -> list[tuple[str, str]]:
    """Where a run is wrong, by depth: in its layers' outputs where these were compared, else in its weights."""
    compared = [x for x in entry.get("output_errors", "layers") or [] if _finite(x["output_error"]) and _inner(x)]
    if compared:
        layers = [{**x, "relative_error": x["output_error"]} for x in compared]
        caption = f"{entry.label}: relative error of each layer's outputs, on the unquantized model's inputs."
        drawn = [(caption, error_plot(layers, ident, as_map=True))]
        blocks = [x for x in entry.get("output_errors", "blocks") if _finite(x["output_error"])]
        caption = f"{entry.label}: relative error of each block's output: by itself, and with what it inherits."
        return [*drawn, (caption, depth_plot(blocks, f"{ident}-depth"))] if len(blocks) > 1 else drawn
    layers = [x for x in entry.get("coverage", "layers") or [] if _finite(x.get("relative_error"))]
    if not layers:
        return []
    measured = "relative error of the quantized layers"
    if all(_finite(x.get("output_error")) for x in layers):  # what a method that learns keeps small
        layers = [{**x, "relative_error": x["output_error"]} for x in layers]
        measured = "relative error of the quantized layers' outputs"
    return [(f"{entry.label}: {measured}, by depth.", error_plot(layers, ident))]


def _inner(layer: Mapping[str, Any]) -> bool:
    return layer["block"] is not None


def size_plot(points: Sequence[Point], ident: str) -> str:
    """Perplexity against file size, every point labelled; lower left is better."""
    unit, divisor = next(
        (u, d) for u, d in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if d == 1e3 or max(p.size for p in points) >= d
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9 + 0.1 * max(0, len(points) - 8)), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            colour = INK if point.baseline else COLOURS[0]
            face = "none" if point.baseline else colour
            axes.plot(point.size / divisor, point.perplexity, "o", ms=6, mec=colour, mfc=face)
            if point.baseline:
                axes.axhline(point.perplexity, color=INK, alpha=0.35, lw=0.8, ls=(0, (4, 3)))
        values = [p.perplexity for p in points]
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.margins(0.14, 0.16)
        axes.set_xlabel(f"file size ({unit}), smaller is better")
        axes.set_ylabel("perplexity, lower is better")
        _grid(axes)
        figure.draw_without_rendering()  # settles the layout, so that data coordinates become places
        _label_points(axes, points, divisor)
        return _svg(figure, ident, "perplexity against file size")


def depth_plot(blocks: Sequence[Mapping[str, Any]], ident: str) -> str:
    """Relative error of each decoder block's output, its own and with that of the blocks before it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        series = {
            name: {x["block"]: x[key] for x in blocks if _finite(x[key])}
            for name, key in (("by itself", "output_error"), ("with what it inherits", "cumulative_error"))
        }
        _error_lines(figure, axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block, first to last")
        return _svg(figure, ident, "relative error of each block's output by depth")


def error_plot(layers: Sequence[Mapping[str, Any]], ident: str, as_map: bool = False) -> str:
    """Relative error by depth for each kind of projection, from a run's `coverage.layers`.

    Lines for a shallow model, a heat map where lines would tangle, or if asked. Where a block has several layers of one
    kind (experts), the worst is drawn.
    """
    series = _errors_by_kind(layers)
    draw = _error_map if as_map or max(map(len, series.values())) > SHALLOW else _error_lines
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(figure, axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("decoder block, first to last")
        return _svg(figure, ident, "relative error of each quantized layer by depth")


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
            label=_clean(kind, 22),
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)  # the highest marker stays whole
    axes.set_ylabel("relative error (%)")
    _grid(axes)
    figure.set_figheight(2.5 + 0.19 * math.ceil(len(series) / 3))
    legend = {"frameon": False, "fontsize": FONT - 1, "columnspacing": 1.0, "handlelength": 1.6}
    figure.legend(loc="outside lower center", ncols=3, **legend)


def _error_map(figure: Figure, axes: Axes, series: Mapping[str, Mapping[int, float]]) -> None:
    blocks = range(max(max(by_block) for by_block in series.values()) + 1)
    cells = [[100 * by_block.get(block, math.nan) for block in blocks] for by_block in series.values()]
    # Few colours: they can be told apart, and matplotlib would draw a finer scale as a bitmap.
    colours = mpl.colormaps["viridis"].resampled(10)
    mesh = axes.pcolormesh(blocks, range(len(series)), cells, cmap=colours, edgecolor="face", linewidth=0.2)
    axes.set_yticks(range(len(series)), [_clean(kind, 16) for kind in series])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    figure.set_figheight(1.3 + 0.24 * len(series))
    figure.colorbar(mesh, ax=axes, location="bottom", label="relative error (%)", aspect=32, pad=0.04)


def _errors_by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """{"q_proj": {block: worst error}}; a longer name where the last part would be ambiguous."""
    kinds = [re.sub(r"(?<=\.)\d+(?=\.)", "*", re.split(r"\.\d+\.", x["name"], maxsplit=1)[-1]) for x in layers]
    last = Counter(kind.rpartition(".")[2] for kind in set(kinds))
    series: dict[str, dict[int, float]] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        short = kind.rpartition(".")[2]
        worst = series.setdefault(short if last[short] == 1 else kind, {})
        worst[layer["block"]] = max(layer["relative_error"], worst.get(layer["block"], 0.0))
    return series


def speed_plot(rows: Sequence[tuple[str, Sequence[Bar], Sequence[Bar]]], ident: str) -> str:
    """Tokens per second: one row of panels per measured point (its title, prefill bars, decode bars)."""
    with mpl.rc_context(STYLE):
        heights = [0.2 * max(len(prefill), len(decode)) + 0.6 for _, prefill, decode in rows]
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
        for row, (title, prefill, decode) in enumerate(rows):
            for column, (phase, bars) in enumerate((("prefill", prefill), ("decode", decode))):
                axes = figure.add_subplot(grid[row, column])
                axes.set_title(f"{phase}, {_clean(title, 24)}", loc="left")
                _bars(axes, bars, named=column == 0)
        figure.supxlabel("tokens per second, more is better", fontsize=FONT)
        return _svg(figure, ident, "speed of prefill and decode, tokens per second")


def _speeds(entries: Sequence["Entry"], point: "SpeedPoint", phase: str) -> list[Bar]:
    bars = []
    for entry in entries:
        if speed := entry.speed(point, phase):
            ratio, verdict = entry.speed_against(point, phase)
            short = f"{speed[0] / 1000:.3g}k" if speed[0] >= 1000 else f"{speed[0]:.3g}"
            note = short if ratio is None else f"{ratio:.2f}x"
            bars.append(Bar(entry.label, *speed, note, "baseline" if entry.is_baseline else verdict))
    return bars


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bars(axes: Axes, bars: Sequence[Bar], named: bool) -> None:
    """Horizontal bars, first on top, each with the spread as a line and its note behind it."""
    colours = {"baseline": INK, "same": COLOURS[-1], "faster": COLOURS[0], "slower": COLOURS[1]}
    top = max((bar.high for bar in bars), default=1.0) or 1.0
    for index, bar in enumerate(bars):
        alpha = 0.45 if bar.verdict == "baseline" else 1.0
        axes.barh(index, bar.value, height=0.7, color=colours[bar.verdict], alpha=alpha, lw=0)
        axes.plot([bar.low, bar.high], [index, index], color=INK, lw=1)
        # In a column of their own, the notes collide with nothing.
        axes.text(1.6 * top, index, bar.note, va="center", ha="right", fontsize=FONT - 1)
        if bar.verdict == "baseline":
            axes.axvline(bar.value, color=INK, alpha=0.35, lw=0.8, ls=(0, (4, 3)))
    axes.set_xlim(0, 1.6 * top)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [_clean(bar.label, 16) for bar in bars] if named else [""] * len(bars))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    divisor, unit = (1000, "k") if top >= 5000 else (1, "")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / divisor:g}{unit if x else ''}"))
    axes.spines["left"].set_visible(False)


def _grid(axes: Axes) -> None:
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    axes.set_axisbelow(True)


def _label_points(axes: Axes, points: Sequence[Point], divisor: float) -> None:
    """Writes each label at the nearest place where it covers no point and no other label.

    Widths are estimated from the number of letters, because the page's font is not known here. A label that
    fits nowhere is left out: the table beside the figure has it.
    """
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    area = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    places = [axes.transData.transform((p.size / divisor, p.perplexity)) * scale for p in points]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    # The baseline's dashed line would strike its label through.
    taken += [(area[0], y - 1, area[2], y + 1) for p, (_, y) in zip(points, places, strict=True) if p.baseline]
    for point, (px, py) in zip(points, places, strict=True):
        label = _clean(point.label, 24)
        width, height = 0.62 * FONT * len(label), 1.25 * FONT
        for radius, angle in ((r, a) for r in (7, 12, 18, 26, 36, 48, 62, 78, 96) for a in ANGLES):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            # The label hangs on its nearest side: left of it for labels to the right of the point, and so on.
            side = "center" if angle in (90, 270) else "left" if dx > 0 else "right"
            left = px + dx - {"left": 0.0, "center": width / 2, "right": width}[side]
            box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
            if _inside(box, area) and not any(_overlap(box, other) for other in taken):
                leader = {
                    "arrowstyle": "-",
                    "color": INK,
                    "alpha": 0.5,
                    "lw": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 3,
                }
                axes.annotate(
                    label,
                    (point.size / divisor, point.perplexity),
                    (dx, dy),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    arrowprops=leader if radius > 12 else None,
                )
                taken.append(box)
                break


def _inside(box: Box, area: Box) -> bool:
    return box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _clean(text: str, longest: int) -> str:
    """Text for a figure: matplotlib's font lacks most scripts, and XML refuses control characters."""
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _svg(figure: Figure, ident: str, title: str) -> str:
    """The drawing as one `<svg>` element fit for an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        # HTML knows inline SVG without namespaces, and a page without a URL in it is easier to trust.
        element.tag = element.tag.partition("}")[2]
        names = {key: key.partition("}")[2] or key for key in element.attrib}
        element.attrib = {name: _value(name, element.attrib[key], ident) for key, name in names.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ET.tostring(root, encoding="unicode").strip()


def _value(name: str, value: str, ident: str) -> str:
    """An attribute with ids made the figure's own, ink made currentColor, and the font left to the page."""
    if name == "id":
        return f"{ident}-{value}"
    if name == "href":
        return f"#{ident}-{value[1:]}"
    value = value.replace("url(#", f"url(#{ident}-").replace(INK, "currentColor")
    return re.sub(r"\bfont: ([\d.]+px) [^;]*", r"font-size: \1", value)
