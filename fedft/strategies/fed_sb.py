"""Fed-SB (federated LoRA-XS): freeze A and B, train the r x r core between them.

    Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication
    Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", 2025, arXiv:2502.15436.
    Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024,
    arXiv:2405.17604.

    y = W x + s B R A x        R <- sum_k p_k R_k

A and B are common and fixed: averaging is exact, and only r^2 numbers a layer are learned and sent.

Everything depends on the basis. LoRA-XS takes the leading singular vectors of W, Fed-SB those of
the averaged first gradient; this server need not hold W, and never sees a gradient. Offered are:

``first-round`` (default): the first round is an ordinary LoRA round; the basis is the leading
singular vectors of its mean update, and R starts as their singular values, so that nothing is lost
beyond rank r. A mean update of many steps stands in for the paper's averaged gradient of one. (A
layer that no site held in that round gets a seeded basis.)

``seeded``: random orthonormal A and B that every site makes from ``seed``, and R = 0. Nothing but R
ever travels. A random basis reaches r^2 of the d_out d_in directions blindly: expect it to need a
larger rank than the paper's.

Departures from the paper: the basis, as said; the head is trained and averaged. The first round's
update reveals what any LoRA update does: under differential privacy it belongs in the accounting.

Wire: r^2 numbers a layer up. Down, r^2 with ``seeded``; pi(r) + r^2 with ``first-round``, since
stateless sites must be given the basis. The first round of ``first-round``: pi(r) each way. Plus the
head both ways.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from fedft.core import algebra
from fedft.core.parts import ALL_PARTS
from fedft.core.types import Adapter, ClientUpdate, Factors, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Layer, Strategy, layers, mean_of, rebuilt


class FedSB(Strategy):
    """Train, send and average the core R and the head.

    Attributes:
        basis: where A and B come from; see above.
        seed: of the ``seeded`` basis; None takes the run seed.
    """

    name: str = "fed-sb"
    basis: Literal["first-round", "seeded"] = "first-round"
    seed: int | None = None

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"R", "head"})

    def init(self, adapter: Adapter) -> ServerState:
        if self.basis == "first-round":
            return ServerState(adapter)
        cored = {m: self._seeded(m, f) for m, f in adapter.factors.items()}
        return ServerState(adapter.map_factors(cored))

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        if not _has_core(state.adapter):
            return TrainPlan(start=state.adapter, delta=state.delta)
        learned: frozenset[Part] = frozenset({"R", "head"})
        seeded = self.basis == "seeded"
        return TrainPlan(
            start=state.adapter,
            delta=state.delta,
            receive=learned if seeded else ALL_PARTS,
            train=learned,
            send=learned,
            basis=self.own_seed(self.seed) if seeded else None,
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        if _has_core(state.adapter):
            return replace(state, adapter=state.adapter.replaced(mean_of(updates)))
        seeded = {m: self._seeded(m, f) for m, f in state.adapter.factors.items()}
        learned = {layer.module: self._learned(state, layer) for layer in layers(updates)}
        return replace(state, adapter=rebuilt(state, {**seeded, **learned}, updates))

    def _seeded(self, module: str, old: Factors) -> Factors:
        A, B = algebra.orthonormal_basis(
            self.own_seed(self.seed), module, old.shape, old.rank, old.A.dtype
        )
        return Factors(A, B, old.scale, torch.zeros(old.rank, old.rank, dtype=A.dtype))

    def _learned(self, state: ServerState, layer: Layer) -> Factors:
        old = state.adapter.factors[layer.module]
        U, S, Vt = algebra.top_svd(layer.mean_update(), old.rank)
        dtype = old.A.dtype
        core = torch.diag(S / old.scale).to(dtype)
        return Factors(Vt.to(dtype).contiguous(), U.to(dtype).contiguous(), old.scale, core)


def _has_core(adapter: Adapter) -> bool:
    return any(f.R is not None for f in adapter.factors.values())
