"""The figures of a comparison: which data they show, and in words what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedft.report import charts, meter_figures
from fedft.report.charts import INK, RULE, Line, Style
from fedft.report.figures import (
    Figure,
    band_note,
    bands,
    cumulative,
    in_two_sizes,
    legend,
    level,
    phases,
    score_axis,
    site_scores,
    wheel,
)
from fedft.report.formats import EXACT, bias_text, bytes_text, bytes_unit, score, seconds_text
from fedft.report.groups import Group, Metric, baseline_name, baseline_of, further, with_start
from fedft.report.records import Record, clean
from fedft.report.submodels import score_by_size
from fedft.report.timing import score_by_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def of_comparison(groups: Sequence[Group], metric: Metric) -> list[Figure]:
    """All figures of several runs for which there are data."""
    look = charts.styles(groups)
    spread = [(g.label, list(g.runs.values())) for g in groups]
    candidates = (
        score_bands(groups, metric, look),
        *(
            score_bands(groups, one, look, f"score-bands-{one.name}")
            for one in further([r for _, runs in spread for r in runs], metric)
        ),
        score_by_time(groups, metric, look),
        score_by_size(groups, metric, look),
        *meter_figures.compared(groups, look, leading=True),
        score_by_bytes(groups, metric, look),
        bias_by_gain(groups, metric, look),
        *meter_figures.heats(groups),
        site_scores(spread, metric),
        seconds_bars(groups),
        *meter_figures.compared(groups, look, leading=False),
    )
    return [figure for figure in candidates if figure is not None]


def score_bands(
    groups: Sequence[Group], metric: Metric, look: Mapping[str, Style], name: str = "score-bands"
) -> Figure | None:
    """The metric per round for every rule; ``name``: of the figure, unique on the page."""
    lines = bands(groups, look, lambda run: with_start(run, metric))
    if not lines:
        return None
    alt = f"{metric.title} per round. At the end: {_endings(lines, metric)}."
    title, caption = f"{metric.title} per round", band_note(groups)

    def draw(ax: "Axes") -> None:
        charts.plot(ax, lines)
        score_axis(ax, metric)
        charts.name_ends(ax, lines)

    return in_two_sizes(name, title, caption, alt, draw)


def score_by_bytes(
    groups: Sequence[Group], metric: Metric, look: Mapping[str, Style]
) -> Figure | None:
    """The metric against traffic so far, means over the seeds."""
    points: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        spent = [cumulative(_both_ways(run)) for run in group.runs.values()]
        scores = [run.series(*metric.keys) for run in group.runs.values()]
        rounds = set.intersection(*(set(s) & set(b) for s, b in zip(scores, spent, strict=True)))
        if rounds:
            points[group.label] = [
                (fmean(b[r] for b in spent), fmean(s[r] for s in scores)) for r in sorted(rounds)
            ]
    largest = max((x for line in points.values() for x, _ in line), default=0.0)
    if largest <= 0:
        return None
    size, unit = bytes_unit(largest)
    lines = [
        Line(label, look[label], [x / size for x, _ in line], [y for _, y in line])
        for label, line in points.items()
    ]
    alt = f"{metric.title} against cumulative traffic. At the end: " + ", ".join(
        f"{ln.label} {score(ln.y[-1], metric.percent)} after {bytes_text(ln.x[-1] * size)}"
        for ln in lines
    )
    far = largest > 8 * size * min(ln.x[-1] for ln in lines) and min(ln.x[0] for ln in lines) > 0

    def draw(ax: "Axes") -> None:
        charts.plot(ax, lines)
        if far:
            charts.logarithmic(ax, "x", None, "")
        score_axis(ax, metric)
        ax.set_xlabel(f"Traffic up and down ({unit})")
        charts.name_ends(ax, lines, tied=False)

    title = f"{metric.title} against traffic"
    return in_two_sizes("score-bytes", title, "Mean over the seeds.", f"{alt}.", draw)


@dataclass(frozen=True)
class _Point:
    """One rule in the plane of bias and gain; ``gain`` in points where the metric is a share."""

    label: str
    bias: float
    gain: float
    half: float | None


def bias_by_gain(
    groups: Sequence[Group], metric: Metric, look: Mapping[str, Style]
) -> Figure | None:
    """Does less bias mean a better model? One point a rule."""
    points = [point for group in groups if (point := _point(group, groups, metric))]
    if not any(point.half or point.gain for point in points):
        return None
    unit = " (points)" if metric.percent else ""
    alt = f"Mean relative bias against the difference in {metric.title.lower()} to {baseline_name(groups)}{unit}: "
    alt += ", ".join(f"{p.label} bias {bias_text(p.bias)}, {p.gain:+.2f}" for p in points) + "."
    places = _side_by_side([p.bias for p in points])
    exact = sum(p.bias <= EXACT for p in points)
    with charts.canvas(4.7, 4.0) as (figure, ax):
        ax.axhline(0, color=INK, linewidth=1.0)
        for point, x in zip(points, places, strict=True):
            _draw_point(ax, point, x, look[point.label])
        ax.margins(x=0.14, y=0.1)
        charts.ratio(ax, "x", places, EXACT, "Mean relative bias")
        if exact:
            ax.axvspan(ax.get_xlim()[0], EXACT * 1.6, color=RULE, alpha=0.45, zorder=0, linewidth=0)
        ax.set_ylabel(f"Difference to {baseline_name(groups)}{unit}")
        spots = [(x, p.gain) for x, p in zip(places, points, strict=True)]
        bars = [
            (x, p.gain + k / 10 * p.half)
            for x, p in zip(places, points, strict=True)
            if p.half
            for k in range(-10, 11)
        ]
        charts.name_points(ax, spots, [clean(p.label, 36) for p in points], bars)
        notes = [f"Difference in {metric.title.lower()} at the last evaluation, paired by seed."]
        notes += [f"Bars: {level(groups)} interval."] * any(p.half for p in points)
        notes += ["Grey: exact, side by side."] * (exact > 1)
        drawing = charts.svg(figure, "bias-gain", alt)
        return Figure("bias-gain", "Bias against gain", " ".join(notes), drawing)


def _point(group: Group, groups: Sequence[Group], metric: Metric) -> _Point | None:
    bias = group.interval(group.means("bias", "relative").values())
    if bias is None:
        return None
    scale, base = 100.0 if metric.percent else 1.0, baseline_of(group, groups)
    if base is None:
        return _Point(group.label, bias.mean, 0.0, None) if group.baseline else None
    gain = group.gain(base, *metric.keys)
    if gain is None:
        return None
    half = None if gain.half is None else scale * gain.half
    return _Point(group.label, bias.mean, scale * gain.mean, half)


def _draw_point(ax: "Axes", point: _Point, x: float, style: Style) -> None:
    face = "white" if style.hollow else style.color
    bar = {"ecolor": style.color, "elinewidth": 1.0, "markersize": 6.0}
    shape = {"fmt": style.marker, "color": style.color, "markerfacecolor": face}
    ax.errorbar(x, point.gain, yerr=point.half or None, **bar, **shape)  # type: ignore[arg-type]


def _side_by_side(biases: Sequence[float]) -> list[float]:
    """Places on the axis: exact rules would hide one another, and stand apart beyond the floor."""
    exact = [k for k, x in enumerate(biases) if x <= EXACT]
    return [
        EXACT * 10 ** (-0.3 * exact.index(k)) if k in exact else x for k, x in enumerate(biases)
    ]


def seconds_bars(groups: Sequence[Group]) -> Figure | None:
    """Where the time goes, by rule."""
    names = phases([run for group in groups for run in group.runs.values()])
    if not names:
        return None
    totals = {
        group.label: {
            clean(phase, 24): fmean(run.total("seconds", phase) for run in group.runs.values())
            for phase in names
        }
        for group in groups
    }
    alt = "Seconds a run by phase. " + " ".join(
        f"{label}: " + ", ".join(f"{p} {seconds_text(s)}" for p, s in t.items()) + "."
        for label, t in totals.items()
    )
    with charts.canvas(4.7, max(1.8, 1.25 + 0.25 * len(totals))) as (figure, ax):
        left = [0.0] * len(totals)
        for phase, color in zip([clean(n, 24) for n in names], wheel(len(names)), strict=True):
            widths = [t.get(phase, 0.0) for t in totals.values()]
            ax.barh(range(len(totals)), widths, left=left, height=0.6, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.set_yticks(range(len(totals)), [clean(label, 36) for label in totals])
        ax.set_ylim(len(totals) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x")
        ax.set_xlabel("Seconds a run")
        legend(figure, ax)
        return Figure(
            "seconds-bars",
            "Time by phase",
            "Mean over the seeds.",
            charts.svg(figure, "seconds-bars", alt),
        )


def _both_ways(record: Record) -> dict[int, float]:
    up, down = record.series("bytes", "up"), record.series("bytes", "down")
    return {r: up.get(r, 0.0) + down.get(r, 0.0) for r in sorted(up.keys() | down.keys())}


def _endings(lines: Sequence[Line], metric: Metric) -> str:
    return ", ".join(f"{ln.label} {score(ln.y[-1], metric.percent)}" for ln in lines)
