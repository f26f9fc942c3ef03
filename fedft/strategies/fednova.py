"""FedNova: average what a step changed, not what a client changed.

    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, arXiv:2007.07481.

A client that takes more steps counts for more in a plain mean, and the federation minimises another
objective than it means to. With ``||a_k||_1`` the number of gradients of full weight in the change of
client k (its steps, for plain SGD; see :mod:`fedft.clients.methods.effective_steps`):

    x <- x + tau sum_k p_k (y_k - x) / ||a_k||_1        tau = sum_k p_k ||a_k||_1

It is the ``inner`` rule on ``x + (tau / ||a_k||_1) (y_k - x)`` in place of y_k. Where all a_k are equal
that is the inner rule, bit for bit. Where only some clients hold a tensor both sums are over those.

Departures from the paper: the change is scaled in the factors' entries. A client's own word is taken
for ``||a_k||_1``, which is at least 1: a client that lies about it weighs what it likes.

Wire: as the inner rule, and one number up.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedft.core.terms import EffectiveSteps
from fedft.core.types import ClientUpdate, ServerState, Site, TrainPlan
from fedft.strategies.combinator import Combinator


class FedNova(Combinator):
    """The inner rule on normalised changes."""

    name: str = "fednova"

    @property
    def uses_mean_only(self) -> bool:
        return False

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = self.inner.plan(state, site)
        return replace(plan, terms=(*plan.terms, EffectiveSteps()))

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        a = [max(1.0, float(u.records["effective-steps"]["a"])) for u in updates]
        names = dict.fromkeys(name for u in updates for name in u.tensors)
        tau = {name: _mean(updates, a, name) for name in names}
        return self.inner.combine(
            state, [_scaled(u, tau, own) for u, own in zip(updates, a, strict=True)]
        )


def _mean(updates: Sequence[ClientUpdate], a: Sequence[float], name: str) -> float:
    """Tau over those who sent a tensor; exactly theirs where all have the same."""
    held = [(u.examples, own) for u, own in zip(updates, a, strict=True) if name in u.tensors]
    total = sum(n for n, _ in held)
    alike = len({own for _, own in held}) == 1
    return held[0][1] if alike else sum(n / total * own for n, own in held)


def _scaled(u: ClientUpdate, tau: dict[str, float], own: float) -> ClientUpdate:
    """The update with tau / ||a||_1 times its change; as it is where that is 1."""
    start = u.start.tensors()

    def moved(name: str) -> Tensor:
        y, x = u.tensors[name], start[name].double()
        return y if tau[name] == own else (x + tau[name] / own * (y.double() - x)).to(y.dtype)

    return replace(u, tensors={name: moved(name) for name in u.tensors})
