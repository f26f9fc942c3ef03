"""FlexLoRA: average the products, then hand out the SVD of the mean at every site's rank.

    Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources", NeurIPS 2024, arXiv:2402.11505.

    dW = sum_k p_k s_k B_k A_k = U S V^T        A = V_r^T      B = U_r S_r / s_r      s_r = alpha / r

The truncation to rank r is the best one in Frobenius norm (Eckart-Young), and its error is the tail
of the spectrum, sqrt(sum_{i>r} S_i^2). The spectrum stands on B; A has orthonormal rows.

The mean product is never formed: its leading triplets come from the stacked factors.

Mixed ranks forget. A site of rank r starts from r directions, and its product counts as all that it
knows: what the server has beyond them is multiplied, in every round, by the weight of the sites that
reach it, also if nobody trains. With ``beyond_rank = "server"`` (ours) every site's product is
completed by what the server has beyond its rank,

    dW = sum_k p_k (s_k B_k A_k + s B[:, r_k:] A[r_k:])

which is the server's update plus the mean of the changes; sites that do not train change nothing.

Departures from the paper: the server keeps dW at rank R, the largest of the fleet, which is all that
it sends out. Directions that no site has used yet keep a unit row in A, so that they can learn. The
head is averaged.

Wire: r_k (d_in + d_out) numbers a layer down to a site of rank r_k and as many up, plus the head
both ways.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedft.core import algebra
from fedft.core.types import ClientUpdate, Factors, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Layer, Strategy, at_rank, layers, rebuilt, spectral


class FlexLoRA(Strategy):
    """The leading singular triplets of the mean product, at every rank.

    Attributes:
        beyond_rank: what a site's product is beyond its rank: ``zero``, as in the paper, or as the
            ``server`` has it.
    """

    name: str = "flexlora"
    beyond_rank: Literal["zero", "server"] = "zero"

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def forgets(self) -> bool:
        return self.beyond_rank == "zero"

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return TrainPlan(start=at_rank(state.adapter, site.rank), delta=state.delta)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        found = {layer.module: self._leading(state, layer) for layer in layers(updates)}
        return replace(state, adapter=rebuilt(state, found, updates))

    def _leading(self, state: ServerState, layer: Layer) -> Factors:
        old = state.adapter.factors[layer.module]
        dW = layer.mean_update() if self.beyond_rank == "zero" else layer.completed(old)
        return spectral(algebra.top_svd(dW, old.rank), old.rank, old)
