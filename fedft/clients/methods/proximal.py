"""The proximal term: hold a client near its start.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127.

``mu / 2 ||theta - theta_start||^2`` is added to the loss: ``mu (theta - theta_start)`` to the gradient.
"""

from collections.abc import Sequence

from fedft.clients.methods.base import Method, Rows, strengths
from fedft.core.terms import Proximal as Term


class Proximal(Method):
    """See :class:`fedft.core.terms.Proximal`."""

    term = Term

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        self._start = rows.theta.clone()
        self._mu = strengths(rows, terms, "mu")

    def correct(self, rows: Rows, count: int) -> None:
        drift = rows.theta[:count] - self._start[:count]
        rows.grad[:count].add_(drift.mul_(self._mu[:count]))
