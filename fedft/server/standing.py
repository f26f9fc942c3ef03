"""How a run stands: counted from its committed rounds, for whoever asks."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.server.identity import Client
from fedft.server.messages import Waiting
from fedft.trackers import Start, Tracker

_ROUNDS_SHOWN = 30
_NOTES_SHOWN = 12
_TELL_S = 10.0


@dataclass(frozen=True)
class Tally:
    """Of one site: rounds that it was drawn for, and those of them that it failed."""

    drawn: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Standing:
    """What a run has come to.

    Attributes:
        strategy: name of the rule; empty before the first round begins.
        target: rounds that the run is to have at most.
        round: the last committed one.
        recent: its last lines of ``rounds.jsonl``, oldest first.
        scores: of the newest evaluation.
        seconds: spent so far, by phase of a round.
        up, down: bytes on the wire so far.
        failures: replies that did not count, by reason.
        sites: by name.
        notes: what was said to whoever watches, with the time of day; oldest first.
        waiting: whom the run waits for at present.
    """

    strategy: str = ""
    target: int = 0
    round: int = 0
    recent: tuple[RoundLine, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    up: int = 0
    down: int = 0
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    sites: Mapping[str, Tally] = field(default_factory=dict[str, Tally])
    notes: tuple[tuple[str, str], ...] = ()
    waiting: Waiting | None = None

    def after(self, records: Iterable[RoundLine]) -> "Standing":
        """With more rounds, given as lines of ``rounds.jsonl``."""
        now, seconds, failures = self, Counter(self.seconds), Counter(self.failures)
        drawn, failed = Counter[str](), Counter[str]()
        for record in records:
            seconds.update(record["seconds"])
            failures.update({why: len(names) for why, names in record["failures"].items()})
            drawn.update(record["cohort"])
            for names in record["failures"].values():
                failed.update(names)
            now = replace(
                now,
                round=record["round"],
                recent=(*now.recent, record)[-_ROUNDS_SHOWN:],
                scores=record.get("eval") or now.scores,
                up=now.up + record["bytes"]["up"],
                down=now.down + record["bytes"]["down"],
            )
        sites = dict(self.sites)
        for name in drawn | failed:
            old = sites.get(name, Tally())
            sites[name] = Tally(old.drawn + drawn[name], old.failed + failed[name])
        return replace(now, seconds=seconds, failures=failures, sites=sites)


class Board(Tracker):
    """Watches a run for those who ask how it stands, and passes everything on.

    Args:
        inner: watches, too.

    Attributes:
        standing: the present one. Replaced, never changed: any thread may read it.
        doing: says of a client what it does; empty where that is not known.
    """

    def __init__(self, inner: Tracker) -> None:
        self._inner = inner
        self._writing = threading.Lock()
        self._told: tuple[str, float] = ("", 0.0)  # of what a line was said last, and when
        self.standing = Standing()
        self.doing: Callable[[str], str] = lambda name: ""

    def started(self, start: Start) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        with self._writing:
            begun = replace(
                self.standing,
                strategy=start.config["strategy"]["name"],
                target=start.config["rounds"]["count"],
            )
            self.standing = begun.after(start.committed)
        self._inner.started(start)

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        with self._writing:
            self.standing = self.standing.after([line])
        self._inner.round(line, replies)

    def finished(self, summary: Summary) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        self._inner.finished(summary)

    def close(self) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        self._inner.close()

    def note(self, text: str) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        with self._writing:
            notes = (*self.standing.notes, (f"{datetime.now(UTC):%H:%M:%S}", text))
            self.standing = replace(self.standing, notes=notes[-_NOTES_SHOWN:])
        self._inner.note(text)

    def waiting(self, waiting: Waiting | None) -> None:
        """Somebody is waited for, or nobody any more; a line is said of it now and then.

        At once where clients are to connect, later where they are at work: every ten seconds of the
        first minute, then every minute.
        """
        with self._writing:
            self.standing = replace(self.standing, waiting=waiting)
        if waiting is None:
            return
        now = time.monotonic()
        what, told = self._told
        if what != waiting.what + waiting.verb:
            told = float("-inf") if waiting.verb == "connected" else waiting.since
            self._told = waiting.what + waiting.verb, told
        if now - told >= (_TELL_S if now - waiting.since < 60 else 60):
            self._told = waiting.what + waiting.verb, now
            self._inner.note(waiting.line(self.doing))


@dataclass(frozen=True)
class View:
    """Everything that one request is answered from.

    Attributes:
        run: name of the run directory.
        over: whether the run is.
        standing: of the run.
        clients: of the register, by name.
        connected: names of the sites that are ready for work.
        uptime_s: of this server.
        doing: site → what it says it does.
        turned_away: name → why that client was refused, or left before it had joined.
    """

    run: str
    over: bool
    standing: Standing
    clients: tuple[Client, ...]
    connected: frozenset[str]
    uptime_s: float
    doing: Mapping[str, str] = field(default_factory=dict[str, str])
    turned_away: Mapping[str, str] = field(default_factory=dict[str, str])
