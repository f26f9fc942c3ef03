"""FedDyn at the client: a penalty that moves until the clients' optima are the federation's.

    Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv:2111.04263.

With x the start and lambda_k the gradient at which client k stopped last, zero at first, it minimises

    f_k(theta) - <lambda_k, theta> + alpha / 2 ||theta - x||^2        and then
    lambda_k <- lambda_k - alpha (theta - x)

The update is the first-order condition of the minimum, so that it holds whatever optimiser got there;
a client that stops early has a lambda_k as rough as its solution.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedft.clients.methods.base import Method, Rows, strengths
from fedft.core.terms import Dynamic as Term


class Dynamic(Method):
    """See :class:`fedft.core.terms.Dynamic`."""

    term = Term

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        self._start = rows.theta.clone()
        self._own = rows.laid("own-gradient")
        self._alpha = strengths(rows, terms, "alpha")

    def correct(self, rows: Rows, count: int) -> None:
        rows.grad[:count] += (self._alpha * (rows.theta - self._start) - self._own)[:count]

    def end(self, rows: Rows, steps: Sequence[int]) -> Mapping[str, Tensor]:
        return {"own-gradient": self._own - self._alpha * (rows.theta - self._start)}
