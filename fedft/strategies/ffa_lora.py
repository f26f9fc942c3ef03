"""FFA-LoRA: freeze A, average B.

    Sun, Li, Li and Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
    arXiv:2403.12313.

A is random, common to all sites and frozen for ever; sites train and send only B:

    B <- sum_k p_k B_k        A = A_0

Averaging is exact, because sum p_k B_k A_0 = (sum p_k B_k) A_0: the aggregation bias is zero. Under
differential privacy the noise enters once (x_B A_0) and has no quadratic term.

Every site makes A_0 from the run's seed, so that it is never on the wire.

Wire: sum_modules r d_out numbers down and as many up, plus the head both ways.

Departure from the paper: the classifier head is trained and averaged, because it starts random.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedft.core.types import ClientUpdate, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, mean_of


class FFALoRA(Strategy):
    """Train, send and average B and the head; A stays as the common seed made it."""

    name: str = "ffa-lora"

    @property
    def uses_mean_only(self) -> bool:
        return True

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return TrainPlan(
            start=state.adapter,
            delta=state.delta,
            receive=frozenset({"B", "head"}),
            train=frozenset({"B", "head"}),
            send=frozenset({"B", "head"}),
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)))
