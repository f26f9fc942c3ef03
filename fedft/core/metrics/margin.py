"""By how much the chosen answer is rewarded above the rejected one, on average."""

from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class Margin(Metric):
    """The mean of the first output minus the second one: of rewards, chosen minus rejected."""

    name = "margin"
    title = "reward margin"
    higher = True
    sums: ClassVar = {"margin": Sum(whole=False)}
    needs_outputs = True
    judges = frozenset({"pair"})

    def tally(self, found: Predictions) -> Sums:
        assert found.outputs is not None
        return {"margin": float((found.outputs[:, 0] - found.outputs[:, 1]).double().sum())}

    def value(self, tally: Tally) -> float:
        margin = tally.sums["margin"]
        assert not isinstance(margin, tuple)
        return margin / tally.count
