"""The common parts of figures: their style, labels that cover nothing, and SVG for use inside a page.

Every figure is one `<svg>` element. Its text stays text, in the page's own font. Its ink is `currentColor`, so dark
mode works. It has no width or height: the page scales it. Its ids carry the caller's prefix. The same data give the
same bytes. The figures are small in inches because a phone shows them at about that size.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
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
Box = tuple[float, float, float, float]  # left, bottom, right, top


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


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each label at the nearest place where it covers no point and no other label.

    A label's width is estimated from its number of letters, because the page's font is not known here. A label that
    fits nowhere is left out: the table beside the figure has it.
    """
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    area = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    places = [axes.transData.transform((p.x, p.y)) * scale for p in points]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    # The baseline's dashed line would strike its label through.
    taken += [(area[0], y - 1, area[2], y + 1) for p, (_, y) in zip(points, places, strict=True) if p.baseline]
    for point, (px, py) in zip(points, places, strict=True):
        label = clean(point.label, 24)
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
                    (point.x, point.y),
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
