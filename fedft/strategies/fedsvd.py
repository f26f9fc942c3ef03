"""FedSVD: FFA-LoRA whose fixed A is renewed every round by an SVD of the product.

    Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
    NeurIPS 2025, arXiv:2505.12805.

Sites train and send only B; A is common, so that averaging is exact. The server then writes the
same product in the basis of its singular vectors:

    B <- sum_k p_k B_k        B A = U S V^T        A <- V^T        B <- U S

The function does not change, A has orthonormal rows, and A follows what was learned without ever
being trained at a site: under differential privacy this is post-processing.

Departures from the paper: the head is trained and averaged (its code freezes it). With scale s the
product s B A is decomposed, and s divided out of B.

Wire: pi(r) numbers down, sum_modules r d_out up, plus the head both ways.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedft.core import algebra
from fedft.core.types import ClientUpdate, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy, layers, mean_of, spectral


class FedSVD(Strategy):
    """Average B, then re-write (A, B) with orthonormal rows in A."""

    name: str = "fedsvd"

    @property
    def uses_mean_only(self) -> bool:
        return True

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        learned: frozenset[Part] = frozenset({"B", "head"})
        return TrainPlan(start=state.adapter, delta=state.delta, train=learned, send=learned)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        adapter = state.adapter.replaced(mean_of(updates))
        renewed = {
            layer.module: spectral(algebra.thin_svd(x), x.rank, x)
            for layer in layers(updates)
            for x in [adapter.factors[layer.module]]
        }
        return replace(state, adapter=adapter.map_factors({**adapter.factors, **renewed}))
