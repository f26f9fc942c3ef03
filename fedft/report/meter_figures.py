"""The figures of the meters, of one run and of several, drawn from what each meter says of itself.

No meter is known here; see :mod:`fedft.report.drawn` for where the descriptions come from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import exp, log
from statistics import fmean
from typing import TYPE_CHECKING

from fedft.core.meters.plots import Curve, Heat, Plot
from fedft.report import charts
from fedft.report.charts import PALETTE, Style
from fedft.report.drawn import Drawn, drawn
from fedft.report.figures import (
    Figure,
    band_note,
    bands,
    curve,
    floored,
    in_two_sizes,
    legend,
    level_axis,
)
from fedft.report.formats import EXACT, bias_text, score, significant, spread
from fedft.report.groups import Group
from fedft.report.heat_maps import Shades, heat
from fedft.report.records import Record
from fedft.report.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = (
    Style(PALETTE[0], "solid", "o", hollow=False),
    Style(PALETTE[1], (0, (4, 2)), "s", hollow=True),
    Style(PALETTE[2], (0, (2, 1)), "^", hollow=False),
)
_BETTER = {"higher": " Higher is better.", "lower": " Lower is better.", None: ""}


# ── one run ───────────────────────────────────────────────────────────────────────────────────


def of_run(record: Record) -> list[Figure]:
    """The figures of one run for which it has data: curves first, then layers."""
    plots = drawn([record])
    figures = [
        *(run_curves(record, one) for one in plots),
        *(run_heat(record, one) for one in plots),
    ]
    return [figure for figure in figures if figure is not None]


def run_curves(record: Record, one: Drawn) -> Figure | None:
    """The numbers of a meter, round by round."""
    plot = one.plot
    shown = [
        (c, style, values)
        for c, style in zip(plot.curves, _styles(len(plot.curves)), strict=True)
        if (values := _fitting(plot, one.series(record, c)))
        and (c.above is None or any(v > c.above for v in values.values()))
    ]
    if all(c.part for c, *_ in shown):
        return None
    lines = [curve(c.label, style, _raised(plot, values)) for c, style, values in shown]
    alt = _run_alt(plot, [(c, list(values.values())) for c, _, values in shown])
    with charts.canvas() as (figure, ax):
        charts.plot(ax, lines)
        _axis(ax, plot, [y for line in lines for y in line.y], plot.quantity)
        charts.whole_rounds(ax)
        if len(lines) > 1 or sum(not c.part for c in plot.curves) > 1:
            legend(figure, ax)
        drawing = charts.svg(figure, one.name, alt)
        return Figure(one.name, plot.title, _run_caption(record, one, shown), drawing)


def run_heat(record: Record, one: Drawn) -> Figure | None:
    """The numbers of a meter by layer and round."""
    if (shown := one.plot.heat) is None:
        return None
    columns = {str(line["round"]): one.layers(line, shown) for line in record.rounds}
    return _heat(one, shown, {r: c for r, c in columns.items() if c}, of_rounds=True)


def _styles(count: int) -> list[Style]:
    more = (charts.numbered(slot) for slot in range(len(_STYLES), count))
    return [*_STYLES[:count], *more]


def _run_alt(plot: Plot, shown: Sequence[tuple[Curve, Sequence[float]]]) -> str:
    show = _words(plot)
    whole = [
        f"{c.label.lower()} {show(fmean(values))} in the mean, {show(max(values))} at most"
        for c, values in shown
        if not c.part
    ]
    parts = [
        f"{c.label.capitalize()} of it: {show(fmean(v))} in the mean." for c, v in shown if c.part
    ]
    return " ".join([f"{plot.title} per round: {'; '.join(whole)}.", *parts])


def _run_caption(
    record: Record, one: Drawn, shown: Sequence[tuple[Curve, Style, Mapping[int, float]]]
) -> str:
    plot = one.plot
    quoted = [(name, record.mean(*one.path, *keys)) for name, keys in plot.quoted]
    means = ", ".join(f"mean {name} {mean:.4f}" for name, mean in quoted if mean is not None)
    caption = f"{plot.caption.removesuffix('.')}; {means}." if means else plot.caption
    notes = [c.note for c, *_ in shown if c.note]
    return " ".join([caption, *notes]).strip() + _BETTER[plot.better]


# ── several runs ──────────────────────────────────────────────────────────────────────────────


def compared(groups: Sequence[Group], look: Mapping[str, Style], *, leading: bool) -> list[Figure]:
    """The meters' numbers per round for every rule: those that lead, or the others."""
    found = [
        curve_bands(groups, look, one, c)
        for one in drawn(_runs(groups))
        for c in one.plot.curves
        if c.name and c.leading == leading
    ]
    return [figure for figure in found if figure is not None]


def heats(groups: Sequence[Group]) -> list[Figure]:
    """The meters' numbers by layer and rule, means over rounds and seeds."""
    found = [
        layer_heat(groups, one, one.plot.heat) for one in drawn(_runs(groups)) if one.plot.heat
    ]
    return [figure for figure in found if figure is not None]


