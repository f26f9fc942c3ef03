"""Initialisation lag: what the round boundary does to the state of training.

The definitions are this project's own.
"""

from typing import TypedDict

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import Curve, Plot


class LagReading(TypedDict):
    """What the round boundary does to the state of training.

    Attributes:
        function_jump: ||W_start(next round) - (W + dW)|| / ||dW||, root-mean-square over the sites
            by p_k: how far the function a site resumes from is off what the sites asked for.
            Equals the relative bias where every site starts from the server's state; differs where
            a site gets a truncation of it.
        dead_start: mean over sites by p_k of ||grad_A|| / ||grad_B|| on the first batch, as they
            report it. Zero where B = 0, since A then has no gradient.
        displacement: ||theta_start(next) - theta_bar|| / ||theta_bar||, theta the factors of all
            layers end to end and theta_bar their mean over the sites. None for mixed ranks, where
            the two have no common coordinates.
    """

    function_jump: float | None
    dead_start: float | None
    displacement: float | None


class Lag(Meter):
    """Where a factor stays at the clients, ``displacement`` covers the parts that were sent."""

    key = "lag"
    needs = "products"
    top = True
    plots = (
        Plot(
            title="Initialisation lag",
            quantity="Ratio",
            axis="ratio",
            caption="What the round boundary does: distance of the next start from where the clients "
            "arrived, in function and in factors, and |∇A| / |∇B| on the first batch.",
            curves=(
                Curve(("function_jump",), "Function jump"),
                Curve(
                    ("displacement",),
                    "Displacement",
                    name="Displacement of the factors",
                    title="Initialisation lag per round",
                    caption="|θ start − θ mean| / |θ mean|: how far the next start is from the mean of "
                    "the clients' factors.",
                ),
                Curve(("dead_start",), "Dead-start ratio"),
            ),
        ),
    )

    def value(self, round_: Round) -> LagReading:
        """``function_jump``, ``dead_start`` and ``displacement``."""
        from fedft.core.meters.boundary import displacement, function_jump

        return LagReading(
            function_jump=function_jump(round_),
            dead_start=round_.replies.dead_start,
            displacement=displacement(round_.replies.mean_factors(), round_.after.adapter),
        )
