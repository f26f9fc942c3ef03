"""What a run consists of apart from its state, and what is written down while a round goes on."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fedft.core.meters import DEFAULT, Meter, Spectrum, chosen
from fedft.core.record.lines import ClientLine, Kind, Promise, RoundLine, Timed
from fedft.core.tasks import Task
from fedft.core.terms import Term
from fedft.core.types import LocalTraining, Part, ServerState, Site, TrainPlan
from fedft.core.wire.compress import FP32, Compressor
from fedft.server.clock import SimulatedClock
from fedft.server.deadline import Pace
from fedft.server.messages import Courier, Waiting, Watch
from fedft.server.pruning import Pruning
from fedft.server.sampling import Roster
from fedft.server.tables import RoundsSpec
from fedft.server.validation import Limits
from fedft.strategies import Strategy

_TOLD_S = 0.1
"""Least time between two words on a wait."""


class Account(Protocol):
    """What the rounds ask of a privacy account; see :class:`~fedft.server.privacy.PrivacyAccount`."""

    @property
    def poisson(self) -> bool:
        """Whether it draws the cohorts, of any size, and rounds are never retried."""
        ...

    def cohort(self) -> list[Site]:
        """A Poisson sample of the sites, in the order of their names."""
        ...

    def spend(self, round_: int, cohort: Sequence[Site]) -> None:
        """Enter an attempt at a round; when this returns, it is on disk."""
        ...

    def guarantee(self) -> Promise:
        """What has been spent so far."""
        ...

    def of_sites(self, names: Sequence[str]) -> dict[str, float]:
        """What some sites have spent of their own, where sites do."""
        ...


@dataclass(frozen=True)
class Federation:
    """What a run consists of, apart from its state.

    Attributes:
        strategy: the aggregation rule.
        roster: the registered sites.
        grid: how they are reached.
        clock: the simulated clock of a fleet that has one; without it time is the machine's.
        evaluator: what scores the global model on the server's test set, where the sites do not
            hold it; None is the grid itself.
        task: JSON of the :class:`~fedft.core.spec.TaskSpec`, sent with every message.
        training: local optimisation.
        terms: what clients do beside plain steps, whatever the rule asks for.
        settings: the `[rounds]` table.
        seed: of the run.
        kind: the model's task, with the metrics of the run: it decides what is a score.
        classes: number of classes; 0 where the task has none.
        cohort: how many sites are trained in one pass.
        compressor: in which clients send their replies; the server sends in the cast to it.
        limits: bounds on replies.
        pruning: which blocks sites hold that cannot hold them all; None where all can.
        frozen: parts that no rule may train: they stay as the seed made them.
        holdout: whether sites judge their own models on their own held-out examples.
        stop: says whether the run was asked to stop.
        privacy: the account of a run that promises privacy.
        real: whether the sites are real clients. Whatever goes wrong with one of them costs it its
            place; in a simulation an exception is a mistake of ours, and ends the run.
        pace: of the slowest client that is waited for where no deadline is set; None waits for all.
        watch: is told whom the run waits for; None tells nobody.
        scoring: is told how far the scoring of the server's test set is; None tells nobody.
        meters: what every round is measured by.
    """

    strategy: Strategy
    roster: Roster
    grid: Courier
    task: str
    training: LocalTraining
    settings: RoundsSpec
    seed: int
    kind: Task
    cohort: int = 1
    compressor: Compressor = FP32
    limits: Limits = field(default_factory=Limits)
    classes: int = 0
    terms: tuple[Term, ...] = ()
    holdout: bool = False
    evaluator: Courier | None = None
    clock: SimulatedClock | None = None
    pruning: Pruning | None = None
    frozen: frozenset[Part] = frozenset()
    stop: Callable[[], bool] = field(default=lambda: False)
    privacy: Account | None = None
    real: bool = False
    pace: Pace | None = None
    watch: Watch | None = None
    scoring: Watch | None = None
    meters: tuple[type[Meter], ...] = chosen(DEFAULT)

    @property
    def kinds(self) -> tuple[type[Meter], ...]:
        """The meters, and that of ``[rounds] spectrum = true``."""
        wanted = self.settings.spectrum and Spectrum not in self.meters
        return (*self.meters, Spectrum) if wanted else self.meters

    def patience_s(self, work: Iterable[tuple[int, int]]) -> float | None:
        """Seconds of this machine's time for which replies are waited; None is as long as it takes.

        Under a simulated clock the deadline is one of simulated time.

        Args:
            work: of each site: the examples that it is to go through, and bytes in both directions.
        """
        if self.clock is not None:
            return None
        if self.settings.deadline_s is not None or self.pace is None:
            return self.settings.deadline_s
        return max((self.pace.seconds(*one) for one in work), default=self.pace.least_s)

    def waits(
        self, what: str, names: Mapping[str, str]
    ) -> Callable[[Collection[str], float], None]:
        """Tells ``watch`` whom a wait for replies is for; see :func:`fedft.server.messages.replies`.

        Args:
            what: is waited for.
            names: id of a message → name of the site that is to answer it.
        """
        watch = self.watch
        if watch is None:  # a simulation may have thousands of names
            return lambda ids, closes: None
        since = time.monotonic()
        told = float("-inf")

        def missing(ids: Collection[str], closes: float) -> None:
            nonlocal told
            if not ids:
                watch(None)
                return
            if (now := time.monotonic()) - told < _TOLD_S:
                return
            told = now
            waited = tuple(sorted(names[id_] for id_ in ids))
            answered = len(names) - len(waited)
            watch(Waiting(what, "answered", len(names), waited, answered, since, ends=closes))

        return missing

    def scores(self, what: str, ids: Sequence[str]) -> Callable[[Collection[str], float], None]:
        """Tells ``scoring`` how many of some slices of the test set are scored; as :meth:`waits`.

        Args:
            what: is being done.
            ids: of the messages, one a slice.
        """
        scoring, wanted, since = self.scoring, len(ids), time.monotonic()
        told = since

        def missing(ids: Collection[str], closes: float) -> None:
            nonlocal told
            if scoring is None:
                return
            if not ids:
                scoring(None)
            elif (now := time.monotonic()) - told >= _TOLD_S:
                told = now
                done = wanted - len(ids)
                scoring(Waiting(what, "slices scored", wanted, (), done, since, ends=closes))

        return missing


Asked = tuple[Site, TrainPlan]
"""A site and what it is asked to do."""


@dataclass(frozen=True, eq=False)
class Completed:
    """One round: the state after it, its line for ``rounds.jsonl``, and its lines for ``clients.jsonl``."""

    state: ServerState
    record: RoundLine
    replies: list[ClientLine]


class Stopwatch:
    """Seconds by phase, on this machine's monotonic clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@dataclass
