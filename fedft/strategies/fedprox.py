"""FedProx: hold the sites near their start, under any rule.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127.

    site k minimises   f_k(theta) + mu / 2 ||theta - theta_start||^2

over everything it trains: here the adapted factors and the head. The server's half is that of the
``inner`` rule.

Departures from the paper: the paper's sites may do different amounts of work (gamma-inexact
solutions); here the `[training]` table says how much, for all.

Wire: as the inner rule.
"""

from dataclasses import replace

from pydantic import PositiveFloat

from fedft.core.types import ServerState, Site, TrainPlan
from fedft.strategies.combinator import Combinator


class FedProx(Combinator):
    """The inner rule with a proximal term in the sites' loss.

    Attributes:
        mu: weight of the proximal term.
    """

    name: str = "fedprox"
    mu: PositiveFloat = 0.01

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        plan = self.inner.plan(state, site)
        return replace(plan, training=replace(plan.training, proximal_mu=self.mu))
