"""RoLoRA: train and average one factor at a time, alternating by round.

    Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
    NeurIPS 2025, arXiv:2502.01755 (first version arXiv:2409.02346).

    rounds 1, 3, 5, ...    A frozen    B <- sum_k p_k B_k
    rounds 2, 4, 6, ...    B frozen    A <- sum_k p_k A_k

One factor is common to all sites, so that averaging is exact: the aggregation bias is zero. The
first round must train B, since B = 0 leaves A without a gradient.

Departures from the paper: both factors travel down, because a site that was not in the last round
does not have its result. (A federation in which every site takes part in every round could do with
half.) The head is trained and averaged every round.

Wire: pi(r) numbers down; up, sum_modules r d_out in odd rounds and r d_in in even ones; plus the
head both ways.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedft.core.types import ClientUpdate, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, mean_of


class RoLoRA(Strategy):
    """B in the first round, A in the second, and so on; the head always."""

    name: str = "rolora"

    @property
    def uses_mean_only(self) -> bool:
        return True

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        factor: Part = "B" if state.round % 2 == 0 else "A"
        learned: frozenset[Part] = frozenset({factor, "head"})
        return TrainPlan(start=state.adapter, delta=state.delta, train=learned, send=learned)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)))
