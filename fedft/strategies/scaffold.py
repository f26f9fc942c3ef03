"""SCAFFOLD: correct every client's gradient by how it differs from everybody's.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020, arXiv:1910.06378; option II.

Client k of N keeps a control variate c_k, the mean of its gradients when it last trained, and the
server c, the mean of all of them; all are zero at first. With S the clients of the round:

    client k    y <- y - lr (g + c - c_k) on each step, from y = x
                c_k' = mean of g over its steps = c_k - c + (x - y) / (steps lr)   for plain SGD
    server      x <- x + 1/|S| sum_S (y_k - x)         (the ``inner`` rule, all clients alike)
                c <- c + 1/N sum_S (c_k' - c_k)        so that c = 1/N sum_k c_k in every round

Departures from the paper. The server's step size is 1; put it over ``fedavgm`` with ``beta = 0`` for
another. c_k' is taken as the mean of the gradients, which is what the paper's difference comes to
for the steps that it is about, and what remains of it under momentum, AdamW and clipping
(:mod:`fedft.clients.methods.scaffold`); the paper's rates hold for plain SGD alone. What a client does not
hold counts as a zero gradient, see :mod:`fedft.strategies.drift`.

A client that is lost after it trained keeps a c_k that c has not seen, where its reply does not count
at the client: :mod:`fedft.clients.kept` forgets it then, and a simulation does not commit it.

Wire: as the inner rule, and once more in each direction what trains.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import model_validator

from fedft.core.terms import ControlVariates, entries
from fedft.core.types import ClientUpdate, ServerState, Site, TrainPlan
from fedft.strategies.combinator import Combinator
from fedft.strategies.drift import added, alike, check_inner, sent_down

_SLOT = "scaffold-control"


class Scaffold(Combinator):
    """The inner rule with control variates at the clients and the server."""

    name: str = "scaffold"

    @model_validator(mode="after")
    def _entries_keep_their_meaning(self) -> Self:
        check_inner(self.name, self.inner)
        return self

    @property
    def uses_mean_only(self) -> bool:
        return False

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = self.inner.plan(state, site)
        control = sent_down(state.record(_SLOT), state.slots, plan, state.adapter)
        records = {**plan.records, "control": control}
        return replace(plan, terms=(*plan.terms, ControlVariates()), records=records)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = self.inner.combine(state, alike(updates))
        share = 1 / (self.facts.clients or len(updates))
        c = state.record(_SLOT)
        for u in updates:
            c = added(c, u.records["control-change"], u.start, state.adapter, share)
        return replace(after, slots={**after.slots, **entries(_SLOT, c)})
