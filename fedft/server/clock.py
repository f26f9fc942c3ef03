"""The simulated clock: what rounds cost the devices of a fleet, in seconds.

    seconds of a site = bytes down / download + examples / speed + bytes up / upload

with the bytes of the real messages and the examples of the real batches. A site that cannot be
reached until it is done, or is not done by the deadline, is lost; that is known before any training
is done for it, so none is. Time stands in the state, in the slot ``clock/elapsed``, and a run that
is resumed goes on at the same instant. Everything is a function of the seed: no wall clock, and no
more than the sites of a round are ever looked at, unless few of them can be reached.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from fedft.core import seeds
from fedft.core.data.batches import batch_count, steps_of
from fedft.core.errors import ConfigError
from fedft.core.types import LocalTraining, ServerState, Site, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.compress import FP32, Compressor
from fedft.server.availability import Availability
from fedft.server.sampling import SimulatedRoster

_ELAPSED = "clock/elapsed"
_BITS = 8e-6
"""Megabits of a byte."""


def elapsed(state: ServerState) -> float:
    """Simulated seconds since the beginning of the run."""
    slot = state.slots.get(_ELAPSED)
    return 0.0 if slot is None else float(slot)


def at_time(state: ServerState, seconds: float) -> ServerState:
    """The same state at another time."""
    slot = torch.tensor(seconds, dtype=torch.float64)
    return replace(state, slots={**state.slots, _ELAPSED: slot})


@dataclass(frozen=True)
class Trip:
    """One site's part in a round, in seconds and bytes."""

    download: float
    compute: float
    upload: float
    bytes_down: int

    @property
    def seconds(self) -> float:
        return self.download + self.compute + self.upload


@dataclass(frozen=True)
class Stay:
    """How a site's trip ends.

    Attributes:
        site: whose it is.
        trip: what it takes.
        ends: on the clock: when its reply is there, or when it is lost.
        lost: why it is lost, ``late`` or ``left``; empty where it is not.
    """

    site: Site
    trip: Trip
    ends: float
    lost: str = ""


@dataclass(frozen=True)
class Closing:
    """How a round ends.

    Attributes:
        lost: site → why it is not counted: ``late`` after the deadline, ``left`` since it could no
            longer be reached, ``spare`` since enough others were faster.
        ends: on the clock.
        busy: device-seconds of each site until then.
    """

    lost: Mapping[str, str]
    ends: float
    busy: Mapping[str, float]


