"""Who is registered, and who takes part in a round.

A simulated roster is a view of the partition manifest: a million sites cost no objects, and a
cohort of n costs O(n).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedft.core import seeds
from fedft.core.errors import QuorumFailure
from fedft.core.partition import Manifest
from fedft.core.types import Site

T = TypeVar("T")


class Roster(Protocol):
    """The registered sites, and the node of the grid that each of them is."""

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        """A cohort of different sites with data, in the order of their names."""
        ...

    def node_of(self, site: Site) -> int:
        """The grid's node id of a site."""
        ...


@dataclass(frozen=True)
class SimulatedRoster:
    """Sites of a partition manifest; node id = index + 1.

    Attributes:
        manifest: who holds which rows.
        holdout: share of each site's rows that it does not train on.
        ranks: LoRA ranks dealt out by seed; empty leaves the run's.
        memory_mib: memory budgets dealt out by seed; empty is unlimited.
        seed: of the run.
    """

    manifest: Manifest
    holdout: float = 0.0
    ranks: tuple[int, ...] = ()
    memory_mib: tuple[float, ...] = ()
    seed: int = 0

    @cached_property
    def _eligible(self) -> NDArray[np.int64] | None:
        """Indices of the sites that have data; None where all have."""
        empty = np.diff(self.manifest.offsets) == 0
        return np.flatnonzero(~empty) if bool(empty.any()) else None

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        """Uniform without replacement, by (seed, round, attempt) alone."""
        generator = seeds.numpy_generator(seed, "cohort", round_, attempt)
        eligible = self._eligible
        population = len(self.manifest) if eligible is None else len(eligible)
        if population < count:
            raise QuorumFailure(
                f"a round needs {count} sites, and only {population} of {len(self.manifest)} have data",
                fix="Lower [rounds] per-round, or choose a partition that leaves no site empty.",
            )
        drawn = generator.choice(population, size=count, replace=False, shuffle=False)
        indices = drawn if eligible is None else eligible[drawn]
        return [self.site(int(i)) for i in np.sort(indices)]

    def site(self, index: int) -> Site:
        """The site at a position of the manifest."""
        name = self.manifest.name_of(index)
        held = int(self.manifest.offsets[index + 1] - self.manifest.offsets[index])
        return Site(
            name=name,
            examples=held - int(held * self.holdout),
            rank=self._dealt("rank", name, self.ranks),
            memory_mib=self._dealt("memory", name, self.memory_mib),
        )

    def node_of(self, site: Site) -> int:
        return self.manifest.index_of(site.name) + 1

    def _dealt(self, what: str, name: str, hand: tuple[T, ...]) -> T | None:
        return hand[seeds.derive(self.seed, what, name) % len(hand)] if hand else None
