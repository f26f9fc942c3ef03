"""Who takes part in a round of real clients: the sites that have joined, drawn as in a simulation.

A cohort is drawn from all sites of the register, by seed, round and attempt alone. A drawn site
that is away is waited for, briefly; then the next of the same draw takes its place. With everybody
there, the cohorts are those that a simulation of the same sites would have.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedft.core import seeds
from fedft.core.errors import Interrupted, QuorumFailure
from fedft.core.types import Site
from fedft.server.identity import Client, Registry
from fedft.server.messages import Waiting, Watch

_LOOK_UP_S = 0.25


class Presence(Protocol):
    """Who is connected, see :class:`~fedft.server.grids.grpc.GrpcGrid`."""

    @property
    def connected(self) -> frozenset[str]:
        """Names of the sites that are ready for work."""
        ...

    def wait_connected(self, enough: Callable[[frozenset[str]], bool], timeout: float) -> bool:
        """Block until enough sites are there, or for ``timeout`` seconds."""
        ...

    def away_s(self, site: str) -> float:
        """Seconds since a site was last there, or since the server started."""
        ...


@dataclass
class EnrolledRoster:
    """The registered sites that have joined at least once and were not revoked.

    Attributes:
        registry: the register.
        presence: who is connected.
        quorum: sites without which there is no point in starting a round.
        first: sites that the first cohort waits for; None is as many as are drawn.
        patience_s: how long to wait for a quorum, or for ``first``, before the run pauses.
        gather_s: how long a round waits for more sites once a quorum is connected. Not again in
            every round: those that went away since are waited for as ``grace_s`` says.
        grace_s: how long a drawn site may have been away before another takes its place; at most
            ``gather_s``.
        watch: is told whom a round waits for.
        stop: says whether the run was asked to stop.
    """

    registry: Registry
    presence: Presence
    quorum: int
    first: int | None = None
    patience_s: float = 600.0
    gather_s: float = 60.0
    grace_s: float = 30.0
    watch: Watch = lambda waiting: None
    stop: Callable[[], bool] = lambda: False
    _begun: bool = field(default=False, init=False)
    _quorate: float | None = field(default=None, init=False)
    """Since when a quorum has been seen connected; a round that begins ends the gathering."""

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        """A cohort of connected sites, in the order of their names.

        Raises:
            QuorumFailure: fewer than the quorum were connected for ``patience_s`` seconds.
            Interrupted: ``stop`` said so.
        """
        began = time.monotonic()
        try:
            self._until_enough(count, f"round {round_}", began)
            self._begun, self._quorate = True, float("-inf")
            clients = self._eligible()
            names = sorted(clients)
            size = min(count, len(names))
            generator = seeds.numpy_generator(seed, "cohort", round_, attempt)
            indices = generator.choice(len(names), size, replace=False, shuffle=False)
            drawn = [names[i] for i in indices]
            self._wait_for(drawn, f"round {round_}", began)
        finally:
            self.watch(None)
        there = self.presence.connected
        others = seeds.numpy_generator(seed, "substitutes", round_, attempt).permutation(len(names))
        order = [*drawn, *(names[i] for i in others if names[i] not in drawn)]
        chosen = sorted([name for name in order if name in there][:size])
        return [clients[name].site for name in chosen]

    def ready(self, count: int) -> bool:
        there, names = self.presence.connected, self._eligible().keys()
        return len(there & names) >= count and not self._expected_back(names)

    def node_of(self, site: Site) -> int:
        return self.registry.client(site.name).node

    def _eligible(self) -> Mapping[str, Client]:
        clients = self.registry.clients().values()
        return {c.name: c for c in clients if c.joined and c.examples and not c.revoked}

    def _until_enough(self, count: int, what: str, began: float) -> None:
        """Wait, visibly, for as many sites as a round wants; be content with a quorum in the end.

        Once a quorum is there, others are waited for as long as ``gather_s``; and those that a
        server was told to begin with, as long as there is patience.
        """
        asked_for = 0 if self._begun else self.first or 0
        wanted, ends = max(count, asked_for), began + self.patience_s
        while True:
            now = time.monotonic()
            able = self._eligible().keys()
            there = len(self.presence.connected & able)
            if there < self.quorum:
                self._quorate = None
            elif self._quorate is None:
                self._quorate = now
            closes = ends
            if self._quorate is not None and there >= asked_for:
                closes = min(ends, self._quorate + self.gather_s)
            if there >= wanted:
                return
            if now >= closes:
                if self._quorate is not None:
                    return
                raise QuorumFailure(
                    f"{what}: {there} clients were connected after {self.patience_s:.0f} s, "
                    f"and {self.quorum} are needed",
                    fix="The model is as it was after the last completed round.",
                )
            away = tuple(sorted(self._invited() - self.presence.connected))
            self.watch(Waiting(what, "connected", wanted, away, there, began, closes))
            self._sleep()

    def _invited(self) -> set[str]:
        return {c.name for c in self.registry.clients().values() if not c.revoked}

    def _wait_for(self, drawn: Sequence[str], what: str, began: float) -> None:
        """Give sites that went away just now the time to come back."""
        ends = time.monotonic() + self.gather_s
        while self._expected_back(drawn) and time.monotonic() < ends:
            there = self.presence.connected
            away = tuple(name for name in sorted(drawn) if name not in there)
            here = len(drawn) - len(away)
            self.watch(Waiting(what, "connected", len(drawn), away, here, began, ends))
            self._sleep()

    def _expected_back(self, names: Iterable[str]) -> bool:
        """Whether one of these sites went away just now."""
        there, grace_s = self.presence.connected, min(self.grace_s, self.gather_s)
        return any(n not in there and self.presence.away_s(n) < grace_s for n in names)

    def _sleep(self) -> None:
        if self.stop():
            raise Interrupted("stopped; the last completed round is committed")
        before = self.presence.connected
        self.presence.wait_connected(lambda there: there != before, _LOOK_UP_S)
