"""Who is registered, and who takes part in a round.

A simulated roster is a view of the partition manifest: a million sites cost no objects, and a
cohort of n costs O(n).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedft.core import seeds
from fedft.core.data.batches import Uniform, poisson_rows
from fedft.core.data.partition import Manifest
from fedft.core.errors import QuorumFailure
from fedft.core.types import Site
from fedft.server.fleet import Fleet


class Roster(Protocol):
    """The registered sites, and the node of the grid that each of them is."""

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        """A cohort of different sites with data, in the order of their names."""
        ...

    def ready(self, count: int) -> bool:
        """Whether a cohort of so many sites can be drawn without waiting for any."""
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
        fleet: what the sites' devices can do.
    """

    manifest: Manifest
    holdout: float = 0.0
    fleet: Fleet = field(default_factory=Fleet)

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
                f"a round needs {count} clients, and only {population} of {len(self.manifest)} have data",
                fix="Lower [rounds] per-round, or choose a partition that leaves no client empty.",
            )
        drawn = generator.choice(population, size=count, replace=False, shuffle=False)
        indices = drawn if eligible is None else eligible[drawn]
        return [self.site(int(i)) for i in np.sort(indices)]

    def poisson(self, rate: float, generator: Uniform) -> list[Site]:
        """Every site with data independently with probability ``rate``; nobody at times."""
        eligible = self._eligible
        population = len(self.manifest) if eligible is None else len(eligible)
        drawn = poisson_rows(population, rate, generator)
        indices = drawn if eligible is None else eligible[drawn]
        return [self.site(int(i)) for i in indices]

    def shuffled(self, generator: np.random.Generator) -> Iterator[Site]:
        """All sites with data in a random order, each drawn when it is asked for (Fisher-Yates)."""
        eligible = self._eligible
        moved: dict[int, int] = {}
        population = len(self.manifest) if eligible is None else len(eligible)
        for last in range(population - 1, -1, -1):
            drawn = int(generator.integers(last + 1))
            position = moved.get(drawn, drawn)
            moved[drawn] = moved.pop(last, last)
            yield self.site(position if eligible is None else int(eligible[position]))

    def site(self, index: int) -> Site:
        """The site at a position of the manifest."""
        name = self.manifest.name_of(index)
        held = int(self.manifest.offsets[index + 1] - self.manifest.offsets[index])
        device = self.fleet.device(name)
        return Site(
            name=name,
            examples=held - int(held * self.holdout),
            rank=device.rank,
            memory_mib=device.memory_mib,
        )

    def ready(self, count: int) -> bool:
        return True

    def node_of(self, site: Site) -> int:
        return self.manifest.index_of(site.name) + 1
