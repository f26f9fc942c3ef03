"""FedAsync: every reply makes a new model at once, mixed in by how stale it is.

    Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019, arXiv:1903.03934.

With x the global state, y what one site sends, and tau the server updates since the version that
it started from,

    x <- (1 - alpha s(tau)) x + alpha s(tau) y

with s constant, polynomial or hinge; see :mod:`fedft.strategies.asynchronous`. What is moved to the
present in this way is handed to the ``inner`` rule as a round of one site. Over FedAvg-LoRA that is
the equation above; with alpha = 1 and nothing stale it is the inner rule.

Departures from the paper: tau counts from 0 for a site that has seen the newest version, so that
s = 1 there. The sites' proximal term is FedProx, as the inner rule. The mixing is of LoRA factors
and the head, not of a whole model.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.asynchronous import Staleness, check_inner, refreshed
from fedft.strategies.combinator import Combinator


class FedAsync(Combinator):
    """One reply a server update, weighted by its staleness.

    Attributes:
        alpha: how much of a fresh reply the new model takes.
        staleness: how the weight falls.
    """

    name: str = "fedasync"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    staleness: Staleness = Staleness()

    @model_validator(mode="after")
    def _inner_is_comparable(self) -> "FedAsync":
        check_inner(self.name, self.inner)
        return self

    @property
    def buffer_size(self) -> int | None:
        return 1

    @property
    def uses_mean_only(self) -> bool:
        return False

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        def mixed(u: ClientUpdate, x: Tensor, start: Tensor, y: Tensor) -> Tensor:
            share = self.alpha * self.staleness.weight(u.staleness)
            return y if share == 1 else x + share * (y - x)

        return self.inner.combine(state, refreshed(updates, state.adapter, mixed))
