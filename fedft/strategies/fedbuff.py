"""FedBuff: the server waits for K replies, whatever version they started from.

    Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
    arXiv:2106.06639.

With x the global state, y_k what site k sends, x_k the version that it started from, and tau_k the
server updates since then, K replies make one update

    x <- x + eta_g / K sum_k s(tau_k) (y_k - x_k)        s(tau) = 1 / sqrt(1 + tau)

Here every change is first carried over to the present, y'_k = x + s(tau_k) (y_k - x_k), and the
``inner`` rule then makes of the y'_k what it makes of a round. Over FedAvg-LoRA that is the equation
above with eta_g = 1; with nothing stale it is the inner rule's own round, bit for bit.

Departures from the paper: sites are weighted by their examples, as everywhere here, not evenly; a
server learning rate is that of FedAvgM with beta = 0 around this rule; no site trains twice from
one version. The sum is over LoRA factors and the head, not over a whole model.

Wire: as the inner rule.
"""

from collections.abc import Sequence

from pydantic import PositiveInt, model_validator
from torch import Tensor

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.asynchronous import Staleness, check_inner, refreshed
from fedft.strategies.combinator import Combinator


class FedBuff(Combinator):
    """K replies a server update, each change weighted by its staleness.

    Attributes:
        size: K, replies that fill the buffer.
        staleness: how the weight falls; the paper's is ``polynomial`` with a = 0.5.
    """

    name: str = "fedbuff"
    size: PositiveInt = 10
    staleness: Staleness = Staleness()

    @model_validator(mode="after")
    def _inner_is_comparable(self) -> "FedBuff":
        check_inner(self.name, self.inner)
        return self

    @property
    def buffer_size(self) -> int | None:
        return self.size

    @property
    def uses_mean_only(self) -> bool:
        return False

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        def carried(u: ClientUpdate, x: Tensor, start: Tensor, y: Tensor) -> Tensor:
            return y if u.staleness == 0 else x + self.staleness.weight(u.staleness) * (y - start)

        return self.inner.combine(state, refreshed(updates, state.adapter, carried))
