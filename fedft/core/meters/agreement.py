"""Agreement of the clients: the mean cosine between the directions in which they moved.

With u_k = (theta_k - theta_start) / ||theta_k - theta_start|| over the factors that client k sent, end
to end, and K clients that moved,

    agreement = mean over pairs k != l of <u_k, u_l> = (||sum_k u_k||^2 - K) / (K (K - 1))

1 where all move alike, about 0 where they have nothing in common, -1 / (K - 1) at the least. The sum
of the directions is all that is kept: the pairs are never formed. Unlike drift it does not depend on
how far the clients moved, and so not on the learning rate to first order; every client counts alike,
whatever its examples.

A layer that a client does not hold is one in which it did not move. Mixed ranks have no common
coordinates.
"""

# torch is typed in part.
# pyright: reportUnknownMemberType=false

from typing import TYPE_CHECKING, TypedDict

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import Curve, Plot

if TYPE_CHECKING:
    from torch import Tensor

    from fedft.core.types import ClientUpdate


class AgreementReading(TypedDict):
    """Agreement of the clients.

    Attributes:
        cosine: the mean over the pairs; None for fewer than two, and for mixed ranks.
        clients: how many moved.
    """

    cosine: float | None
    clients: int


class Agreement(Meter):
    """Holds one vector as long as a reply, whatever the number of clients."""

    key = "agreement"
    needs = "each"
    plots = (
        Plot(
            title="Agreement of the clients",
            quantity="Mean cosine between clients",
            caption="Mean cosine between the directions in which every two clients moved: 1 where all "
            "move alike, 0 where they have nothing in common.",
            curves=(
                Curve(
                    keys=("cosine",),
                    label="Mean cosine",
                    name="Mean cosine between clients",
                    title="Agreement of the clients per round",
                    caption="Mean cosine between the directions in which every two clients moved.",
                    column="Agreement",
                ),
            ),
        ),
    )

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._clients = 0
        self._mixed = False

    def add(self, update: "ClientUpdate") -> None:
        """Add the direction of one client."""
        from fedft.core.types import part_of

        start = update.start.tensors()
        moved = {
            name: tensor.double() - start[name].double()
            for name, tensor in update.tensors.items()
            if part_of(name) != "head"
        }
        length = sum(float(x.square().sum()) for x in moved.values()) ** 0.5
        if length == 0:
            return
        self._clients += 1
        for name, x in moved.items():
            total = self._sum.setdefault(name, x.new_zeros(x.shape))
            if total.shape == x.shape:
                total.add_(x, alpha=1 / length)
            else:
                self._mixed = True

    def value(self, round_: Round) -> AgreementReading:
        """``cosine`` and ``clients``."""
        count, cosine = self._clients, None
        if count > 1 and not self._mixed:
            squares = sum(float(x.square().sum()) for x in self._sum.values())
            cosine = (squares - count) / (count * (count - 1))
        return AgreementReading(cosine=cosine, clients=count)
