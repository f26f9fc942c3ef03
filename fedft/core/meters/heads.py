"""HydraLoRA's heads after the round: whether they have become different experts."""

from typing import TypedDict

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import Curve, Plot


class HeadsReading(TypedDict):
    """HydraLoRA's heads after the round.

    Attributes:
        used: how many are not zero.
        cosine: mean cosine between every two of these, each taken over all layers; None for one.
    """

    used: int
    cosine: float | None


class Heads(Meter):
    """Silent where the adapter has no heads."""

    key = "heads"
    top = True
    plots = (
        Plot(
            title="Likeness of the heads",
            quantity="Mean cosine",
            caption="Mean cosine between every two of HydraLoRA's heads in use, over all layers: 1 "
            "where they are the same expert.",
            curves=(
                Curve(
                    ("cosine",),
                    "Mean cosine",
                    name="Mean cosine of the heads",
                    title="Likeness of the heads per round",
                    caption="Mean cosine between every two of HydraLoRA's heads in use.",
                ),
            ),
        ),
    )

    def value(self, round_: Round) -> HeadsReading | None:
        """``used`` and ``cosine``."""
        from fedft.core.adapters import hydra

        adapter = round_.after.adapter
        if hydra.head_count(adapter) < 2:
            return None
        cosine = hydra.cosines(adapter)
        used = [i for i in range(len(cosine)) if cosine[i, i] > 0]
        pairs = [float(cosine[i, j]) for i in used for j in used if i < j]
        return HeadsReading(used=len(used), cosine=sum(pairs) / len(pairs) if pairs else None)
