"""Asynchronous aggregation: a server update for every few replies, on the simulated clock.

`[rounds] per-round` sites are at work at any time. One that is done is replaced at once by another,
which starts from the newest version; when as many replies have arrived as the rule's buffer holds,
they make the next version. A "round" is then a server update, committed as any round is.

When a job ends follows from its plan alone, so the schedule is known before anything is trained, and
a job is trained when its reply is due: the replies of one update go through the engine as a cohort,
whatever versions they started from. Nothing is under way when an update is committed but what the
state says: the jobs that sites are at, and the versions that they started from, lie in its slots,

    flight/launched       jobs so far, int64 []
    flight/site           node of each job's site, int64 [jobs]
    flight/version        server updates before the version it started from, int64 [jobs]
    flight/span           when it started and when it ends, float64 [jobs, 2]
    flight/lost           whether it is lost by then: 0, or 1 + its place in LOSSES, int64 [jobs]
    flight/at/<version>/  tensors of each version that some job started from, but for the newest

and a run that is killed goes on with the same jobs, to the same bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from fedft.core.errors import ConfigError, QuorumFailure
from fedft.core.record.lines import ClientLine, Facts
from fedft.core.types import ClientUpdate, ServerState, Site
from fedft.core.wire import codec
from fedft.server.clock import SimulatedClock, check_reachable, elapsed
from fedft.server.collect.plain import train
from fedft.server.exchange import plan_for
from fedft.server.federation import Asked, Completed, Federation, Ledger, Stopwatch
from fedft.server.replies import Intake
from fedft.server.rounds import concluded

LOSSES = ("late", "left")
"""Why a job is lost: after the deadline, or because its site could no longer be reached."""

_FLIGHT = "flight/"
_AT = "flight/at/"


@dataclass(frozen=True)
class Job:
    """What one site is at.

    Attributes:
        site: which.
        version: server updates before the version that it started from.
        started, ends: on the clock.
        lost: why no reply will come when it ends; empty where one will.
    """

    site: Site
    version: int
    started: float
    ends: float
    lost: str = ""

    @property
    def seconds(self) -> float:
        return self.ends - self.started


def updates(federation: Federation, state: ServerState) -> Iterator[Completed]:
    """Make the server updates that ``state`` has not seen yet; as :func:`fedft.server.rounds.rounds`."""
    while state.round < federation.settings.count:
        completed = one_update(federation, state)
        state = completed.state
        yield completed


def one_update(federation: Federation, state: ServerState) -> Completed:
    """One server update, from the first reply that is waited for to the evaluation."""
    watch, ledger = Stopwatch(), Ledger(now=elapsed(state))
    flight = Flight(federation, state)
    arrived, replies = _fill(federation, flight, watch, ledger)
    age = {job.site.name: state.round - job.version for job in arrived}
    replies = [replace(update, staleness=age[update.site]) for update in replies]
    ages = [update.staleness for update in replies]
    facts: Facts = {"staleness": {"mean": sum(ages) / len(ages), "max": max(ages)}}
    cohort = [job.site for job in arrived]
    intake = Intake(federation.strategy, federation.kinds).add(replies)
    closing = concluded(federation, state, intake, cohort, watch, ledger, facts)
    completed = closing.completed()
    # A line belongs to the update that commits it, whatever version its site started from.
    lines: list[ClientLine] = [
        {**line, "round": completed.state.round} for line in completed.replies
    ]
    for line in lines:
        if line["kind"] == "train" and line.get("status") == "ok":
            line["staleness"] = age[line["site"]]
    return replace(completed, state=flight.stored(completed.state), replies=lines)


def _fill(
    federation: Federation, flight: "Flight", watch: Stopwatch, ledger: Ledger
) -> tuple[list[Job], list[ClientUpdate]]:
    """The jobs whose replies fill the buffer, and what came of them."""
    size, settings = federation.strategy.buffer_size or 1, federation.settings
    arrived: list[Job] = []
    updates: list[ClientUpdate] = []
    for _ in range(settings.retries + 1):
        with watch.phase("plan"):
            jobs = flight.next_replies(size - len(updates), ledger)
            asked = [flight.asked(job) for job in jobs]
            ledger.took({job.site.name: job.seconds for job in jobs})
            arrived += jobs
        with watch.phase("train"):
            updates += train(federation, asked, ledger)
        if len(updates) == size:
            return arrived, updates
    raise QuorumFailure(
        f"server update {flight.state.round + 1}: {len(updates)} usable replies of {len(arrived)}, "
        f"{size} fill the buffer, after {settings.retries + 1} attempts",
        fix="The model is as it was after the last server update.",
    )


class Flight:
    """The jobs that sites are at.

    Args:
        federation: with a simulated clock.
        state: the newest version, which says who is at what.
    """

    def __init__(self, federation: Federation, state: ServerState) -> None:
        if federation.clock is None:
            raise ValueError("asynchronous aggregation needs a simulated clock")
        self.state = state
        self._federation = federation
        self._clock: SimulatedClock = federation.clock
        self._versions = {**_versions(state), state.round: state}
        self._jobs = self._read(state.slots)
        launched = state.slots.get(_FLIGHT + "launched")
        self._launched = 0 if launched is None else int(launched)
        self._answered: set[str] = set()  # they are done with this version
        self._losses: list[Job] = []

    def next_replies(self, count: int, ledger: Ledger) -> list[Job]:
        """The next jobs that end with a reply; the ledger's clock goes on to the last of them.

        Raises:
            ConfigError: nobody can be reached any more, or no site can meet the deadline.
            QuorumFailure: job after job is lost.
        """
        arrived: list[Job] = []
        since = ledger.now
        while len(arrived) < count:
            self._launch(ledger.now)
            first = min((job.ends for job in self._jobs), default=inf)
            opening = self._next_opening(ledger.now)
            if min(first, opening) == inf or self._idle_too_long(since, opening):
                raise self._nobody(ledger.now)
            ledger.now = min(first, opening)
            # All that ends at this instant, before anybody starts anew: sites of equal speed then
            # make synchronous rounds.
            while len(arrived) < count and (job := self._ended(ledger.now)) is not None:
                self._jobs.remove(job)
                since = ledger.now
                if job.lost:
                    self._note_loss(job, ledger)
                else:
                    self._answered.add(job.site.name)
                    arrived.append(job)
        return arrived

    def asked(self, job: Job) -> Asked:
        """The site of a job and its plan: of the version that it started from."""
        return job.site, plan_for(self._federation, self._versions[job.version], job.site)

    def stored(self, after: ServerState) -> ServerState:
        """The state after this update, with the jobs that are still under way."""
        slots = {name: t for name, t in after.slots.items() if not name.startswith(_FLIGHT)}
        roster, jobs = self._federation.roster, self._jobs
        spans = [[job.started, job.ends] for job in jobs]
        lost = [1 + LOSSES.index(job.lost) if job.lost else 0 for job in jobs]
        flight = {
            "launched": torch.tensor(self._launched),
            "site": torch.tensor([roster.node_of(job.site) for job in jobs], dtype=torch.int64),
            "version": torch.tensor([job.version for job in jobs], dtype=torch.int64),
            "span": torch.tensor(spans, dtype=torch.float64).reshape(-1, 2),
            "lost": torch.tensor(lost, dtype=torch.int64),
        }
        for version in sorted({job.version for job in jobs}):
            named = _named(self._versions[version])
            flight |= {f"at/{version}/{name}": tensor for name, tensor in named.items()}
        return replace(after, slots=slots | {_FLIGHT + name: t for name, t in flight.items()})

    def _read(self, slots: Mapping[str, Tensor]) -> list[Job]:
        if _FLIGHT + "site" not in slots:
            return []
        columns = (slots[_FLIGHT + name].tolist() for name in ("site", "version", "span", "lost"))
        return [
            Job(
                self._clock.roster.site(node - 1),
                version,
                started,
                ends,
                LOSSES[lost - 1] if lost else "",
            )
            for node, version, (started, ends), lost in zip(*columns, strict=True)
        ]

    def _launch(self, now: float) -> None:
        """Put sites to work until enough are, or no other can be reached."""
        busy = self._answered | {job.site.name for job in self._jobs}
        while len(self._jobs) < self._federation.settings.per_round:
            site = self._clock.idle(self._launched, busy, now)
            if site is None:
                return
            plan = plan_for(self._federation, self.state, site)
            stay = self._clock.stay(site, plan, now)
            self._jobs.append(Job(site, self.state.round, now, stay.ends, stay.lost))
            busy.add(site.name)
            self._launched += 1

    def _ended(self, now: float) -> Job | None:
        ended = (job for job in self._jobs if job.ends <= now)
        return min(ended, key=lambda job: (job.ends, job.site.name), default=None)

    def _next_opening(self, now: float) -> float:
        """When somebody else may be reached; infinity where as many are at work as shall be."""
        availability = self._clock.availability
        if availability is None or len(self._jobs) == self._federation.settings.per_round:
            return inf
        opening = availability.next_opening(now)
        return inf if opening is None else opening

    def _idle_too_long(self, since: float, opening: float) -> bool:
        availability = self._clock.availability
        period = None if availability is None else availability.period_s
        return not self._jobs and period is not None and opening - since > 2 * period

    def _nobody(self, now: float) -> ConfigError:
        return ConfigError(
            f"server update {self.state.round + 1}: after {now:.0f} s of simulated time no further "
            "client can be reached",
            fix="Take a smaller buffer or more clients, or let [fleet] availability repeat: period-s.",
        )

    def _note_loss(self, job: Job, ledger: Ledger) -> None:
        trip = self._clock.trip(*self.asked(job))
        ledger.took({job.site.name: job.seconds})
        ledger.down += trip.bytes_down
        why = f"{job.lost}: needs {trip.seconds:.4g} s of simulated time"
        ledger.failed(self.state.round + 1, job.site.name, job.lost, why)
        self._losses.append(job)
        settings = self._federation.settings
        if self._answered or len(self._losses) < (settings.retries + 1) * settings.per_round:
            return
        if settings.deadline_s is not None:
            stays = [self._clock.stay(*self.asked(lost), lost.started) for lost in self._losses]
            check_reachable(stays, settings.deadline_s)
        raise QuorumFailure(
            f"server update {self.state.round + 1}: {len(self._losses)} jobs were lost in a row, the "
            f"last of them {why}",
            fix="Raise [rounds] deadline-s, or lengthen the windows of [fleet] availability.",
        )


def _named(state: ServerState) -> dict[str, Tensor]:
    """The tensors from which a version's plans are made, by name."""
    named = {f"adapter/{name}": t for name, t in state.adapter.tensors().items()}
    named |= {f"delta/{name}": t for name, t in codec.delta_tensors(state.delta).items()}
    own = {name: t for name, t in state.slots.items() if not name.startswith((_FLIGHT, "clock/"))}
    return named | {f"slots/{name}": t for name, t in own.items()}


def _versions(state: ServerState) -> dict[int, ServerState]:
    """The versions that jobs under way started from, out of the slots: the inverse of `_named`."""
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in state.slots.items():
        if name.startswith(_AT):
            version, kind, rest = name.removeprefix(_AT).split("/", 2)
            parts = found.setdefault(int(version), {"adapter": {}, "delta": {}, "slots": {}})
            parts[kind][rest] = tensor
    return {
        version: ServerState(
            adapter=state.adapter.replaced(parts["adapter"]),
            round=version,
            delta=codec.delta_from(parts["delta"]),
            slots=parts["slots"],
        )
        for version, parts in found.items()
    }
