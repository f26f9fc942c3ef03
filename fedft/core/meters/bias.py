"""Aggregation bias: averaging LoRA factors is not averaging updates.

dW is the mean update that the clients asked for, and M what the server's new state applies in its
place; see :mod:`fedft.core.meters.gaps` for both.

    bias      ||dW - M|| / ||dW||,   cos(dW, M),   ||M|| / ||dW||          Frobenius, per layer
    overall   the same, with sums of squares (and of inner products) over the layers

    forgotten = <dW - M, L> / (||L|| ||dW||)

is the part of the relative bias that lies along L, what clients of low rank were not sent: its
square is a part of the square of the bias. A rule that takes the clients' products for all there is
loses L, and reads ||L|| / ||dW||; one that loses nothing reads zero. Less than zero: the new state
has more of L than before.

M is a rule's whole answer: for FedAvg-LoRA the product of the averaged factors, for FLoRA and
FedEx-LoRA also what was merged into the base. A rule that weighs clients or ranks otherwise (HetLoRA,
raFLoRA) or steps (FedAdam) is held to the same dW, so that its deliberate departure reads as bias too.
"""

from typing import TYPE_CHECKING

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import ROUNDING, Curve, Heat, Plot

if TYPE_CHECKING:
    from fedft.core.meters.gaps import OverallBias


class Bias(Meter):
    """Where a factor stays at the clients (FedSA-LoRA keeps B), nobody knows B_k A_k: no reading."""

    key = "bias"
    needs = "products"
    top = True
    plots = (
        Plot(
            title="Aggregation bias",
            quantity="Relative bias",
            axis="ratio",
            caption="|ΔW − applied| / |ΔW| over all layers.",
            quoted=(("cosine", ("cosine",)), ("norm ratio", ("norm_ratio",))),
            curves=(
                Curve(
                    keys=("relative",),
                    label="bias",
                    name="Relative bias",
                    title="Aggregation bias per round",
                    caption="|ΔW − applied| / |ΔW| over all layers: what the rule's new state misses of "
                    "the mean update.",
                    leading=True,
                ),
                Curve(
                    keys=("forgotten",),
                    label="forgotten",
                    above=ROUNDING,
                    part=True,
                    note="Forgotten: the part of it along what clients of low rank were not sent, and "
                    "the new model has lost.",
                ),
            ),
            heat=Heat(("layers",), ("relative",), "Bias by layer", "Relative bias"),
        ),
    )

    def value(self, round_: Round) -> "OverallBias":
        """``relative``, ``cosine``, ``norm_ratio``, ``forgotten``, and the same for each of ``layers``."""
        from fedft.core.meters.gaps import bias_from, no_bias, to_after

        replies = round_.replies
        if not replies.examples or replies.hidden:
            return no_bias()
        return bias_from(round_.once(to_after))
