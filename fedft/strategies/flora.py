"""FLoRA: stack the factors, merge the stack into the base, start afresh.

    Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations", NeurIPS 2024, arXiv:2409.05976.

Stacking is exact for any ranks r_k:

    A = [p_1 A_1; ...; p_K A_K]   B = [B_1 | ... | B_K]   B A = sum_k p_k B_k A_k

The weight stands on A alone; on both factors it would be squared. The sum is added to the base
weights, A is drawn anew and B is zero, so that the applied update has no bias, but the factors that
were learned do not carry over (the initialisation lag is as large as it can be).

Departures from the paper. Sites here are stateless: what is sent down is the whole change of the
base since the first round, not the last round's stack, so that late and returning sites need no
history. It is stored at no more than rank min(d_out, d_in), without loss, and may be cut by an SVD
(``delta_rank``), with loss. A is drawn by the server, once for all sites, from (``seed``, round,
layer), where the paper's clients draw their own. The head is averaged.

Wire, round t: down, the base change at rank min(d_out, d_in, delta_rank, sum over all earlier
rounds of sum_k r_k), times (d_in + d_out) numbers a layer; plus r d_in for A. Up, r (d_in + d_out).
Plus the head both ways. (The paper: down sum_k r_k (d_in + d_out) each round.)
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import torch
from pydantic import PositiveInt

from fedft.core.seeds import torch_generator
from fedft.core.types import ClientUpdate, Factors, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, at_rank, grown, layers, rebuilt


class FLoRA(Strategy):
    """Merge the stacked update into the base weights; draw new factors.

    Attributes:
        delta_rank: the largest rank of the base change; None loses nothing.
        seed: of the fresh A; None takes the run seed.
    """

    name: str = "flora"
    delta_rank: PositiveInt | None = None
    seed: int | None = None

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return TrainPlan(
            start=at_rank(state.adapter, site.rank),
            delta=state.delta,
            receive=frozenset({"A", "head"}),  # B is zero, as the common seed made it
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        delta = dict(state.delta)
        fresh: dict[str, Factors] = {}
        for layer in layers(updates):
            delta[layer.module] = grown(delta, layer.module, layer.mean_update(), self.delta_rank)
            fresh[layer.module] = self._redrawn(state, layer.module)
        return replace(state, adapter=rebuilt(state, fresh, updates), delta=delta)

    def _redrawn(self, state: ServerState, module: str) -> Factors:
        """LoRA's own start: A uniform in +-1/sqrt(d_in), B zero."""
        old = state.adapter.factors[module]
        generator = torch_generator(self.own_seed(self.seed), "flora", state.round, module)
        unit = torch.rand(old.A.shape, generator=generator, dtype=torch.float64)
        A = ((2 * unit - 1) / sqrt(old.A.shape[1])).to(old.A.dtype)
        return Factors(A, torch.zeros_like(old.B), old.scale)
