"""FedDyn: penalties that make the clients' optima meet at the federation's.

    Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv:2111.04263.

Client k of N keeps lambda_k, the gradient at which it stopped last; the server keeps h, the mean of
all of them; all are zero at first. With S the clients of the round:

    client k    y_k minimises f_k(y) - <lambda_k, y> + alpha / 2 ||y - x||^2
                lambda_k <- lambda_k - alpha (y_k - x)
    server      h <- h - alpha / N sum_S (y_k - x)
                x <- 1/|S| sum_S y_k - h / alpha       (the mean is the ``inner`` rule's, all alike)

At a fixed point all y_k are x, h is zero, and lambda_k is client k's own gradient: they sum to zero.

Departures from the paper: the minimum is as near as the steps of `[training]` bring it. What no client
of a round sent (RoLoRA's other factor, blocks that nobody held) stays as it is.

Mixed ranks are refused: the penalty's strength is about a client's own coordinates, which are other
ones at every rank.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import PositiveFloat, model_validator

from fedft.core.terms import Dynamic, entries
from fedft.core.types import ClientUpdate, ServerState, Site, TrainPlan
from fedft.strategies.changes import change_of
from fedft.strategies.combinator import Combinator
from fedft.strategies.drift import added, alike, check_inner

_SLOT = "feddyn-h"


class FedDyn(Combinator):
    """The inner rule with a dynamic penalty at the clients and its sum at the server.

    Attributes:
        alpha: weight of the penalty. Small ones trust the clients' own optima more.
    """

    name: str = "feddyn"
    alpha: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _entries_keep_their_meaning(self) -> Self:
        check_inner(self.name, self.inner)
        return self

    @property
    def mixed_ranks(self) -> bool:
        return False

    @property
    def uses_mean_only(self) -> bool:
        return False

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = self.inner.plan(state, site)
        return replace(plan, terms=(*plan.terms, Dynamic(alpha=self.alpha)))

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = self.inner.combine(state, alike(updates))
        share = -self.alpha / (self.facts.clients or len(updates))
        h = state.record(_SLOT)
        for u in updates:
            h = added(h, change_of(u), u.start, state.adapter, share)
        new = after.adapter.tensors()
        sent = dict.fromkeys(name for u in updates for name in u.tensors)
        moved = {
            name: (new[name].double() - h[name] / self.alpha).to(new[name].dtype) for name in sent
        }
        slots = {**after.slots, **entries(_SLOT, h)}
        return replace(after, adapter=after.adapter.replaced(moved), slots=slots)
