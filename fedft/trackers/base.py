"""What a tracker is: something that is told of a run, as it goes on.

Progress bars, the status page, TensorBoard and the run directory itself are trackers. None of them
changes a run, and only the run directory can end one: of any other that fails the run says so once
and goes on, see :mod:`fedft.trackers.told`.

A run can be killed at any instant and go on. What had been told of it may then be less than what was
committed, or more. Whoever goes on therefore begins with all that is committed
(:attr:`Start.committed`): a tracker that keeps something brings it in line with that, and from then
on hears every round once, in order, when it is committed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from fedft.core.record.lines import ClientLine, RoundLine, Summary


@dataclass(frozen=True, eq=False)
class Start:
    """A run that begins, or goes on.

    Attributes:
        run: its directory.
        folder: a folder of the run for the files of trackers, each in one of its own; not made yet.
        config: the resolved configuration, as the nested tables of ``config.toml``.
        committed: the rounds that are committed already, in order; all others count as not told.
    """

    run: Path
    folder: Path
    config: Mapping[str, Any]
    committed: Sequence[RoundLine]

    @property
    def round(self) -> int:
        """The last committed one; 0 before the first."""
        return self.committed[-1]["round"] if self.committed else 0


@runtime_checkable
class Tracker(Protocol):
    """Told of a run. A subclass overrides what it wants to hear; the rest passes it by.

    Calls come from one thread, one at a time. A run waits for each: one that talks to a network puts
    what it hears into a queue of its own.
    """

    def started(self, start: Start) -> None:
        """The workers are up, and rounds begin; told once, before any round."""

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """A round is committed.

        Args:
            line: its line of ``rounds.jsonl``; not to be changed.
            replies: its lines of ``clients.jsonl``; not to be changed.
        """

    def note(self, text: str) -> None:
        """Something the user should know; also before :meth:`started`, and after the last round."""

    def scoring(self, text: str) -> None:
        """How far the scoring of the test set is; several times a second while it takes long, and empty
        when it is over.
        """

    def finished(self, summary: Summary) -> None:
        """The run is over; no round follows. A process that is killed right here tells it again."""

    def close(self) -> None:
        """Nothing more is told in this process; the run is over, or goes on in another."""


_LISTS = ("cohort",)
"""Lists of a round's line of which the length is told."""
_TABLES = ("failures",)
"""The same of tables of lists."""
_LEFT_OUT = frozenset({"round", "layers", "spectrum", "pruning"})
"""What is an index, or too many numbers for a curve each."""


def numbers(line: RoundLine) -> dict[str, float]:
    """The numbers of a round by their path, as a curve each: ``eval/accuracy``, ``bytes/up``.

    Lists of clients are counted (``cohort``, ``failures/timeout``); what is not known, and what a line
    says layer by layer, is left out.
    """
    counted: dict[str, Any] = {
        **line,
        **{key: len(cast(list[str], line[key])) for key in _LISTS if key in line},
        **{key: {k: len(v) for k, v in line[key].items()} for key in _TABLES if key in line},
    }
    return dict(_leaves(counted))


def _leaves(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if key in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(cast(Mapping[str, object], value), f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            yield f"{prefix}{key}", float(value)
