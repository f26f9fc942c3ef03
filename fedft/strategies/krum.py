"""Krum: take the one update that lies closest to its neighbours.

    Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent", NeurIPS 2017.

    d(i, j)^2 = sum_modules ||s_i B_i A_i - s_j B_j A_j||_F^2 + ||head_i - head_j||^2
    score(i)  = sum of d(i, j)^2 over the K - f - 2 nearest j
    the inner rule gets the update of the lowest score, and no other

f = ceil(``byzantine`` K) sites may lie; the paper's guarantee asks for K >= 2 f + 3.

Departures from the paper: distances are taken in product space. LoRA factors are not unique (B Q and
Q^T A are the same update for any rotation Q), so that two honest sites can be far apart as factors
and the same as functions; the products of a pair of sites are compared through the Gram matrices of
their factors, and no d_out x d_in matrix is formed. Ranks may therefore differ. A layer that a site
does not hold counts as unchanged by it. Rounds too small for K - f - 2 >= 1 use one neighbour.

Wire: as the inner rule.
"""

from abc import ABC
from collections.abc import Sequence
from math import ceil
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedft.core import algebra
from fedft.core.parts import MATRICES
from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.combinator import Combinator


class Central(Combinator, ABC):
    """What Krum and Multi-Krum share: every update is scored by its distance to its neighbours.

    Attributes:
        byzantine: share of a round's sites that may lie.

    Raises:
        ValueError: under the inner rule sites keep a factor, so that their products are not known.
    """

    byzantine: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    @property
    def guards(self) -> str:
        return f"{self.label} picks clients by the change of their adapters"

    @property
    def uses_mean_only(self) -> bool:
        return False

    @property
    def chooses(self) -> bool:
        return True

    @model_validator(mode="after")
    def _products_are_known(self) -> Self:
        if kept := self.inner.personal & MATRICES:
            raise ValueError(
                f"inner: the clients' products are compared, and under {self.inner.name} they keep "
                f"{', '.join(sorted(kept))} to themselves; choose a rule that shares both factors"
            )
        return self

    def liars(self, K: int) -> int:
        """f, the number of sites among K that may lie: the share, rounded up."""
        return ceil(self.byzantine * K - 1e-9)  # 0.2 * 15 is a little above 3 in floating point

    def scores(self, updates: Sequence[ClientUpdate]) -> Tensor:
        """Each update's sum of squared distances to its nearest neighbours. [K], float64"""
        K = len(updates)
        distances = squared_distances(updates).fill_diagonal_(torch.inf)
        nearest = distances.sort(dim=1).values[:, : K - 1]
        return nearest[:, : max(1, K - self.liars(K) - 2)].sum(dim=1)


class Krum(Central):
    """The inner rule on the most central update alone.

    Attributes:
        byzantine: share of a round's sites that may lie.
    """

    name: str = "krum"

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        best = int(self.scores(updates).argmin())
        return self.inner.combine(state, [updates[best]])


def squared_distances(updates: Sequence[ClientUpdate]) -> Tensor:
    """``d(i, j)^2`` between the sites' updates in product space. [K, K], float64

    Two layer-pruned sites are compared on the layers that both hold, and their distance is scaled
    up to all layers; where they share none it is the largest known.
    """
    adapters = [u.adapter for u in updates]
    K = len(updates)
    total = torch.zeros(K, K, dtype=torch.float64)
    shared = torch.zeros(K, K, dtype=torch.float64)
    modules = dict.fromkeys(module for a in adapters for module in a.factors)
    for module in modules:
        holders = torch.tensor([k for k, a in enumerate(adapters) if module in a.factors])
        pairs = holders[:, None], holders[None, :]
        total[pairs] += _from_gram(
            algebra.gram([adapters[int(k)].factors[module] for k in holders])
        )
        shared[pairs] += 1
    total = torch.where(shared > 0, total * (len(modules) / shared.clamp_min(1)), total.max())
    for name in adapters[0].head:
        rows = torch.stack([a.head[name].double().flatten() for a in adapters])
        total += _from_gram(rows @ rows.T)
    return total


def _from_gram(G: Tensor) -> Tensor:
    squares = G.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * G).clamp_min(0)
