"""The common parts of figures: their style, labels that cover nothing, and SVG for use inside a page.

Every figure is one `<svg>` element. Its text stays text, in the page's own font. Its ink is `currentColor`, so dark
mode works. It has no width or height: the page scales it. Its ids carry the caller's prefix. The same data give the
same bytes. The figures are small in inches because a phone shows them at about that size.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

WIDTH = 4.2  # inches: about a phone's screen, so that 10 pt stay about 10 px there
FONT = 10.0  # points
_DOTS = 200  # per inch, of PNG: sharp on screens of twice the usual density
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
# matplotlib's own settings first: its file of settings may lie in the current folder, which may be a checkpoint's
STYLE: dict[Any, Any] = {
    **{key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith(("backend", "toolbar"))},
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
ANGLES = (0, 180, 90, 270, 30, 150, 210, 330, 60, 120, 240, 300)  # from a point to its label, the best first
_RADII = (7, 9, 12, 15, 18, 22, 26, 31, 36, 42, 48, 62, 78, 96)  # points
_LEADER = {"arrowstyle": "-", "color": INK, "alpha": 0.5, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
Box = tuple[float, float, float, float]  # left, bottom, right, top; points
Spot = tuple[float, float]  # points


@dataclass(frozen=True)
class Point:
    """One run in a plot of one figure against another."""

    label: str
    x: float
    y: float
    baseline: bool = False


def grid(axes: Axes) -> None:
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    axes.set_axisbelow(True)


def unit_of(values: Sequence[float]) -> tuple[str, float]:
    """The unit for these numbers of bytes, and how many bytes one unit has."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((unit, one) for unit, one in units if one == 1e3 or max(values) >= one)


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Makes the y axis logarithmic where a linear one could not show the range of the values."""
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


@dataclass(frozen=True)
class _Place:
    """Where a label may be written. dx, dy: from its point, in points. cost: the lowest is best."""

    cost: float
    dx: float
    dy: float
    side: str
    box: Box
    leader: list[Spot]


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each label near its point, where it covers no point and no other label, and no line if that is possible.

    Long labels are broken at their separators. A label's width is estimated from its number of letters, because the
    page's font is not known here. The most crowded point chooses first; where a label finds no place, all choose anew
    and its turn comes before the others'. What fits in no order is left out: the table beside the figure has it.
    """
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    area = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    spots: list[Spot] = [(x * scale, y * scale) for x, y in (axes.transData.transform((p.x, p.y)) for p in points)]
    labels = [_broken(clean(point.label, 48)) for point in points]
    fixed: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    # The baseline's dashed line would strike its label through.
    fixed += [(area[0], y - 1, area[2], y + 1) for p, (_, y) in zip(points, spots, strict=True) if p.baseline]
    drawn: list[Spot] = []
    for line in axes.get_lines():
        if line.get_linestyle() == "-":
            corners = line.get_transform().transform(line.get_xydata()) * scale
            drawn += [spot for start, end in pairwise(corners) for spot in _between(start, end)]

    def room(index: int) -> float:
        return min((math.dist(spots[index], other) for i, other in enumerate(spots) if i != index), default=0.0)

    order, best = sorted(range(len(points)), key=room), dict[int, _Place]()
    for _ in points:
        places, taken, lines = dict[int, _Place](), list(fixed), list(drawn)
        for index in order:
            free = _free_places(labels[index], spots[index], area, taken, lines)
            if place := min(free, key=lambda place: place.cost, default=None):
                places[index] = place
                taken.append(place.box)
                lines += place.leader
        best = max(best, places, key=len)
        if len(best) == len(points):
            break
        order.sort(key=lambda index: index in places)
    for index, place in best.items():
        axes.annotate(
            labels[index],
            (points[index].x, points[index].y),
            (place.dx, place.dy),
            textcoords="offset points",
            ha=place.side,
            va="center",
            linespacing=1.0,
            arrowprops=_LEADER if place.leader else None,
        )


def _free_places(label: str, spot: Spot, area: Box, taken: Sequence[Box], lines: Sequence[Spot]) -> Iterator[_Place]:
    """The places around a point where its label lies inside the area and covers no box that is taken."""
    rows = label.split("\n")
    width, height = 0.64 * FONT * max(map(len, rows)), 1.25 * FONT * len(rows)
    for radius, angle in ((r, a) for r in _RADII for a in ANGLES):
        dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        # The label hangs on its nearest side: left of it for labels to the right of the point, and so on.
        side = "center" if angle in (90, 270) else "left" if dx > 0 else "right"
        dy += 0.0 if angle in (0, 180) else math.copysign(height / 2 - 0.625 * FONT, dy)
        left = spot[0] + dx - {"left": 0.0, "center": width / 2, "right": width}[side]
        box = (left, spot[1] + dy - height / 2, left + width, spot[1] + dy + height / 2)
        if _inside(box, area) and not any(_overlap(box, other) for other in taken):
            leader = _between(spot, (spot[0] + dx, spot[1] + dy)) if radius > 12 else []
            covered = sum(_overlap(box, (*each, *each)) for each in lines)
            crossed = sum(_overlap(other, (*each, *each)) for each in leader[2:] for other in taken)
            yield _Place(radius + 3 * covered + 20 * crossed, dx, dy, side, box, leader)


def _between(start: Spot, end: Spot) -> list[Spot]:
    """Spots from one to another on a straight line, about 4 points from each other."""
    steps = max(1, round(math.dist(start, end) / 4))
    (x, y), (end_x, end_y) = start, end
    return [(x + (end_x - x) * step / steps, y + (end_y - y) * step / steps) for step in range(steps + 1)]


def _broken(label: str) -> str:
    """A label of more than 16 letters on several lines, broken after its separators."""
    lines = [""]
    for piece in re.findall(r"[^-+/, ]+[-+/, ]*|[-+/, ]+", label):
        if lines[-1] and len(lines[-1]) + len(piece) > 16:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def _inside(box: Box, area: Box) -> bool:
    return box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def clean(text: str, longest: int) -> str:
    """Text for a figure, cut and in ASCII: matplotlib's font lacks most scripts, and XML forbids control characters."""
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


@dataclass(frozen=True)
class Drawing:
    """A figure. title: for a screen reader. large: the page gives it all of its width."""

    figure: Figure
    title: str
    large: bool = False

    def svg(self, ident: str) -> str:
        """One `<svg>` element for an HTML page; `ident` makes its ids differ from those of other figures."""
        buffer = io.StringIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        root = ET.fromstring(buffer.getvalue())
        for metadata in root.findall("{*}metadata"):
            root.remove(metadata)
        for element in root.iter():
            # HTML knows inline SVG without namespaces, and a page without a URL in it is easier to trust.
            element.tag = element.tag.partition("}")[2]
            names = {key: key.partition("}")[2] or key for key in element.attrib}
            element.attrib = {name: _value(name, element.attrib[key], ident) for key, name in names.items()}
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": self.title}
        return ET.tostring(root, encoding="unicode").strip()

    def png(self) -> bytes:
        """The figure on white, for pages that cannot show SVG."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=_DOTS, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _value(name: str, value: str, ident: str) -> str:
    """An attribute's value with the figure's prefix before ids, currentColor as ink, and the page's own font."""
    if name == "id":
        return f"{ident}-{value}"
    if name == "href":
        return f"#{ident}-{value[1:]}"
    value = value.replace("url(#", f"url(#{ident}-").replace(INK, "currentColor")
    return re.sub(r"\bfont: ([\d.]+px) [^;]*", r"font-size: \1", value)
