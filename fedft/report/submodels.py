"""What layer pruning leaves of the model: the score of submodels beside that of the whole."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedft.report import charts
from fedft.report.charts import INK, Line, Style
from fedft.report.figures import Figure, band_note, curve, in_two_sizes, legend, score_axis
from fedft.report.formats import score
from fedft.report.groups import Group, Metric
from fedft.report.records import Record, clean, lookup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHOLE = "whole model"
_WHOLE_STYLE = Style(INK, "solid", "o", hollow=False)


def sizes(records: Sequence[Record]) -> tuple[int, ...]:
    """How many parts the submodels hold that any of the runs scored, ascending."""
    lines = (line.get("submodels", {}) for record in records for line in record.rounds)
    return tuple(sorted({int(size) for line in lines for size in line if _is_size(size)}))


def _is_size(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 5


def of_size(metric: Metric, size: int) -> tuple[str, str, str]:
    """Where the score of the submodel of this size stands in a line of ``rounds.jsonl``."""
    return ("submodels", str(size), metric.name)


def parts_of(records: Sequence[Record]) -> str:
    """What the sizes count: ``block`` or ``sublayer``; ``part`` where the runs differ in it."""
    pruned = [record.config for record in records if sizes([record])]
    found = {clean(lookup(config, "pruning", "granularity") or "block", 20) for config in pruned}
    return found.pop() if len(found) == 1 else "part"


def words(size: int, part: str) -> str:
    """``1 block``, ``3 blocks``."""
    return f"{size} {part}" + "s" * (size != 1)


def score_by_size(
    groups: Sequence[Group], metric: Metric, look: Mapping[str, Style]
) -> Figure | None:
    """The last score of every rule's submodels, by size, and of its whole model."""
    runs = [run for group in groups for run in group.runs.values()]
    if not (held := sizes(runs)):
        return None
    part = parts_of(runs)
    names = [words(size, part) for size in held] + [_WHOLE]
    keys = [of_size(metric, size) for size in held] + [metric.keys]
    lines = [line for group in groups if (line := _by_size(group, keys, look[group.label]))]

    def draw(ax: "Axes") -> None:
        charts.plot(ax, lines)
        score_axis(ax, metric)
        ax.set_xticks(range(len(names)), names)
        ax.set_xlabel("Evaluated with")
        charts.name_ends(ax, lines)

    ends = "; ".join(
        f"{line.label} "
        + ", ".join(
            f"{score(y, metric.percent)} with {names[int(x)].replace(_WHOLE, f'the {_WHOLE}')}"
            for x, y in zip(line.x, line.y, strict=True)
        )
        for line in lines
    )
    title = f"{metric.title} of submodels"
    alt = f"{title} and of the whole model, at the end: {ends}."
    caption = f"Last evaluation. {band_note(groups)}"
    return in_two_sizes("score-size", title, caption, alt, draw)


def _by_size(group: Group, keys: Sequence[tuple[str, ...]], style: Style) -> Line | None:
    found = [(float(x), group.interval(group.values(*k).values())) for x, k in enumerate(keys)]
    kept = [(x, value) for x, value in found if value is not None]
    if not kept:
        return None
    banded = any(value.half is not None for _, value in kept)
    return Line(
        group.label,
        style,
        [x for x, _ in kept],
        [value.mean for _, value in kept],
        [value.low for _, value in kept] if banded else None,
        [value.high for _, value in kept] if banded else None,
    )


def run_submodels(record: Record, metric: Metric) -> Figure | None:
    """The metric of one run per round, of its submodels and of its whole model."""
    if not (held := sizes([record])):
        return None
    part = parts_of([record])
    named = [(_WHOLE.capitalize(), _WHOLE_STYLE, metric.keys)]
    named += [
        (words(size, part).capitalize(), charts.numbered(slot), of_size(metric, size))
        for slot, size in enumerate(held)
    ]
    lines = [
        curve(label, style, values)
        for label, style, keys in named
        if (values := record.series(*keys))
    ]
    title = f"{metric.title} of submodels"
    alt = f"{title} per round. At the end: " + ", ".join(
        f"{line.label.lower()} {score(line.y[-1], metric.percent)}" for line in lines
    )
    with charts.canvas() as (figure, ax):
        charts.plot(ax, lines)
        score_axis(ax, metric)
        legend(figure, ax)
        return Figure("score-size", title, "", charts.svg(figure, "score-size", f"{alt}."))
