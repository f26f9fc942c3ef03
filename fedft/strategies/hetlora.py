"""HetLoRA: truncate for each site, zero-pad and weigh by norm, let sites prune their rank.

    Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    EMNLP 2024, arXiv:2401.06432.

The server holds factors of the largest rank R. A site of rank r gets the first r rows of A and
columns of B. Its loss has a penalty on the tail beyond k = floor(gamma r),

    lambda ||B[:, k:]||_F ||A[k:, :]||_F        summed over the layers,

and where that product has shrunk after training, the site continues at rank k. The server pads what
comes back with zeros and averages the factors, weighted by the norm of each site's update:

    A = sum_k w_k pad(A_k)    B = sum_k w_k pad(B_k)    w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F

The truncated rows are the same for all ranks only if all use one scale: sites train with the
server's s = alpha / R whatever their rank.

State: experimental, as the paper's full text could not be read.

Departures from the paper, of which only the abstract, figures and third-party notes could be read.
The decision to prune is taken by the server, which knows both ends of the comparison (what it sent,
what came back), by the same inequality; the site's reply then travels at the rank it had, and the
server cuts it before averaging. Sites are weighted layer by layer, and their numbers of examples do
not enter (the paper's weights do not have them), except for the head, and for a layer whose updates
are all zero.

Mixed ranks forget. Zero-padding is kept as published, though it multiplies the ranks that few sites
hold by their share of the weight in every round, in both factors, also if nobody trains: raFLoRA is
one answer to that. With ``beyond_rank = "server"`` (ours) what comes back is padded with the server's
own rows and columns instead, and sites that do not train change nothing.

Wire: r_k (d_in + d_out) numbers a layer down to a site of present rank r_k and as many up, plus the
head both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedft.core import algebra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    LocalTraining,
    ServerState,
    Site,
    TrainPlan,
)
from fedft.strategies.base import Layer, Strategy, at_rank, layers, rebuilt, weighted_sum

_SLOT = "hetlora/rank/"


class HetLoRA(Strategy):
    """Zero-padded averaging with sparsity weights and self-pruning.

    Attributes:
        gamma: share of a site's rank that its tail penalty spares; the rest may be pruned. 1
            prunes nothing.
        penalty: lambda, the weight of the tail penalty in the sites' loss.
        min_rank: no site is pruned below it.
        beyond_rank: what a site's factors are padded with up to rank R: ``zero``, as in the paper, or
            what the ``server`` has there.
    """

    name: str = "hetlora"
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    penalty: Annotated[float, Field(ge=0)] = 0.01
    min_rank: PositiveInt = 1
    beyond_rank: Literal["zero", "server"] = "zero"

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def forgets(self) -> bool:
        return self.beyond_rank == "zero"

    @property
    def prunes(self) -> bool:
        return self.gamma < 1

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        pruned = state.slots.get(_SLOT + site.name)
        rank = site.rank if pruned is None else int(pruned)
        start = at_rank(state.adapter, rank, common_scale=True)
        prunable = self._kept(start.rank) < start.rank
        training = LocalTraining(tail_penalty=self.penalty, tail_keep=self.gamma)
        return TrainPlan(
            start=start, delta=state.delta, training=training if prunable else LocalTraining()
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        cut = {u.site: rank for u in updates if (rank := self.pruned_rank(u)) is not None}
        found = {
            layer.module: self._mean(_cut(layer, cut), state.adapter.factors[layer.module])
            for layer in layers(updates)
        }
        slots = {_SLOT + site: torch.tensor(rank) for site, rank in cut.items()}
        return replace(
            state, adapter=rebuilt(state, found, updates), slots={**state.slots, **slots}
        )

    def pruned_rank(self, update: ClientUpdate) -> int | None:
        """The rank at which this site continues, or None where it keeps its own."""
        rank = update.start.rank
        kept = self._kept(rank)
        if kept >= rank or tail(update.adapter, kept) >= tail(update.start, kept):
            return None
        return kept

    def _mean(self, layer: Layer, old: Factors) -> Factors:
        norms = [algebra.norm(x) for x in layer.parts]
        total = sum(norms)
        w = [norm / total for norm in norms] if total > 0 else layer.p
        padded = [self._padded(x, old) for x in layer.parts]

        def mean(tensors: list[Tensor]) -> Tensor:
            return weighted_sum(tensors, w).to(old.A.dtype)

        return Factors(mean([x.A for x in padded]), mean([x.B for x in padded]), old.scale)

    def _padded(self, x: Factors, old: Factors) -> Factors:
        if self.beyond_rank == "zero":
            return algebra.pad(x, old.rank)
        r = x.rank
        return Factors(torch.cat([x.A, old.A[r:]]), torch.cat([x.B, old.B[:, r:]], dim=1), x.scale)

    def _kept(self, rank: int) -> int:
        return max(floor(self.gamma * rank), self.min_rank)


def tail(adapter: Adapter, kept: int) -> float:
    """``sum ||B[:, kept:]||_F ||A[kept:, :]||_F`` over the layers."""
    return sum(_norm(f.B[:, kept:]) * _norm(f.A[kept:]) for f in adapter.factors.values())


def _norm(x: Tensor) -> float:
    return float(x.double().square().sum()) ** 0.5


def _cut(layer: Layer, ranks: Mapping[str, int]) -> Layer:
    parts = [
        algebra.truncate(x, ranks[u.site]) if u.site in ranks else x
        for x, u in zip(layer.parts, layer.holders, strict=True)
    ]
    return replace(layer, parts=parts)
