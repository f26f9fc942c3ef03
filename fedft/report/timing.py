"""What runs did with simulated time: the metric as a function of it, and the time to a target."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fedft.report import charts
from fedft.report.charts import Line, Style
from fedft.report.figures import Figure, band_note, in_two_sizes, score_axis
from fedft.report.formats import score, seconds_text, time_unit
from fedft.report.groups import Group, Metric
from fedft.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 24
"""Times at which a band over seeds is worked out; runs are not evaluated at the same times."""

Curve = Sequence[tuple[float, float]]
"""(seconds, score) at every evaluation, in order of time."""


def curve(record: Record, metric: Metric) -> Curve:
    """The metric over simulated time; empty where the run had no simulated clock."""
    elapsed = record.series("clock", "elapsed")
    return [(elapsed[r], y) for r, y in record.series(*metric.keys).items() if r in elapsed]


def at(points: Curve, seconds: float) -> float:
    """The score at a time within the curve, linear between evaluations."""
    index = bisect_left(points, seconds, key=lambda point: point[0])
    if index == 0 or points[index][0] == seconds:
        return points[index][1]
    (t0, y0), (t1, y1) = points[index - 1 : index + 1]
    return y0 + (y1 - y0) * (seconds - t0) / (t1 - t0)


def time_to(points: Curve, target: float, *, higher: bool) -> float | None:
    """Seconds until the target is first reached, linear between evaluations; None: never."""
    sign = 1 if higher else -1
    if points and sign * (points[0][1] - target) >= 0:
        return points[0][0]
    for (t0, y0), (t1, y1) in pairwise(points):
        if sign * (y1 - target) >= 0:
            return t0 + (t1 - t0) * (target - y0) / (y1 - y0)
    return None


def common_target(records: Sequence[Record], metric: Metric) -> float | None:
    """The best level that every run reached; None unless all of them had a simulated clock."""
    curves = [curve(record, metric) for record in records]
    if not all(curves):
        return None
    best, worst = (max, min) if metric.higher else (min, max)
    return worst(best(y for _, y in points) for points in curves)


def score_by_time(
    groups: Sequence[Group], metric: Metric, look: Mapping[str, Style]
) -> Figure | None:
    """The metric over simulated time for every rule, with bands over the seeds."""
    lines = [line for group in groups if (line := _line(group, metric, look[group.label]))]
    if not lines:
        return None
    size, unit = time_unit(max(line.x[-1] for line in lines))
    ends = ", ".join(
        f"{ln.label} {score(ln.y[-1], metric.percent)} after {seconds_text(ln.x[-1])}"
        for ln in lines
    )
    drawn = [_scaled(line, size) for line in lines]

    def draw(ax: "Axes") -> None:
        charts.plot(ax, drawn)
        score_axis(ax, metric)
        ax.set_xlabel(f"Simulated time ({unit})")
        charts.name_ends(ax, drawn, tied=len({line.x[-1] for line in drawn}) == 1)

    caption = (
        "Device time by the fleet's clock; linear between evaluations, up to the shortest run."
    )
    alt = f"{metric.title} over simulated time. At the end: {ends}."
    title = f"{metric.title} over simulated time"
    return in_two_sizes("score-time", title, f"{caption} {band_note(groups)}", alt, draw)


def run_by_time(record: Record, metric: Metric, style: Style) -> Figure | None:
    """The metric of one run over simulated time."""
    points = curve(record, metric)
    if not points:
        return None
    size, unit = time_unit(points[-1][0])
    line = Line(metric.title, style, [t / size for t, _ in points], [y for _, y in points])
    alt = (
        f"{metric.title} over simulated time: {score(points[0][1], metric.percent)} after "
        f"{seconds_text(points[0][0])}, {score(points[-1][1], metric.percent)} after "
        f"{seconds_text(points[-1][0])}."
    )
    with charts.canvas() as (figure, ax):
        charts.plot(ax, [line])
        score_axis(ax, metric)
        ax.set_xlabel(f"Simulated time ({unit})")
        drawing = charts.svg(figure, "score-time", alt)
    caption = "Device time by the fleet's clock, not of this machine."
    return Figure("score-time", f"{metric.title} over simulated time", caption, drawing)


def _line(group: Group, metric: Metric, style: Style) -> Line | None:
    curves = [points for run in group.runs.values() if (points := curve(run, metric))]
    if not curves:
        return None
    first = max(points[0][0] for points in curves)
    last = min(points[-1][0] for points in curves)
    if first > last:
        return None
    if len(curves) == 1:
        return Line(group.label, style, [t for t, _ in curves[0]], [y for _, y in curves[0]])
    times = [first + (last - first) * k / (_POINTS - 1) for k in range(_POINTS)]
    times[-1] = last
    values = [group.interval(at(points, t) for points in curves) for t in times]
    found = [(t, value) for t, value in zip(times, values, strict=True) if value is not None]
    return Line(
        group.label,
        style,
        [t for t, _ in found],
        [value.mean for _, value in found],
        [value.low for _, value in found],
        [value.high for _, value in found],
    )


def _scaled(line: Line, size: float) -> Line:
    return Line(line.label, line.style, [t / size for t in line.x], line.y, line.low, line.high)