class Ledger:
    """What happened in the round in hand.

    Attributes:
        replies: lines for ``clients.jsonl``.
        failures: reason → sites.
        up, down: bytes.
        now: simulated seconds since the beginning of the run.
        busy: seconds that the devices of the cohort in hand spent on the simulated clock.
        spent: the same of all cohorts, summed.
        unplanned: sites for which no plan could be made.
    """

    replies: list[ClientLine] = field(default_factory=list[ClientLine])
    failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    up: int = 0
    down: int = 0
    now: float = 0.0
    busy: Mapping[str, float] = field(default_factory=dict[str, float])
    spent: float = 0.0
    unplanned: set[str] = field(default_factory=set[str])

    def failed(
        self,
        round_: int,
        site: str,
        reason: str,
        why: str,
        *,
        code: int | None = None,
        kind: Kind = "train",
    ) -> None:
        """Count a site that gave no usable reply; ``code`` is that of its error reply."""
        self.failures.setdefault(reason, []).append(site)
        line: ClientLine = {
            "kind": kind,
            "round": round_,
            "site": site,
            "status": reason,
            "reason": why,
            **self.timing(site),
        }
        if code is not None:
            line["code"] = code
        self.replies.append(line)

    def timing(self, site: str) -> Timed:
        """What a line on a site says of its device's time; nothing where there is no clock."""
        return {"device_seconds": self.busy[site]} if site in self.busy else {}

    def took(self, busy: Mapping[str, float]) -> None:
        """Devices of the next cohort spent that many seconds."""
        self.busy = busy
        self.spent += sum(busy.values())
