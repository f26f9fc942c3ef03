"""Telling several trackers, of which none can end the run."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.trackers.base import Start, Tracker

logger = logging.getLogger(__name__)

_LONGEST = 300


class Told(Tracker):
    """Tells some trackers, in order, and goes on where one of them fails.

    The first failure of a tracker is told to the others, its further ones are counted. One that fails
    when the run starts has nothing to write to, and hears nothing more.

    Args:
        trackers: to be told.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._deaf: set[int] = set()
        self._over = self._closed = False
        self._counts: Counter[int] = Counter()

    @property
    def failures(self) -> Mapping[str, int]:
        """Name of a tracker → how many calls of it failed; nothing of one that never did."""
        named = Counter[str]()
        for index, count in self._counts.items():
            named[self._name(index)] += count
        return named

    def started(self, start: Start) -> None:
        """Tells all of them."""
        for index in self._tell("when the run started", lambda tracker: tracker.started(start)):
            self._deaf.add(index)

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """Tells those that are left.

        Raises:
            RuntimeError: the run is over.
        """
        if self._over:
            raise RuntimeError(f"round {line['round']} was told after the end of the run")
        self._tell(f"in round {line['round']}", lambda tracker: tracker.round(line, replies))

    def note(self, text: str) -> None:
        """Tells those that are left."""
        self._tell("over a note", lambda tracker: tracker.note(text))

    def scoring(self, text: str) -> None:
        """Tells those that are left."""
        self._tell("over the progress of an evaluation", lambda tracker: tracker.scoring(text))

    def finished(self, summary: Summary) -> None:
        """Tells those that are left, once; and how often each of them failed."""
        if self._over:
            raise RuntimeError("the end of the run was told before")
        self._over = True
        self._tell("at the end of the run", lambda tracker: tracker.finished(summary))
        for name, count in self.failures.items():
            if count > 1:
                self.note(f"the tracker {name} failed {count} times; what it shows has gaps")

    def close(self) -> None:
        """Tells all of them, those that failed too; once more does nothing."""
        if not self._closed:
            self._closed = True
            self._deaf.clear()
            self._tell("when it was closed", lambda tracker: tracker.close())

    def _tell(self, when: str, call: Callable[[Tracker], None]) -> list[int]:
        """Positions of the trackers that failed."""
        failed: list[int] = []
        for index, tracker in enumerate(self._trackers):
            if index in self._deaf:
                continue
            try:
                call(tracker)
            except Exception as error:
                failed.append(index)
                self._failed(index, when, error)
        return failed

    def _failed(self, index: int, when: str, error: Exception) -> None:
        name = self._name(index)
        self._counts[index] += 1
        if self._counts[index] > 1:
            return
        what = f"{type(error).__name__}: {error}"[:_LONGEST]
        logger.warning("the tracker %s failed %s", name, when, exc_info=error)
        if self._closed:
            return
        text = f"the tracker {name} failed {when}: {what}; the run goes on, and this is told once"
        for other, tracker in enumerate(self._trackers):
            if other != index and other not in self._deaf:
                try:
                    tracker.note(text)
                except Exception as again:
                    self._failed(other, "over a note", again)

    def _name(self, index: int) -> str:
        return type(self._trackers[index]).__name__
