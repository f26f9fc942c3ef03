"""What there is to draw of the meters of some runs.

How ours are drawn stands in their files. Of others a run directory holds the descriptions, in
``environment.json``: they are read as a stranger's text, and nothing is imported for them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedft.core.meters import METERS
from fedft.core.meters.plots import Curve, Heat, Plot, plot_from
from fedft.report.records import Json, Record, clean, lookup, mapping, number

_KEY = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_NESTED = "meters"
_MOST = 40
"""Meters of others, and plots of each, that a report draws."""


@dataclass(frozen=True)
class Drawn:
    """One plot, and where its numbers stand.

    Attributes:
        name: unique on the page.
        path: of the reading, in a line of ``rounds.jsonl``.
        plot: how it is drawn.
    """

    name: str
    path: tuple[str, ...]
    plot: Plot

    def series(self, record: Record, one: Curve) -> dict[int, float]:
        """Round → number."""
        return record.series(*self.path, *one.keys)

    def layers(self, line: Json, shown: Heat) -> dict[str, float]:
        """Module path → number, of one round."""
        found = mapping(lookup(line, *self.path, *shown.keys))
        values = {clean(m, 80): number({m: value}, m, *shown.value) for m, value in found.items()}
        return {module: value for module, value in values.items() if value is not None}


def drawn(records: Sequence[Record]) -> list[Drawn]:
    """What there is to draw of some runs: our meters in their order, then those of others by name."""
    found = [
        one
        for kind in METERS
        for one in _plots(kind.key, kind.plots, () if kind.top else (_NESTED,))
    ]
    known = {kind.key for kind in METERS}
    others: dict[str, list[Plot]] = {}
    for record in records:
        for key, described in _described(record.environment.get("meters")):
            if key not in known and _KEY.fullmatch(key):
                plots = [plot for plot in map(plot_from, described) if plot is not None]
                others.setdefault(key, [_cleaned(plot) for plot in plots])
    for key in sorted(others)[:_MOST]:
        found += _plots(key, others[key], (_NESTED,))
    return found


def _described(rows: object) -> Iterator[tuple[str, list[object]]]:
    """(key, its plots) of a run's own account of its meters, as far as it can be read."""
    for row in rows[:_MOST] if isinstance(rows, list) else []:
        key, plots = mapping(row).get("key"), mapping(row).get("plots")
        if isinstance(key, str) and isinstance(plots, list):
            yield key, plots[:_MOST]


def _cleaned(plot: Plot) -> Plot:
    """With the texts of a stranger as plain printable text."""
    heat_ = plot.heat
    return replace(
        plot,
        title=clean(plot.title),
        quantity=clean(plot.quantity, 60),
        caption=clean(plot.caption, 300),
        quoted=tuple((clean(label, 36), keys) for label, keys in plot.quoted),
        curves=tuple(
            replace(
                c,
                label=clean(c.label, 36),
                note=clean(c.note, 300),
                name=clean(c.name, 60),
                title=clean(c.title),
                caption=clean(c.caption, 300),
                column=clean(c.column, 40),
            )
            for c in plot.curves
        ),
        heat=heat_ and replace(heat_, title=clean(heat_.title), quantity=clean(heat_.quantity, 60)),
    )


def _plots(key: str, plots: Sequence[Plot], within: tuple[str, ...]) -> Iterator[Drawn]:
    for k, plot in enumerate(plots):
        name = "-".join([*(["meter"] if within else []), key, *([str(k + 1)] if k else [])])
        yield Drawn(name, (*within, key), plot)
