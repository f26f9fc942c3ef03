"""Client drift: how far the clients moved, in squared Frobenius norm over the factors they sent."""

from typing import TypedDict

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import Curve, Plot


class DriftReading(TypedDict):
    """How far the sites moved.

    Attributes:
        total: sum_k p_k ||theta_k - theta_start||^2.
        between: sum_k p_k ||theta_k - theta_bar||^2, the part on which they disagree. The rest of
            the total is their common movement. None for mixed ranks.
    """

    total: float | None
    between: float | None


class Drift(Meter):
    """Both are sums over the clients, which the server brings up to date reply by reply.

    Under a secure sum each client would add ||theta_k||^2 to what it sends; that is not built, and
    the meter says that it needs ``each``.
    """

    key = "drift"
    needs = "each"
    top = True
    plots = (
        Plot(
            title="Client drift",
            quantity="Squared distance",
            low=0.0,
            caption="Squared distance of the clients' factors from their start, and the part on which "
            "they disagree.",
            curves=(Curve(("total",), "Total"), Curve(("between",), "Between clients")),
        ),
    )

    def value(self, round_: Round) -> DriftReading:
        """``total`` and ``between``."""
        return DriftReading(total=round_.replies.moved, between=round_.replies.spread)
