"""An L1 penalty on what trains: small changes are pulled to zero.

    g <- g + s sign(theta)

Tibshirani, "Regression Shrinkage and Selection via the Lasso", J. R. Stat. Soc. B 58(1), 1996.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fedft.clients.methods import Method, Rows
from fedft.clients.methods.base import strengths
from fedft.core.terms import Term


class L1(Term):
    """What the configuration says.

    Attributes:
        strength: s.
    """

    strength: Annotated[float, Field(ge=0, le=1e30)] = 0.001


class Sparse(Method):
    """Does it, for K clients at once."""

    term = L1

    def __init__(self, rows: Rows, terms: Sequence[L1 | None]) -> None:
        """A client without the term has strength zero."""
        self._strength = strengths(rows, terms, "strength")

    def correct(self, rows: Rows, count: int) -> None:
        """Before the gradient is clipped. The padding of lower ranks is zero, and so is its sign."""
        rows.grad[:count] += self._strength[:count] * rows.theta[:count].sign()
