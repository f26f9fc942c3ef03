"""Who takes part in a round of real clients: the sites that have joined, drawn as in a simulation.

A cohort is drawn from all sites of the register, by seed, round and attempt alone. A drawn site
that is away is waited for, briefly; then the next of the same draw takes its place. With everybody
there, the cohorts are those that a simulation of the same sites would have.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedft.core import seeds
from fedft.core.errors import Interrupted, QuorumFailure
from fedft.core.types import Site
from server.identity import Client, Registry

_LOOK_UP_S = 0.25
_TELL_S = 10.0


class Presence(Protocol):
    """Who is connected, see :class:`~server.grids.grpc.GrpcGrid`."""

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
        first: sites that the first cohort waits for; later ones wait for as many as are drawn.
        patience_s: how long to wait for enough sites before the run pauses.
        grace_s: how long a drawn site may have been away before another takes its place.
        tell: takes a line for whoever watches.
        stop: says whether the run was asked to stop.
    """

    registry: Registry
    presence: Presence
    quorum: int
    first: int
    patience_s: float = 600.0
    grace_s: float = 30.0
    tell: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False
    _begun: bool = field(default=False, init=False)

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        """A cohort of connected sites, in the order of their names.

        Raises:
            QuorumFailure: fewer than the quorum were connected for ``patience_s`` seconds.
            Interrupted: ``stop`` said so.
        """
        self._until_enough(max(count, 0 if self._begun else self.first), round_)
        self._begun = True
        clients = self._eligible()
        names = sorted(clients)
        size = min(count, len(names))
        generator = seeds.numpy_generator(seed, "cohort", round_, attempt)
        drawn = [names[i] for i in generator.choice(len(names), size, replace=False, shuffle=False)]
        self._wait_for(drawn)
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

    def _until_enough(self, wanted: int, round_: int) -> None:
        """Wait, visibly, for as many sites as a round wants; be content with a quorum in the end."""
        began, told = time.monotonic(), float("-inf")
        while True:
            there = len(self.presence.connected & self._eligible().keys())
            left = began + self.patience_s - time.monotonic()
            if there >= wanted or (left <= 0 and there >= self.quorum):
                return
            if left <= 0:
                raise QuorumFailure(
                    f"round {round_}: {there} sites were connected after {self.patience_s:.0f} s, "
                    f"and {self.quorum} are needed",
                    fix="The model is as it was after the last completed round; start the server "
                    "again with the same command, and clients come back by themselves.",
                )
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                self.tell(
                    f"round {round_}: {there} of {wanted} sites are connected; waiting for "
                    f"{left:.0f} s more"
                )
            self._sleep()

    def _wait_for(self, drawn: list[str]) -> None:
        """Give sites that went away just now the time to come back."""
        while self._expected_back(drawn):
            self._sleep()

    def _expected_back(self, names: Iterable[str]) -> bool:
        """Whether one of these sites went away just now."""
        there = self.presence.connected
        return any(n not in there and self.presence.away_s(n) < self.grace_s for n in names)

    def _sleep(self) -> None:
        if self.stop():
            raise Interrupted("stopped; the last completed round is committed")
        before = self.presence.connected
        self.presence.wait_connected(lambda there: there != before, _LOOK_UP_S)
