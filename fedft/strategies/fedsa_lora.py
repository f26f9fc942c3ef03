"""FedSA-LoRA: share A, keep B at home.

    Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
    arXiv:2410.01463.

Sites train A and B; only A is sent and averaged. B stays in the site's own state:

    A <- sum_k p_k A_k        B_k stays at site k

There is no single global model: each site is to be judged with its own B, on its own held-out
part. A site that joins later starts from B = 0. What the server calls its adapter has B = 0, and
applies nothing.

Departures from the paper: none in the rule. The classifier head is local by default, as in the
official configuration; ``head = "shared"`` averages it.

Wire: sum_modules r d_in numbers down and as many up; plus the head both ways where it is shared.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedft.core.types import ClientUpdate, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, mean_of


class FedSALoRA(Strategy):
    """Average A; B is personal, and so is the head unless it is shared.

    Attributes:
        head: whether the head stays at the sites or is averaged.
    """

    name: str = "fedsa-lora"
    head: Literal["local", "shared"] = "local"

    @property
    def personal(self) -> frozenset[Part]:
        return frozenset({"B", "head"}) if self.head == "local" else frozenset({"B"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        shared: frozenset[Part] = frozenset({"A", "head"} if self.head == "shared" else {"A"})
        return TrainPlan(
            start=state.adapter,
            delta=state.delta,
            receive=shared,
            send=shared,
            keep=self.personal,
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)))
