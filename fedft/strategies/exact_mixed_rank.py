"""Exact mixed-rank mean: what a site cannot train travels as its frozen base, changes are averaged.

This project's own rule; nothing of it is claimed to be anybody's.

The rules for mixed ranks cut the global adapter to a site's rank. The site then trains another model
than the server has, and its product stands for less than the server knows. Here the directions
beyond its rank r go along, frozen, as a change of its base weights in factored form (which is how
FLoRA and FedEx-LoRA send theirs):

    site k trains   B_k, A_k   from the first r_k rows and columns   on   W + D + tail_k
                    tail_k = s B[:, r_k:] A[r_k:]

so that all sites start from one function, W + D + s B A, whatever their ranks. Their changes are
averaged exactly and added to it:

    dW = s B A + sum_k p_k (s_k B_k A_k - s B[:, :r_k] A[:r_k]) = sum_k p_k (s_k B_k A_k + tail_k)
    dW = U S V^T
    A <- S_R^(1/2) V_R^T      B <- U_R S_R^(1/2)      D <- D + sum_{i>R} S_i u_i v_i^T

so that nothing is lost, and a site of rank r trains the r strongest directions. At one rank this is
FedMomentum, whose split it is.

The base change D since the first round travels with every plan, since sites are stateless; it is
stored at no more than rank min(d_out, d_in), without loss, and may be cut by an SVD
(``delta_rank``), with loss. The tails are never cut. The head is averaged.

State: experimental, as it is in no paper.

Wire, round t: pi(r_k) numbers down and as many up, plus the frozen part, down, at rank
min(d, rank of D + R - r_k) times (d_in + d_out) numbers a layer, where d = min(d_out, d_in) and the
rank of D is min(d, delta_rank, sum over all earlier rounds of (min(d, sum_k r_k + R - min_k r_k) -
R)); plus the head both ways. A layer whose B is zero has nothing to freeze: in the first round of
plain LoRA the frozen part is empty.
"""

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from pydantic import PositiveInt

from fedft.core import algebra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Delta,
    Factors,
    Part,
    ServerState,
    Site,
    TrainPlan,
)
from fedft.strategies.base import Strategy, at_rank, grown, layers, rebuilt, spectral

_FROZEN: WeakKeyDictionary[Adapter, dict[int, tuple[Delta, Delta]]] = WeakKeyDictionary()
"""Adapter → rank → (base change, the same with the tails of that rank): sites of one rank are sent
one object, which is encoded once, and share a pass."""


class ExactMixedRank(Strategy):
    """The exact mean of the changes; what is beyond a site's rank is part of its frozen base.

    Attributes:
        delta_rank: the largest rank of the base change; None loses nothing.
    """

    name: str = "exact-mixed-rank"
    delta_rank: PositiveInt | None = None

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        start = at_rank(state.adapter, site.rank)
        return TrainPlan(start=start, delta=_frozen(state, start.rank))

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


def _frozen(state: ServerState, rank: int) -> Delta:
    """The change of the base weights under a site of this rank: the server's, and the tails."""
    if rank >= state.adapter.rank:
        return state.delta
    known = _FROZEN.setdefault(state.adapter, {})
    if rank not in known or known[rank][0] is not state.delta:
        delta = dict(state.delta)
        for module, f in state.adapter.factors.items():
            if f.rank > rank and f.B.any():
                delta[module] = grown(delta, module, _tail(f, rank), None)
        known[rank] = (state.delta, delta)
    return known[rank][1]


def _tail(x: Factors, rank: int) -> Factors:
    """What of the product lies beyond a rank, at scale 1."""
    return Factors(x.scale * x.A[rank:], x.B[:, rank:].contiguous(), 1.0)