@dataclass(frozen=True)
class SimulatedClock:
    """Who can be asked when, and how long it takes them.

    Attributes:
        roster: the registered sites and their devices.
        seed: of the run.
        compressor: in which clients send their replies.
        availability: None where all sites can always be reached.
        deadline_s: seconds a site is given; None is any time.
    """

    roster: SimulatedRoster
    seed: int
    compressor: Compressor = FP32
    availability: Availability | None = None
    deadline_s: float | None = None

    def cohort(
        self, round_: int, attempt: int, count: int, needed: int, now: float
    ) -> tuple[list[Site], float]:
        """The sites to ask, in the order of their names, and the time at which to ask them.

        Up to ``count`` of those that can be reached, uniformly. Where fewer than ``needed`` can,
        the clock goes on to the next window that opens, and so on.

        Raises:
            ConfigError: so many sites can never be reached together.
        """
        if self.availability is None:
            return self.roster.sample(self.seed, round_, attempt, count), now
        begun, opening = now, now
        while opening is not None and opening - begun <= 2 * (self.availability.period_s or inf):
            generator = seeds.numpy_generator(self.seed, "cohort", round_, attempt)
            if self.availability.anybody(opening):
                able = (s for s in self.roster.shuffled(generator) if self._open(s, opening))
                found = [site for _, site in zip(range(count), able, strict=False)]
                if len(found) >= needed:
                    return sorted(found, key=lambda site: site.name), opening
            opening = self.availability.next_opening(opening)
        raise ConfigError(
            f"round {round_} needs {needed} clients, and after {begun:.0f} s of simulated time so many "
            "can never be reached together",
            fix="Lower [rounds] quorum, lengthen the windows of [fleet] availability, or let it repeat: period-s.",
        )

    def idle(self, number: int, busy: Collection[str], now: float) -> Site | None:
        """A site for one more job: uniformly one that can be reached and is not ``busy``.

        Args:
            number: of the job, from which the draw follows.
            busy: names of sites that are not to be asked.
            now: on the clock.
        """
        if self.availability is not None and not self.availability.anybody(now):
            return None
        generator = seeds.numpy_generator(self.seed, "job", number)
        able = (s for s in self.roster.shuffled(generator) if s.name not in busy)
        return next((site for site in able if self._open(site, now)), None)

    def trip(self, site: Site, plan: TrainPlan) -> Trip:
        """What a plan takes of a site."""
        device = self.roster.fleet.device(site.name)
        down, up = codec.plan_bytes(plan, self.compressor)
        return Trip(
            download=_seconds(_BITS * down, device.down_mbps),
            compute=_seconds(examples(plan.training, site.examples), device.samples_per_s),
            upload=_seconds(_BITS * up, device.up_mbps),
            bytes_down=down,
        )

    def stay(self, site: Site, plan: TrainPlan, now: float) -> Stay:
        """How the trip of a site that is asked now will end."""
        trip = self.trip(site, plan)
        arrives = now + trip.seconds
        late = inf if self.deadline_s is None else now + self.deadline_s
        leaves = self._leaves(site, now)
        if arrives > min(late, leaves):
            return Stay(site, trip, min(late, leaves), "left" if leaves < late else "late")
        return Stay(site, trip, arrives)

    def close(self, stays: Sequence[Stay], wanted: int, now: float) -> Closing:
        """How a synchronous round ends that began now.

        It ends with the reply that fills it; where some are missing, with the deadline, or without
        one when the last of the sites has answered or is found to have left.
        """
        arrived = sorted(
            (stay for stay in stays if not stay.lost), key=lambda stay: (stay.ends, stay.site.name)
        )
        counted, spare = arrived[:wanted], arrived[wanted:]
        lost = [stay for stay in stays if stay.lost]
        if len(counted) == wanted or not lost:
            ends = max((stay.ends for stay in counted), default=now)
        elif self.deadline_s is not None:
            ends = now + self.deadline_s
        else:
            ends = max(stay.ends for stay in stays)
        reasons = {stay.site.name: stay.lost for stay in lost}
        reasons |= {stay.site.name: "spare" for stay in spare}
        busy = {stay.site.name: min(stay.ends, ends) - now for stay in stays}
        return Closing(reasons, ends, busy)

    def _leaves(self, site: Site, now: float) -> float:
        if self.availability is None:
            return inf
        end = self.availability.until(site.name, now)
        return now if end is None else end

    def _open(self, site: Site, now: float) -> bool:
        return self.availability is None or self.availability.until(site.name, now) is not None


def examples(training: LocalTraining, held: int) -> int:
    """Examples that a site with ``held`` of them trains on, passes counted.

    Where its steps end within an epoch, the batches of that epoch count as full ones.
    """
    if not held:
        return 0
    size = training.step_rows
    count = steps_of(held, training)
    passes, more = divmod(count, batch_count(held, size))
    return passes * held + min(more * size, held)


def _seconds(amount: float, rate: float | None) -> float:
    return 0.0 if rate is None else amount / rate


def check_reachable(stays: Sequence[Stay], deadline_s: float) -> None:
    """Refuse a deadline that no site of several cohorts could meet.

    Raises:
        ConfigError: naming the fastest of them.
    """
    fastest = min((stay.trip.seconds for stay in stays), default=0.0)
    if stays and fastest > deadline_s:
        raise ConfigError(
            f"[rounds] deadline-s = {deadline_s:g}, and the fastest of {len(stays)} clients that were "
            f"asked needs {fastest:.4g} s of simulated time",
            fix=f"Raise the deadline above {fastest:.4g}, or give the clients less to do.",
        )
