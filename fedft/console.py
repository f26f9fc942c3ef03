"""What a run looks like while it runs: a progress bar on a terminal, plain lines elsewhere.

Results go to standard output, everything else to standard error. With ``--json`` standard output
holds one JSON object and nothing else.
"""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedft.core.errors import FedftError
from fedft.core.privacy import WORDS
from fedft.trackers import Start, Tracker

if TYPE_CHECKING:
    from fedft.api import Run
    from fedft.core.metrics import Declared
    from fedft.core.record.lines import ClientLine, Promise, RoundLine, Spent, Summary
    from fedft.report.tables import Table as ReportTable
    from fedft.server.compare import Cell

_TELL_S = 10.0
"""Between two lines on an evaluation that takes long."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: object) -> str:
    """Text from elsewhere, with control characters (ANSI escapes) and broken Unicode made harmless."""
    return _CONTROL.sub("�", str(text).encode(errors="replace").decode())


def safe(text: object) -> str:
    """The same, with markup made harmless, too."""
    return escape(clean(text))


class RunConsole(Tracker):
    """Watches a run and tells the terminal about it. A context manager.

    Args:
        json_output: keep standard output for one JSON object.
        real: the clients are real ones; neither their number nor an engine is the server's.
    """

    def __init__(self, *, json_output: bool = False, real: bool = False) -> None:
        self._json = json_output
        self._real = real
        self._err = Console(stderr=True, highlight=False, emoji=False)
        self._out = Console(highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._begun = time.monotonic()
        self._scored: float | None = None  # when a line was said of an evaluation under way

    def __enter__(self) -> "RunConsole":
        workers = "" if self._real else ", starting workers"
        self.note(f"loading the model and the data{workers} …")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def started(self, start: Start) -> None:
        """Rounds begin."""
        config, rounds, engine = start.config, start.config["rounds"], start.config["engine"]
        per_round, kind = rounds["per-round"], engine["backend"]
        clients = f"{config['fleet']['clients']} clients, {per_round} a round"
        if self._real:
            clients, kind = f"{per_round} clients a round", "over gRPC"
        self.note(
            f"{config['strategy']['name']}: {clients}, {rounds['count']} rounds; {kind}, "
            f"{engine['precision']}, cohorts of {engine['cohort']} → {start.run}"
        )
        if start.round:
            self.note(f"going on after round {start.round}")
        if self._err.is_terminal and not self._json:
            self._bar = _bar(self._err, "round", rounds["count"], start.round)

    def scoring(self, text: str) -> None:
        """The test set is being scored: on the bar, or a line now and then."""
        if self._bar is not None:
            if text:
                self._bar.update(self._bar.task_ids[0], scores=text)
            return
        now = time.monotonic()
        if not text:
            self._scored = None
        elif self._scored is None:
            self._scored = now
        elif now - self._scored >= _TELL_S:
            self._scored = now
            self.note(text)

    def round(self, line: "RoundLine", replies: "Sequence[ClientLine]") -> None:
        """A round is committed."""
        shown = _round_text(line)
        if self._bar is None:
            self.note(f"round {line['round']:>4}  {shown}")
        else:
            self._bar.update(self._bar.task_ids[0], completed=line["round"], scores=shown)
        for reason, sites in line["failures"].items():
            self.note(f"round {line['round']}: {reason}: {', '.join(sites)}")

    def note(self, text: str) -> None:
        """One line for the reader; what of it comes from elsewhere is made harmless here."""
        if not self._json:
            self._err.print(clean(text), soft_wrap=True, markup=False)

    def result(self, run: "Run") -> None:
        """The end: a table, or the summary as JSON."""
        if self._json:
            print_json({**run.metrics, "run_dir": str(run.directory)})
            return
        metrics, traffic = run.metrics, run.metrics["bytes"]
        self._out.print(_table(metrics, run.declared))
        self._out.print(
            f"{metrics['status']}: {(traffic['up'] + traffic['down']) / 2**20:.1f} MiB on the wire, "
            f"{metrics['seconds']:.1f} s in rounds, {time.monotonic() - self._begun:.1f} s in all"
        )
        for line in _promises(metrics):
            self._out.print(line, soft_wrap=True)
        self._out.print(f"run directory  {safe(run.directory)}", soft_wrap=True)
        page = run.directory / "report" / "report.html"
        if page.exists():
            self._out.print(f"report         {safe(page)}", soft_wrap=True)


class ComparisonConsole:
    """Watches a grid of runs. A context manager.

    Args:
        total: runs in the grid.
        json_output: keep standard output for one JSON object.
    """

    def __init__(self, total: int, json_output: bool = False) -> None:
        self._json = json_output
        self._total = total
        self._err = Console(stderr=True, highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._fractions: dict[str, float] = {}  # of each run under way, by its folder's name

    def __enter__(self) -> "ComparisonConsole":
        if self._err.is_terminal and not self._json:
            self._bar = _bar(self._err, "run", self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line for the reader."""
        if not self._json:
            self._err.print(clean(text), soft_wrap=True, markup=False)

    def cell(self, cell: "Cell") -> "_CellTracker":
        """What watches one run of the grid."""
        if self._bar is None:
            self.note(f"{cell.arm}, seed {cell.seed} → {cell.path}")
        return _CellTracker(self, cell)

    def advance(self, cell: "Cell", rounds_done: int, scores: str) -> None:
        """A round of a run is committed."""
        done = rounds_done / cell.config.rounds.count
        if self._bar is None:
            if scores:
                self.note(f"  round {rounds_done:>4}  {scores}")
            return
        before = sum(self._fractions.values())
        self._fractions[cell.path.name] = done
        self._bar.update(
            self._bar.task_ids[0],
            advance=sum(self._fractions.values()) - before,
            scores=f"{cell.path.name}  {scores}",
        )

    def result(self, table: "ReportTable", folder: Path) -> None:
        """The end: the table of rules, or the same as JSON."""
        if self._json:
            print_json({"run_dir": str(folder), "rules": table.to_json(), "note": table.note()})
            return
        shown = Table(show_header=True, header_style="bold", caption=table.note())
        for index, title in enumerate(table.header()):
            first = index == 0
            shown.add_column(title, justify="left" if first else "right", no_wrap=first)
        for cells in table.cells():
            shown.add_row(*map(safe, cells))
        piped = None if sys.stdout.isatty() else 160  # a file has no width to keep to
        Console(highlight=False, emoji=False, width=piped).print(shown)
        print(f"runs  {folder}")


