"""What figures of one run and of several have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING

from fedft.report import charts
from fedft.report.charts import INK, MUTED, PALETTE, Line, Style
from fedft.report.formats import EXACT, bias_text, score
from fedft.report.groups import Group, Metric
from fedft.report.records import Record, clean, mapping, number, round_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_PHASES = ("plan", "train", "aggregate", "evaluate", "commit")

_CELLS = 3000
"""A heat map of more cells is embedded as an image."""


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
    spread = [(clean(label, 36), _last_scores(runs, metric.word)) for label, runs in named]
    spread = [(label, values) for label, values in spread if values]
    if not spread:
        return None
    alt = f"{metric.word.capitalize()} of the sites' own models. " + " ".join(
        f"{label}: median {score(median(v), metric.percent)}, lowest {score(min(v), metric.percent)}, "
        f"highest {score(max(v), metric.percent)}, {len(v)} sites."
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
        ax.set_xlabel(f"{metric.word.capitalize()} on the site's own held-out data")
        return Figure(
            "sites",
            f"Sites' own {metric.word}",
            "Box: middle half; line: 5th to 95th percentile; dots: sites beyond. Last evaluation, all seeds.",
            charts.svg(figure, "sites", alt),
        )


def phases(runs: Sequence[Record]) -> list[str]:
    """Names of the phases that took time, in the order of a round."""
    found = dict.fromkeys(
        phase for run in runs for line in run.rounds for phase in mapping(line.get("seconds"))
    )
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
        if value is not None and line.get("kind", "train") == kind:
            found.setdefault(round_number(line), []).append(value)
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


def layer_bias(layers: Mapping[str, object]) -> dict[str, float]:
    """Module path → relative bias, from ``bias.layers`` of a round."""
    found = {clean(m, 80): number(mapping(value), "relative") for m, value in layers.items()}
    return {module: value for module, value in found.items() if value is not None}


def _place(module: str) -> list[int]:
    """The numbers in a module's path: of its block, if it is in one."""
    return [int(part) for part in module.split(".") if part.isdigit()]


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the components that all of them share: ``layer.0.query`` → ``0.query``."""
    paths = [module.split(".") for module in modules]
    if len(paths) < 2 or len({len(path) for path in paths}) > 1:
        return list(modules)
    varying = [k for k in range(len(paths[0])) if len({path[k] for path in paths}) > 1]
    return [".".join(path[k] for k in varying) for path in paths]


def heat(
    columns: Mapping[str, Mapping[str, float]], *, name: str, title: str, xlabel: str, slanted: bool
) -> Figure | None:
    """Relative bias as darkness: layers from the first at the top, columns side by side.

    What is exact stays white, so that the shades are left for what differs.
    """
    seen = dict.fromkeys(module for column in columns.values() for module in column)
    # Rounds in which nobody held the first blocks come first where sites hold some blocks only.
    modules = sorted(seen, key=_place)
    values = [v for column in columns.values() for v in column.values()]
    biased = [v for v in values if v > EXACT]
    if not biased:
        return None
    means = {m: fmean(c[m] for c in columns.values() if m in c) for m in modules}
    worst = max(means, key=lambda m: means[m])
    alt = (
        f"{title}: relative bias of {len(modules)} layers in {len(columns)} columns, between "
        f"{bias_text(min(values))} and {bias_text(max(values))}; in the mean largest in {worst}."
    )
    caption = ["Darker is more."] + ["White: exact."] * (len(biased) < len(values))
    caption += ["Blank: nobody trained it."] * (len(values) < len(modules) * len(columns))
    caption += ["Mean over rounds and seeds."] * slanted
    with charts.canvas(4.7, min(7.5, max(3.4, 1.3 + 0.19 * len(modules)))) as (figure, ax):
        _shades(figure, ax, [[c.get(m) for c in columns.values()] for m in modules], biased)
        every = -(-len(modules) // 36)
        rows, short = range(0, len(modules), every), short_names(modules)
        ax.set_yticks([k + 0.5 for k in rows], [clean(short[k], 34) for k in rows], fontsize=7.5)
        columns_shown = range(0, len(columns), 1 if slanted else -(-len(columns) // 10))
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        names = [clean(list(columns)[k], 36) for k in columns_shown]
        ax.set_xticks([k + 0.5 for k in columns_shown], names, **turn)  # type: ignore[arg-type]
        ax.set_xlabel(xlabel)
        drawing = charts.svg(figure, name, alt)
        return Figure(name, title, " ".join(caption), drawing)


def _shades(
    figure: "Canvas", ax: "Axes", grid: Sequence[Sequence[float | None]], biased: Sequence[float]
) -> None:
    """The cells of a heat map and its scale: logarithmic where the values span a decade."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(biased), max(biased)
    wide = high > 10 * low
    nan = float("nan")
    cells = [[nan if v is None or v <= EXACT else v for v in row] for row in grid]
    mesh = ax.pcolormesh(
        range(len(grid[0]) + 1),
        range(len(grid) + 1),
        cells,
        norm=LogNorm(low, high) if wide else Normalize(0, high),
        cmap=matplotlib.colormaps["YlGnBu"],
        edgecolors="white",
        linewidth=0.4,
        rasterized=len(grid) * len(grid[0]) > _CELLS,
    )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.grid(visible=False)
    if wide:
        charts.logarithmic(bar.ax, "y", None, "Relative bias")
    else:
        bar.ax.set_ylabel("Relative bias")
