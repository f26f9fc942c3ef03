"""FedMomentum: keep the strongest directions of the mean update, merge the rest into the base.

    Yan et al., "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning", 2026,
    arXiv:2603.08014.

    dW = sum_k p_k s_k B_k A_k = U S V^T
    A <- S_R^(1/2) V_R^T      B <- U_R S_R^(1/2)      W <- W + sum_{i>R} S_i u_i v_i^T

The total is exact, as with FLoRA, and sites go on from the leading directions, where FLoRA starts
from nothing.

State: experimental, as the paper's opening alone could be read.

Departures from the paper, of which the opening was read: the square root on both factors is our
reading; the decomposition is exact where the paper's is randomised; and the residual is always
merged, where the paper says it "can be". Mixed ranks are ours: a site of rank r trains the r
strongest directions, and its product is completed by what the server has beyond them,

    dW = sum_k p_k (s_k B_k A_k + s B[:, r_k:] A[r_k:])

so that nothing is forgotten (the mean of the products alone would lose of every direction the share
of the sites that do not reach it). While it trains such a site does not have these directions in its
model; exact-mixed-rank sends them along. The base change since the first round travels in factored
form with every plan, since sites are stateless; it is stored at no more than rank min(d_out, d_in),
without loss, and may be cut by an SVD (``delta_rank``), with loss. The head is averaged.

Wire, round t: pi(r_k) numbers down and as many up, plus the base change times (d_in + d_out)
numbers a layer, down, at rank min(d, delta_rank, sum over all earlier rounds of (min(d, sum_k r_k +
R - min_k r_k) - R)) with d = min(d_out, d_in); plus the head both ways.
"""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import PositiveInt

from fedft.core import algebra
from fedft.core.types import ClientUpdate, Factors, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, at_rank, grown, layers, rebuilt, spectral


class FedMomentum(Strategy):
    """The leading triplets stay trainable; the residual goes into the base.

    Attributes:
        delta_rank: the largest rank of the base change; None loses nothing.
    """

    name: str = "fedmomentum"
    delta_rank: PositiveInt | None = None

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return TrainPlan(start=at_rank(state.adapter, site.rank), delta=state.delta)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        delta = dict(state.delta)
        kept: dict[str, Factors] = {}
        for layer in layers(updates):
            old = state.adapter.factors[layer.module]
            triplets, rest = algebra.peel(layer.completed(old), old.rank)
            kept[layer.module] = spectral(triplets, old.rank, old, balanced=True)
            if rest is not None:
                delta[layer.module] = grown(delta, layer.module, rest, self.delta_rank)
        return replace(state, adapter=rebuilt(state, kept, updates), delta=delta)