class _CellTracker(Tracker):
    """Passes the rounds of one run on to its :class:`ComparisonConsole`."""

    def __init__(self, console: ComparisonConsole, cell: "Cell") -> None:
        self._console = console
        self._cell = cell

    def round(self, line: "RoundLine", replies: "Sequence[ClientLine]") -> None:
        """A round is committed."""
        scores = _round_text(line) if "eval" in line else ""
        self._console.advance(self._cell, line["round"], scores)

    def note(self, text: str) -> None:
        """One line for the reader."""
        self._console.note(f"{self._cell.path.name}: {text}")


def _bar(console: Console, what: str, total: int, completed: int = 0) -> Progress:
    """A running progress bar with one task, whose field ``scores`` is shown beside it."""
    bar = Progress(
        TextColumn(what),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[scores]}"),
        TimeElapsedColumn(),
        console=console,
    )
    bar.start()
    bar.add_task(what, total=total, completed=completed, scores="")
    return bar


def print_error(error: FedftError) -> None:
    """An expected error: what, and what to do about it."""
    text = "\n".join(safe(line) for line in str(error).splitlines())
    Console(stderr=True, highlight=False, emoji=False).print(
        f"[bold red]error[/] {text}", soft_wrap=True
    )


def print_json(value: object) -> None:
    """One JSON object to standard output."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _round_text(line: "RoundLine") -> str:
    loss = line["train"]["loss"]
    start = [f"{name} {_decimal(value)}" for name, value in line.get("start", {}).items()]
    parts = [f"start: {'  '.join(start)};"] if start else []
    parts += [f"loss {loss:.3f}" if loss is not None else "loss –"]
    if scores := line.get("eval"):
        parts += [f"test {name} {_decimal(value)}" for name, value in scores.items()]
    parts += [
        f"ε by {WORDS[unit]} {_epsilon(spent)}" for unit, spent in _by_unit(line.get("privacy"))
    ]
    return "  ".join([*parts, f"{sum(line['seconds'].values()):.1f} s"])


def _decimal(value: float | None) -> str:
    """A score; a dash where it is not defined."""
    return "–" if value is None or isnan(value) else f"{value:.3f}"


def _by_unit(promise: "Promise | None") -> "list[tuple[str, Spent]]":
    promise = promise or {}
    found = ("site", promise.get("site")), ("example", promise.get("example"))
    return [(unit, spent) for unit, spent in found if spent is not None]


def _epsilon(spent: "Spent") -> str:
    epsilon = spent["epsilon"]
    return "∞" if epsilon is None else f"{epsilon:.2f}"


def _table(metrics: "Summary", declared: Sequence["Declared"]) -> Table:
    table = Table(title=None, show_header=True, header_style="bold")
    table.add_column("")
    for column in ("round", "loss", "score"):
        table.add_column(column, justify="right")
    last = {"round": metrics["rounds"], **(metrics["final"] or {})}
    for name, scores in (("best", metrics["best"]), ("last", last)):
        if scores:
            table.add_row(
                name, str(int(scores["round"])), f"{scores['loss']:.4f}", _score(scores, declared)
            )
    return table


def _promises(metrics: "Summary") -> list[str]:
    if "privacy" not in metrics:
        return []
    from fedft.report.privacy import promise

    return [
        f"privacy by {WORDS[unit]}: {promise(spent)}"
        for unit, spent in _by_unit(metrics["privacy"])
    ]


def _score(scores: Mapping[str, float], declared: Sequence["Declared"]) -> str:
    found = [d for d in declared if d.name in scores]
    return "  ".join(f"{d.title} {d.shown(scores[d.name])}" for d in found)
