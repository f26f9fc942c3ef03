"""Drawing: a plain style, colours that everybody can tell apart, and SVG that a page can hold.

matplotlib is imported where it is used: commands that draw nothing never pay for it. Figures are
made without pyplot, so that no global state or display is involved.

Text stays text in the SVG. It is laid out in matplotlib's own wide font and shown in the page's,
which is narrower: nothing runs into anything.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import TYPE_CHECKING, Any

from fedft.core.extras import extra
from fedft.report.groups import Group
from fedft.report.records import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1c1f24", "#5c6370", "#d9dce1"

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a0569b", "#56b4e9", "#e69f00", "#7a6a4f")
"""After Okabe and Ito, Color Universal Design (2008): distinct under the common colour-vision
deficiencies. Yellow is left out, too faint on white; the purple is darkened."""

_MARKERS = "osD^vPX"
_LEGIBLE = 2 * len(PALETTE)
"""Styles that differ: each colour once solid and once dashed."""

_ORDER = (
    *("lora-fair", "ffa-lora", "flora", "flexlora", "fedex-lora", "rolora", "hetlora"),
    *("fedmomentum", "fedrot-lora", "fedsa-lora", "fedsvd", "raflora", "fed-sb", "fedprox"),
)
"""Places in the palette, so that a rule has the same colour in every report."""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedft",
    # A rule's name may hold a dollar sign; nothing here is set as mathematics.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Style:
    """How one series is drawn, everywhere on the page."""

    color: str
    dashes: str | tuple[int, tuple[int, int]]
    marker: str
    hollow: bool

    def line(self) -> dict[str, object]:
        """Arguments of ``Axes.plot``."""
        face = "white" if self.hollow else self.color
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markerfacecolor": face,
            "markeredgecolor": self.color,
        }


@dataclass(frozen=True)
class Line:
    """A series: y over x, with a band where there is one."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """A style for every group by its label. The baseline is ink, the rest in colour."""
    taken: dict[int, str] = {}
    result: dict[str, Style] = {}
    base = next((group for group in groups if group.baseline), None)
    for group in groups:
        label = group.label
        if group is base:
            result[label] = Style(INK, "solid", "o", hollow=False)
            continue
        wished = _ORDER.index(group.arm) if group.arm in _ORDER else len(taken)
        free = [slot for slot in range(_LEGIBLE) if slot not in taken]
        # Past the last free slot styles repeat: direct labels still tell the lines apart.
        slot = wished if wished in free else (free[0] if free else len(result) % _LEGIBLE)
        taken[slot] = label
        result[label] = numbered(slot)
    return result


def numbered(slot: int) -> Style:
    """The style of a slot: as many are told apart as there are colours, twice."""
    dashed = slot % _LEGIBLE >= len(PALETTE)
    index = slot % len(PALETTE)
    dashes = (0, (4, 2)) if dashed else "solid"
    return Style(PALETTE[index], dashes, _MARKERS[index], hollow=dashed)


@contextmanager
def canvas(width: float = 4.7, height: float = 3.0) -> "Iterator[tuple[Figure, Axes]]":
    """An empty figure of one pair of axes, in inches, in the page's style."""
    with extra("report", "a report needs it"):
        import matplotlib
        from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        # 72 dots an inch: pixels are points, in what is measured here and in the SVG.
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: "Figure", name: str, alt: str) -> str:
    """The figure as an inline ``<svg>`` that fits its column.

    Args:
        figure: as drawn.
        name: unique on the page; prefixes every id inside.
        alt: what the figure shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} {view[0]} role="img" aria-label="{escape(alt)}">'
    return head + text[text.index(">") + 1 :]


# ── axes ──────────────────────────────────────────────────────────────────────────────────────


def whole_rounds(ax: "Axes") -> None:
    """An x axis of rounds: whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("Round")
    ax.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10])
    )


def formatted(axis: object, show: Callable[[float], str]) -> None:
    """Tick labels by a function of the value."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))  # type: ignore[attr-defined]


def percent(value: float) -> str:
    """Of a share."""
    return f"{100 * value:.3g} %"


def power(value: float) -> str:
    """Of ten: ``0.01``, ``10⁻⁵``."""
    if value <= 0:
        return "0"
    exponent = floor(log10(value) + 0.5)
    if -3 <= exponent <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def logarithmic(ax: "Axes", which: str, bottom: float | None, name: str) -> None:
    """A logarithmic axis; with ``bottom``, whatever is smaller has been drawn there, and it says so."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(ax, f"set_{which}scale")("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_formatter(NullFormatter())
    floor_ = bottom or 0.0

    def show(value: float, _: object) -> str:
        if value < floor_ * 0.99:
            return ""
        return f"≤ {power(value)}" if value < floor_ * 1.01 else power(value)

    axis.set_major_formatter(FuncFormatter(show))
    getattr(ax, f"set_{which}label")(name)