def columns(groups: Sequence[Group]) -> dict[str, Callable[[Interval | None], str]]:
    """Titles of the columns that the meters have in the table, and how each shows its value."""
    return {
        c.column: _cell(one.plot)
        for one in drawn(_runs(groups))
        for c in one.plot.curves
        if c.column
    }


def cells(group: Group) -> dict[str, Interval | None]:
    """Title of a column → the mean over the rounds of one group's runs."""
    return {
        c.column: group.interval(group.means(*one.path, *c.keys).values())
        for one in drawn(list(group.runs.values()))
        for c in one.plot.curves
        if c.column
    }


def curve_bands(
    groups: Sequence[Group], look: Mapping[str, Style], one: Drawn, shown: Curve
) -> Figure | None:
    """One number of a meter per round, for every rule, with bands over the seeds."""
    plot, factors = one.plot, one.plot.axis in ("ratio", "log")

    def series(run: Record) -> dict[int, float]:
        values = _raised(plot, _fitting(plot, one.series(run, shown)))
        # Geometric means: such numbers are compared by factors.
        return {r: log(v) for r, v in values.items()} if factors else values

    lowest = EXACT if plot.axis == "ratio" else 1e-300
    lines = bands(groups, look, series, partial(_bounded_exp, lowest) if factors else float)
    if not lines:
        return None
    show = _words(plot, "zero to rounding")
    alt = f"{shown.title}, in the last round: " + ", ".join(
        f"{line.label} {show(line.y[-1])}" for line in lines
    )

    def draw(ax: "Axes") -> None:
        charts.plot(ax, lines)
        _axis(ax, plot, [y for line in lines for y in line.y], shown.name)
        charts.whole_rounds(ax)
        charts.name_ends(ax, lines)

    mean = " Geometric mean." * factors
    note = f"{shown.caption}{_BETTER[plot.better]}{mean} {band_note(groups)}".strip()
    name = _identifier("-".join([one.name, *shown.keys]))
    return in_two_sizes(name, shown.title or plot.title, note, f"{alt}.", draw)


def layer_heat(groups: Sequence[Group], one: Drawn, shown: Heat) -> Figure | None:
    """A number by layer and rule."""
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        seen: dict[str, list[float]] = {}
        for run in group.runs.values():
            for line in run.rounds:
                for module, value in one.layers(line, shown).items():
                    seen.setdefault(module, []).append(value)
        if seen:
            found[group.label] = {m: fmean(values) for m, values in seen.items()}
    return _heat(one, shown, found, of_rounds=False)


def _runs(groups: Sequence[Group]) -> list[Record]:
    return [run for group in groups for run in group.runs.values()]


# ── both ──────────────────────────────────────────────────────────────────────────────────────


def _heat(
    one: Drawn, shown: Heat, found: Mapping[str, Mapping[str, float]], *, of_rounds: bool
) -> Figure | None:
    return heat(
        found,
        name=f"{one.name}-layers",
        title=f"{shown.title} and round" if of_rounds else shown.title,
        xlabel="Round" if of_rounds else "",
        slanted=not of_rounds,
        shades=Shades(
            quantity=shown.quantity,
            floor=EXACT if one.plot.axis == "ratio" else None,
            show=_words(one.plot, "exact"),
        ),
    )


def _axis(ax: "Axes", plot: Plot, values: Sequence[float], name: str) -> None:
    if plot.axis == "ratio":
        charts.ratio(ax, "y", values, EXACT, name)
    elif plot.axis == "log":
        charts.logarithmic(ax, "y", None, name)
    else:
        level_axis(ax, name, plot.low, plot.high, percent=plot.axis == "share")


def _fitting(plot: Plot, values: Mapping[int, float]) -> dict[int, float]:
    """Without what a logarithmic axis has no place for."""
    return {r: v for r, v in values.items() if plot.axis != "log" or v > 0}


def _raised(plot: Plot, values: Mapping[int, float]) -> dict[int, float]:
    return floored(values) if plot.axis == "ratio" else dict(values)


def _words(plot: Plot, exact: str = "zero") -> Callable[[float], str]:
    """How a number of the plot reads in a sentence."""
    if plot.axis == "ratio":
        return lambda value: bias_text(value).replace("exact", exact)
    if plot.axis == "share":
        return lambda value: score(value, percent=True)
    return significant


def _cell(plot: Plot) -> Callable[[Interval | None], str]:
    if plot.axis == "ratio":
        return lambda value: bias_text(value.mean if value else None)
    return lambda value: spread(value, plot.axis == "share")


def _bounded_exp(lowest: float, value: float) -> float:
    """Back from the logarithm; a band over few seeds can be wider than any number."""
    return exp(min(max(value, log(lowest)), 300.0))


def _identifier(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)[:120]
