"""What figures of one run and of several have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median, quantiles
from typing import TYPE_CHECKING

from fedft.report import charts
from fedft.report.charts import INK, MUTED, PALETTE, Line, Style
from fedft.report.formats import EXACT, score
from fedft.report.groups import Group, Metric
from fedft.report.records import Record, clean, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_PHASES = ("plan", "train", "aggregate", "evaluate", "commit")


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        name: unique on the page.
        title: what it is about.
        caption: how to read it; may be empty.
        svg: inline, with its alternative text.
        wide: the same over the whole width of the page, for where there is room; or None.
    """

    name: str
    title: str
    caption: str
    svg: str
    wide: str | None = None


def in_two_sizes(
    name: str, title: str, caption: str, alt: str, draw: Callable[["Axes"], None]
) -> Figure:
    """Drawn for a column or a phone, and again for the whole width: shrunk text cannot be read."""
    with charts.canvas(4.7, 3.4) as (figure, ax):
        draw(ax)
        narrow = charts.svg(figure, name, alt)
    with charts.canvas(9.4, 3.8) as (figure, ax):
        draw(ax)
        wide = charts.svg(figure, f"{name}-wide", alt)
    return Figure(name, title, caption, narrow, wide)


def level(groups: Sequence[Group]) -> str:
    """The level of all intervals, in words."""
    return f"{100 * groups[0].confidence:.3g} %"


def band_note(groups: Sequence[Group]) -> str:
    """What the bands of a figure are."""
    most = max(len(group.runs) for group in groups)
    return (
        f"Bands: {level(groups)} interval over {most} seeds." if most > 1 else "One seed: no bands."
    )


def site_scores(named: Sequence[tuple[str, Sequence[Record]]], metric: Metric) -> Figure | None:
    """The score of every site's own model in the last evaluation, by rule."""
    spread = [(clean(label, 36), _last_scores(runs, metric.name)) for label, runs in named]
    spread = [(label, values) for label, values in spread if values]
    if not spread:
        return None
    alt = f"{metric.word.capitalize()} of the clients' own models. " + " ".join(
        f"{label}: median {score(median(v), metric.percent)}, lowest {score(min(v), metric.percent)}, "
        f"highest {score(max(v), metric.percent)}, {len(v)} clients."
        for label, v in spread
    )
    height = 1.0 + 0.27 * len(spread)
    with charts.canvas(4.7, max(1.6, height)) as (figure, ax):
        for row, (_, values) in enumerate(spread):
            low, first, middle, third, high = five_numbers(values)
            ax.plot([low, high], [row, row], color=MUTED, linewidth=1.0)
            ax.barh(row, third - first, left=first, height=0.55, color=PALETTE[4], alpha=0.6)
            ax.plot([middle] * 2, [row - 0.28, row + 0.28], color=INK, linewidth=1.8)
            outside = [v for v in values if v < low or v > high]
            ax.plot(outside, [row] * len(outside), ".", color=MUTED, markersize=3.0)
        ax.set_yticks(range(len(spread)), [label for label, _ in spread])
        ax.set_ylim(len(spread) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x")
        if metric.percent:
            charts.formatted(ax.xaxis, charts.percent)
        ax.set_xlabel(f"{metric.word.capitalize()} on the client's own held-out data")
        return Figure(
            "sites",
            f"Clients' own {metric.word}",
            "Box: middle half; line: 5th to 95th percentile; dots: clients beyond. Last evaluation, all seeds.",
            charts.svg(figure, "sites", alt),
        )


def phases(runs: Sequence[Record]) -> list[str]:
    """Names of the phases that took time, in the order of a round."""
    found = dict.fromkeys(phase for run in runs for line in run.rounds for phase in line["seconds"])
    known = [phase for phase in _PHASES if phase in found]
    return known + [phase for phase in found if phase not in _PHASES]


def curve(label: str, style: Style, values: Mapping[int, float]) -> Line:
    """A series by round, as it stands in the record."""
    return Line(label, style, list(values), list(values.values()))


def last(values: Mapping[int, float]) -> float:
    """The value of the last round; 0 where there is none."""
    return next(reversed(list(values.values())), 0.0)


def cumulative(values: Mapping[int, float]) -> dict[int, float]:
    """Sums since the start."""
    return dict(zip(values, accumulate(values.values()), strict=True))


def legend(figure: "Canvas", ax: "Axes") -> None:
    """Names above the plot, for few series of one run."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))


def score_axis(ax: "Axes", metric: Metric) -> None:
    """The metric over rounds."""
    charts.whole_rounds(ax)
    ax.set_ylabel(metric.title)
    if metric.percent:
        charts.formatted(ax.yaxis, charts.percent)


def bands(
    groups: Sequence[Group],
    look: Mapping[str, Style],
    series: Callable[[Record], Mapping[int, float]],
    back: Callable[[float], float] = float,
) -> list[Line]:
    """Mean and interval over the seeds, round by round, of what ``back`` then undoes."""
    lines: list[Line] = []
    for group in groups:
        runs = [series(run) for run in group.runs.values()]
        rounds = sorted(set().union(*runs))
        found = [(r, group.interval(run[r] for run in runs if r in run)) for r in rounds]
        kept = [(r, value) for r, value in found if value is not None]
        if kept:
            banded = any(value.half is not None for _, value in kept)
            lines.append(
                Line(
                    group.label,
                    look[group.label],
                    [float(r) for r, _ in kept],
                    [back(value.mean) for _, value in kept],
                    [back(value.low) for _, value in kept] if banded else None,
                    [back(value.high) for _, value in kept] if banded else None,
                )
            )
    return lines


def level_axis(
    ax: "Axes", name: str, low: float | None, high: float | None, *, percent: bool = False
) -> None:
    """A linear y axis, within the limits that are given."""
    ax.set_ylabel(name)
    if percent:
        charts.formatted(ax.yaxis, charts.percent)
    ax.set_ylim(bottom=low, top=high)


def floored(values: Mapping[int, float]) -> dict[int, float]:
    """Values to be drawn on a logarithmic axis."""
    return {r: max(value, EXACT) for r, value in values.items()}


def wheel(count: int) -> list[str]:
    """Fill colours for stacked parts."""
    order = (PALETTE[0], PALETTE[4], PALETTE[5], PALETTE[2], PALETTE[3], PALETTE[1], PALETTE[6])
    return [order[k % len(order)] for k in range(count)]


def replies(record: Record, kind: str, key: str) -> dict[int, list[float]]:
    """Round → the number under ``key`` in every reply of that kind."""
    found: dict[int, list[float]] = {}
    for line in record.clients:
        value = number(line, key)
        if value is not None and line["kind"] == kind:
            found.setdefault(line["round"], []).append(value)
    return found


def _last_scores(runs: Sequence[Record], key: str) -> list[float]:
    """A score of every site's own model in the last evaluated round of each run."""
    by_run = [replies(run, "eval", key) for run in runs]
    return [value for rounds in by_run if rounds for value in rounds[max(rounds)]]


def five_numbers(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """5th, 25th, 50th, 75th and 95th percentile."""
    if len(values) < 2:
        only = values[0]
        return only, only, only, only, only
    cuts = quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[4], cuts[9], cuts[14], cuts[18]