def ratio(ax: "Axes", which: str, values: Iterable[float], floor_: float, name: str) -> None:
    """An axis for ratios: logarithmic where they span more than a decade, else linear from zero.

    Args:
        ax: holds the data already; values below ``floor_`` were drawn at ``floor_``.
        which: ``x`` or ``y``.
        values: what was drawn.
        floor_: smallest value that is told apart.
        name: of the axis.
    """
    drawn = list(values)
    lowest, highest = min(drawn), max(drawn)
    floored = lowest < floor_ * 1.001
    if not floored and highest < 10 * lowest:
        getattr(ax, f"set_{which}lim")(0, highest * 1.15)
        getattr(ax, f"set_{which}label")(name)
    else:
        logarithmic(ax, which, floor_ if floored else None, name)


def spaced(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the given order of size, ``gap`` apart, between bounds, nearest to the wanted.

    Least squares under the ordering: isotonic regression by pooling adjacent violators, cut at the
    bounds. Where there is no room for all, the upper bound gives way.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []  # (mean, size)
    for rank, i in enumerate(order):
        pools.append((wanted[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    top = max(low, high - (len(wanted) - 1) * gap)
    flat = [min(max(mean, low), top) for mean, size in pools for _ in range(size)]
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = flat[rank] + rank * gap
    return result


def plot(ax: "Axes", lines: Sequence[Line]) -> None:
    """Lines with their bands, named at their right ends."""
    for line in lines:
        every = max(1, len(line.x) // 6)
        ax.plot(line.x, line.y, markevery=every, label=line.label, **line.style.line())  # type: ignore[arg-type]
        if line.low is not None and line.high is not None:
            ax.fill_between(
                line.x, line.low, line.high, color=line.style.color, alpha=0.13, linewidth=0
            )
    ax.margins(x=0.02)


def name_ends(ax: "Axes", lines: Sequence[Line], *, tied: bool = True, size: float = 8.5) -> None:
    """Names of the lines at the right, by the height of their last points but never overlapping.

    ``tied`` draws a thin line from the edge of the plot to the name: for lines that end there.
    """
    _laid_out(ax)
    box = ax.get_window_extent()
    inverse = ax.transAxes.inverted()
    ends = [inverse.transform(ax.transData.transform((ln.x[-1], ln.y[-1])))[1] for ln in lines]
    places = spaced(ends, 1.15 * size / box.height, 0.0, 1.0)
    beside = {"transform": ax.transAxes, "clip_on": False}
    for line, end, y in zip(lines, ends, places, strict=True):
        if tied:
            tie = [1, 1 + 9 / box.width]
            ax.plot(tie, [end, y], color=line.style.color, linewidth=0.6, **beside)  # type: ignore[arg-type]
        key = [1 + points / box.width for points in (9, 18, 27)]
        look = line.style.line() | {"linewidth": 1.4, "markersize": 3.2}
        ax.plot(key, [y] * 3, markevery=[1], **look, **beside)  # type: ignore[arg-type]
        name = clean(line.label, 34)
        ax.text(1 + 32 / box.width, y, name, va="center", fontsize=size, **beside)  # type: ignore[arg-type]


_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def name_points(
    ax: "Axes",
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    avoid: Sequence[tuple[float, float]] = (),
    size: float = 8.0,
) -> None:
    """Names beside scattered points, each at the nearest spot that is free.

    Right and left of the point are tried at growing height; a name that had to go far is tied to
    its point by a thin line. ``avoid`` are further places, in data, that names keep clear of.
    """
    _laid_out(ax)
    inverse = ax.transAxes.inverted()
    spots = [tuple(ax.transData.transform(p)) for p in points]
    others = [tuple(ax.transData.transform(p)) for p in avoid]
    taken: list[_Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    taken += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in others]
    for i in sorted(range(len(points)), key=lambda i: -spots[i][1]):
        (x, y), w, h = spots[i], 0.6 * size * len(names[i]), 1.15 * size
        box = _free_box(ax, taken, x, y, w, h)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > h:
            edge = box[0] - 1 if box[0] > x else box[2] + 1
            (x0, y0), (x1, y1) = inverse.transform([(x, y), (edge, middle)])
            style = {"color": MUTED, "linewidth": 0.5, "transform": ax.transAxes}
            ax.plot([x0, x1], [y0, y1], in_layout=False, **style)  # type: ignore[arg-type]
        left, centre = inverse.transform((box[0], middle))
        look = {"va": "center", "fontsize": size, "in_layout": False}
        ax.text(left, centre, names[i], transform=ax.transAxes, **look)  # type: ignore[arg-type]


def _free_box(ax: "Axes", taken: Sequence[_Box], x: float, y: float, w: float, h: float) -> _Box:
    frame = ax.get_window_extent()
    heights = sorted(range(-9, 10), key=abs)
    boxes = [
        (left, y + (k - 0.5) * h, left + w, y + (k + 0.5) * h)
        for k in heights
        for left in (x + 7, x - 7 - w)
    ]
    inside = [
        b
        for b in boxes
        if b[0] >= frame.x0 and b[2] <= frame.x1 and b[1] >= frame.y0 and b[3] <= frame.y1
    ]
    free = [b for b in inside if not any(_overlap(b, other) for other in taken)]
    return (free or inside or boxes)[0]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _laid_out(ax: "Axes") -> None:
    """Settle the layout, so that positions can be read off."""
    from matplotlib.figure import Figure

    assert isinstance(ax.figure, Figure)
    ax.figure.draw_without_rendering()
