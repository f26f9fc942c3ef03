"""The summary table of a comparison, for the terminal, Markdown, LaTeX and JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedft.report import meter_figures
from fedft.report.formats import (
    EXACT,
    bias_text,
    bytes_text,
    forgotten_text,
    score,
    seconds_text,
    spread,
)
from fedft.report.groups import (
    Group,
    Metric,
    baseline_name,
    baseline_of,
    further,
    group,
    metric_of,
    traffic,
)
from fedft.report.privacy import UNITS, epsilon_text, epsilon_title, largest, terms
from fedft.report.records import Record, load
from fedft.report.statistics import CONFIDENCE, Interval
from fedft.report.submodels import of_size, parts_of, sizes, words
from fedft.report.timing import common_target, curve, time_to


@dataclass(frozen=True)
class Part:
    """What a submodel of one size scores, see :class:`Row`.

    Attributes:
        score: in the last evaluated round.
        gain: its difference to the baseline's submodel of that size, paired by seed.
    """

    score: Interval | None
    gain: Interval | None


@dataclass(frozen=True)
class Row:
    """One rule, or arm, over its seeds. Shares, bytes and seconds in their own units, not in percent.

    Attributes:
        label, strategy: of the group.
        seeds: that were run, ascending.
        unfinished: how many of them have no summary yet.
        score: the metric of the last evaluated round.
        start: the same before the first round; None where it was not asked for.
        further: title of another metric of the test set → its value in the last evaluated round.
        gain: its difference to the baseline, paired by seed; None for the baseline.
        sites: the same score of each site's own model on its own held-out part, mean over sites.
        sites_gain: the same difference for ``sites``.
        submodels: number of parts held → what the submodel scores; empty without pruning.
        bias: relative aggregation bias, mean over the rounds; None where it cannot be known.
        forgotten: the part of it along what sites of low rank were not sent, the same mean.
        meters: title of a column that a meter asks for → the mean over the rounds.
        epsilon: unit of a privacy promise → the largest ε of the runs, None where one has no bound;
            empty without a promise.
        traffic: bytes up and down, a run.
        seconds: wall-clock, a run.
        simulated: seconds on the fleet's clock, a run; None where there was none.
        device_seconds: the same summed over the devices: what the run cost them.
        time_to_target: seconds on that clock until the table's target was reached.
    """

    label: str
    strategy: str
    seeds: tuple[int, ...]
    unfinished: int
    score: Interval | None
    gain: Interval | None
    sites: Interval | None
    sites_gain: Interval | None
    submodels: Mapping[int, Part]
    bias: Interval | None
    forgotten: Interval | None
    meters: Mapping[str, Interval | None]
    epsilon: Mapping[str, float | None]
    traffic: Interval | None
    seconds: Interval | None
    simulated: Interval | None
    device_seconds: Interval | None
    time_to_target: Interval | None
    start: Interval | None = None
    further: Mapping[str, Interval | None] = field(default_factory=dict[str, Interval | None])


_Column = tuple[str, Callable[[Row], str]]
"""A title, and what a row shows under it."""


@dataclass(frozen=True)
class Table:
    """The rows, and how they are shown.

    Attributes:
        metric: of the score.
        rows: the baseline's first.
        baseline: what differences are taken to.
        confidence: level of the intervals.
        target: the best level of the metric that every run reached; None without a fleet's clock.
        parts: what the sizes of submodels count.
        privacy: what the ε are about; empty without any.
        shown: title of a meter's column → how it shows its value.
        others: the other metrics of the test set.
    """

    metric: Metric
    rows: tuple[Row, ...]
    baseline: str
    confidence: float = CONFIDENCE
    target: float | None = None
    parts: str = "block"
    privacy: str = ""
    shown: Mapping[str, Callable[[Interval | None], str]] = field(default_factory=dict[str, Any])
    others: Sequence[Metric] = ()

    def header(self) -> list[str]:
        """Column titles, for as many columns as have data."""
        return [title for title, _ in self._columns()]

    def cells(self) -> list[list[str]]:
        """One list of texts a row, under :meth:`header`."""
        return [[show(row) for _, show in self._columns()] for row in self.rows]

    def markdown(self) -> str:
        """A pipe table."""
        header = self.header()
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines = [
            [_markdown(c) for c in header],
            rule,
            *([_markdown(c) for c in r] for r in self.cells()),
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """A ``tabular`` for the booktabs package."""
        header = self.header()
        first, *rest = [" & ".join(map(_latex, r)) + r" \\" for r in [header, *self.cells()]]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
        lines = [begin, r"\toprule", first, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, object]]:
        """Plain numbers, for scripts."""
        shared = {"metric": self.metric.title, "target": self.target}
        return [{**shared, **asdict(row)} for row in self.rows]

    def note(self) -> str:
        """What the numbers mean."""
        return f"{self._seeds_note()} {self.privacy}".rstrip()

    def _seeds_note(self) -> str:
        counts = sorted({len(row.seeds) for row in self.rows})
        if counts[-1] == 1:
            return "One seed (n = 1): no interval can be given and no difference told from chance."
        seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        text = f"Mean ± half of the {100 * self.confidence:.3g} % confidence interval (Student's t) over {seeds}."
        if self._any(lambda row: row.gain):
            unit = "percentage points" if self.metric.percent else "the metric's own unit"
            text += f" Differences to {self.baseline} are paired by seed, in {unit}."
        if self.target is not None:
            text += (
                f" {score(self.target, self.metric.percent)} is the best that every run reached."
            )
        return text

    def _columns(self) -> list[_Column]:
        m = self.metric
        columns: list[_Column] = [
            ("Rule", lambda r: f"{r.label} (unfinished)" if r.unfinished else r.label),
            ("Seeds", lambda r: str(len(r.seeds))),
            (f"{m.title} (%)" if m.percent else m.title, lambda r: spread(r.score, m.percent)),
        ]
        if self._any(lambda r: r.gain):
            title = f"Δ to {self.baseline}"
            columns += [(title, lambda r: spread(r.gain, m.percent, signed=True))]
        if self._any(lambda r: r.start):
            columns += [("At the start", lambda r: spread(r.start, m.percent))]
        columns += [self._other(one) for one in self.others]
        if self._any(lambda r: r.sites):
            title = f"Clients' own {m.word} (%)" if m.percent else f"Clients' own {m.word}"
            columns += [(title, lambda r: spread(r.sites, m.percent))]
        if self._any(lambda r: r.sites_gain):
            columns += [("Δ clients' own", lambda r: spread(r.sites_gain, m.percent, signed=True))]
        columns += [c for size in self._sizes() for c in self._submodel(size)]
        if self._any(lambda r: r.bias):
            columns += [("Relative bias", lambda r: bias_text(r.bias.mean if r.bias else None))]
        if any(r.forgotten is not None and r.forgotten.mean > EXACT for r in self.rows):
            columns += [
                ("Forgotten", lambda r: forgotten_text(r.forgotten.mean if r.forgotten else None))
            ]
        columns += [self._meter(title) for title in self.shown if self._read(title)]
        columns += [self._epsilon(unit) for unit in UNITS if self._promised(unit)]
        if self.target is not None:
            title = f"Time to {score(self.target, m.percent)}"
            columns += [(title, lambda r: _seconds(r.time_to_target))]
        if self._any(lambda r: r.simulated):
            columns += [
                ("Simulated time", lambda r: _seconds(r.simulated)),
                ("Device time", lambda r: _seconds(r.device_seconds)),
            ]
        columns += [
            ("Traffic a run", lambda r: bytes_text(r.traffic.mean if r.traffic else None)),
            ("Time a run", lambda r: _seconds(r.seconds)),
        ]
        return columns

    def _other(self, one: Metric) -> _Column:
        title = f"{one.title} (%)" if one.percent else one.title
        return title, lambda row: spread(row.further.get(one.title), one.percent)

    def _read(self, title: str) -> bool:
        return any(row.meters.get(title) for row in self.rows)

    def _meter(self, title: str) -> _Column:
        return title, lambda row: self.shown[title](row.meters.get(title))

    def _promised(self, unit: str) -> bool:
        return any(unit in row.epsilon for row in self.rows)

    def _epsilon(self, unit: str) -> _Column:
        def show(row: Row) -> str:
            return epsilon_text(row.epsilon[unit]) if unit in row.epsilon else "—"

        return epsilon_title(unit), show

    def _sizes(self) -> list[int]:
        return sorted({size for row in self.rows for size in row.submodels})

    def _submodel(self, size: int) -> list[_Column]:
        """The columns of one size of submodel."""

        def part(row: Row) -> Part:
            return row.submodels.get(size, Part(None, None))

        percent, what = self.metric.percent, words(size, self.parts)
        title = f"With {what}" + " (%)" * percent
        columns: list[_Column] = [(title, lambda r: spread(part(r).score, percent))]
        if self._any(lambda r: part(r).gain):
            shown: _Column = (
                f"Δ with {what}",
                lambda r: spread(part(r).gain, percent, signed=True),
            )
            columns.append(shown)
        return columns

    def _any(self, field: Callable[[Row], Interval | None]) -> bool:
        return any(field(row) for row in self.rows)


def summarise(run_dirs: Sequence[Path], confidence: float | None = None) -> Table:
    """The summary table of some runs: run directories, or folders of them.

    Args:
        run_dirs: run directories, or folders of them.
        confidence: level of the intervals, see :func:`~fedft.report.groups.group`.

    Raises:
        ConfigError: a path is not a run directory, two runs have the same rule and seed, or an
            interval is asked for where there is one seed.
        IntegrityError: a run directory is damaged.
    """
    records, _ = load(run_dirs)
    return tabulate(records, confidence)


def tabulate(records: Sequence[Record], confidence: float | None = None) -> Table:
    """The summary table of runs that have been read."""
    metric = metric_of(records)
    groups = group(records, confidence)
    target = common_target(records, metric)
    others = tuple(further(records, metric))
    rows = tuple(_row(g, baseline_of(g, groups), metric, target, others) for g in groups)
    name, parts = baseline_name(groups), parts_of(records)
    shown = meter_figures.columns(groups)
    return Table(
        metric, rows, name, groups[0].confidence, target, parts, terms(records), shown, others
    )


def _row(
    one: Group,
    baseline: Group | None,
    metric: Metric,
    target: float | None,
    others: Sequence[Metric],
) -> Row:
    score, sites = one.values(*metric.keys), one.values(*metric.of_sites)
    runs = list(one.runs.values())
    return Row(
        label=one.label,
        strategy=one.strategy,
        seeds=tuple(one.runs),
        unfinished=sum(run.summary is None for run in runs),
        score=one.interval(score.values()),
        gain=one.gain(baseline, *metric.keys),
        sites=one.interval(sites.values()),
        sites_gain=one.gain(baseline, *metric.of_sites),
        submodels={
            size: Part(one.interval(one.values(*keys).values()), one.gain(baseline, *keys))
            for size in sizes(runs)
            for keys in [of_size(metric, size)]
        },
        bias=one.interval(one.means("bias", "relative").values()),
        forgotten=one.interval(one.means("bias", "forgotten").values()),
        meters=meter_figures.cells(one),
        epsilon=largest(runs),
        traffic=one.interval(b for b in map(traffic, runs) if b is not None),
        seconds=one.interval(s for s in (run.seconds() for run in runs) if s is not None),
        simulated=one.interval(one.values("clock", "elapsed").values()),
        device_seconds=one.interval(
            run.total("clock", "device_seconds") for run in runs if run.series("clock", "elapsed")
        ),
        time_to_target=one.interval(_times_to(runs, metric, target)),
        start=one.interval(one.values(*metric.of_start).values())
        if metric.keys[0] == "eval"
        else None,
        further={m.title: one.interval(one.values(*m.keys).values()) for m in others},
    )


def _times_to(runs: Sequence[Record], metric: Metric, target: float | None) -> list[float]:
    """Of the runs that reached the target."""
    if target is None:
        return []
    found = (time_to(curve(run, metric), target, higher=metric.higher) for run in runs)
    return [seconds for seconds in found if seconds is not None]


def _seconds(value: Interval | None) -> str:
    return seconds_text(value.mean if value else None)


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "—": "---",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
