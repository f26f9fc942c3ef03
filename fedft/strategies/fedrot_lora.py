"""FedRot-LoRA: turn every site's factors onto the last global ones, then average.

    Zhang, Kim, Cha and Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated
    LoRA", ICML 2026, arXiv:2602.23638; code haoran-zh/FedRot-LoRA.

The product does not change under (A, B) -> (R^T A, B R) with R orthogonal, but the mean of the
factors does: part of the aggregation bias is only a choice of basis. Each site's basis is aligned
with the last global factors by the orthogonal Procrustes problem: not at all in the first round, on
A in the second, on B in the third, on A in the fourth and so on.

    M = A_k A_ref^T   (or B_k^T B_ref)  = U S V^T        R = U V^T
    A <- sum_k p_k R_k^T A_k             B <- sum_k p_k B_k R_k

That is the code's default, the hard rotation; R may be a reflection too. With ``strength`` it is the
soft one, between nothing and the best proper rotation:

    R = U diag(1, ..., 1, det(U V^T)) V^T      R' = the rotation nearest to (1 - strength) I + strength R

Where M leaves a direction open (a singular value of zero up to rounding: a column of B that no site
has moved yet), R is the one nearest to I. The code takes what its SVD happens to give there, which
can turn the same direction differently at every site.

Sites that differ by a change of basis alone, (Q_k^T A, B Q_k) with any orthogonal Q_k, come out of
the hard rotation as one, provided that A A_ref^T (or B^T B_ref) has full rank: R_k = Q_k^T R.

Departures from the paper: its clients align before they upload. The reference is what the server
sent them, so the server can do it on arrival with the same result; the wire is the same, and sites
need to know nothing. The paper counts rounds from 0; its odd ones are the even ones here. The head
is averaged.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedft.core.types import ClientUpdate, Factors, ServerState
from fedft.strategies.base import Layer, Strategy, layers, rebuilt, weighted_sum

Factor = Literal["A", "B"]


class FedRotLoRA(Strategy):
    """Procrustes alignment to the last global factors before averaging.

    Attributes:
        strength: how far to rotate, of the soft rotation: 0 is FedAvg-LoRA, 1 the best proper
            rotation. None is the hard one.
    """

    name: str = "fedrot-lora"
    strength: Annotated[float, Field(ge=0, le=1)] | None = None

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        on = aligned(state.round)
        found = {
            layer.module: self._mean(layer, state.adapter.factors[layer.module], on)
            for layer in layers(updates)
        }
        return replace(state, adapter=rebuilt(state, found, updates))

    def _mean(self, layer: Layer, reference: Factors, on: Factor | None) -> Factors:
        parts = [x if on is None else self._turned(x, reference, on) for x in layer.parts]
        dtype = reference.A.dtype
        A = weighted_sum([x.A for x in parts], layer.p)
        B = weighted_sum([x.B for x in parts], layer.p)
        return Factors(A.to(dtype), B.to(dtype), reference.scale)

    def _turned(self, x: Factors, reference: Factors, on: Factor) -> Factors:
        R = rotation(x, reference, self.strength, on=on)
        return Factors(R.T @ x.A.double(), x.B.double() @ R, x.scale)


def aligned(round_: int) -> Factor | None:
    """The factor that is aligned in a round, counted from 1; None in the first."""
    if round_ <= 1:
        return None
    return "A" if round_ % 2 == 0 else "B"


def rotation(x: Factors, reference: Factors, strength: float | None, *, on: Factor) -> Tensor:
    """R, [r, r] float64 and orthogonal: ``(R^T A, B R)`` is ``x``, turned towards the reference.

    Args:
        x: of a site.
        reference: what it was sent.
        strength: of the soft rotation, whose R has det +1; None is the hard one.
        on: the factor that is to come close to the reference's.
    """
    mine, theirs = (x.A.T, reference.A.T) if on == "A" else (x.B, reference.B)  # [d, r]
    mine, theirs = mine.double(), theirs.double()
    M, most = mine.T @ theirs, float(mine.norm() * theirs.norm())
    if strength is None:
        return _nearest_orthogonal(M, most)
    unit = torch.eye(M.shape[0], dtype=M.dtype)
    if strength == 0:
        return unit
    whole = _nearest_orthogonal(M, most, proper=True)
    return _nearest_orthogonal((1 - strength) * unit + strength * whole, 1.0, proper=True)


_ROUNDING = 1e-14
"""A singular value below this, of the largest that there could be, says nothing of a direction."""


def _nearest_orthogonal(M: Tensor, most: float, *, proper: bool = False) -> Tensor:
    """The orthogonal R that maximises tr(R^T M), and tr(R) among those that do.

    Args:
        M: [r, r], float64.
        most: what its singular values could be at most, by the norms of what it is made of.
        proper: only rotations, of det +1.
    """
    U, S, Vt = torch.linalg.svd(M)
    found = int(S.gt(_ROUNDING * most).sum())
    left, right = U[:, :found], Vt[:found]
    if found < len(S):
        P, _, Qt = torch.linalg.svd(U[:, found:].T @ Vt[found:].T)
        left, right = (
            torch.cat([left, U[:, found:] @ P], dim=1),
            torch.cat([right, Qt @ Vt[found:]]),
        )
    if proper and torch.linalg.det(left @ right) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)  # where S is least, so is the loss
    return left @ right
