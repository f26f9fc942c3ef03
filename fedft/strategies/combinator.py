"""What FedProx and the server optimisers share: they change one half of another rule.

A combinator holds the ``inner`` rule as a field and passes on whatever it does not change. They
nest: ``{name = "fedprox", mu = 0.1, inner = {name = "fedadam", inner = {name = "lora-fair"}}}``.
"""

from abc import ABC
from collections.abc import Sequence
from typing import Self

from fedft.core.types import Adapter, ClientUpdate, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy
from fedft.strategies.facts import RunFacts
from fedft.strategies.fedavg_lora import FedAvgLoRA
from fedft.strategies.named import AnyStrategy


class Combinator(Strategy, ABC):
    """A rule over another rule.

    Attributes:
        inner: the rule underneath.
    """

    inner: AnyStrategy = FedAvgLoRA()

    def of_run(self, facts: RunFacts) -> Self:
        bound = self.model_copy(update={"inner": self.inner.of_run(facts)})
        bound._facts = facts
        return bound

    @property
    def mixed_ranks(self) -> bool:
        return self.inner.mixed_ranks

    @property
    def forgets(self) -> bool:
        return self.inner.forgets

    @property
    def prunes(self) -> bool:
        return self.inner.prunes

    @property
    def personal(self) -> frozenset[Part]:
        return self.inner.personal

    @property
    def comparable(self) -> frozenset[Part]:
        return self.inner.comparable

    @property
    def uses_mean_only(self) -> bool:
        return self.inner.uses_mean_only

    @property
    def buffer_size(self) -> int | None:
        return self.inner.buffer_size

    @property
    def guards(self) -> str:
        return self.inner.guards

    @property
    def label(self) -> str:
        return f"{super().label} over {self.inner.label}"

    def supports(self, method: str) -> bool:
        return self.inner.supports(method)

    def init(self, adapter: Adapter) -> ServerState:
        return self.inner.init(adapter)

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return self.inner.plan(state, site)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return self.inner.combine(state, updates)
