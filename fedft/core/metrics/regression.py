"""What models are judged by that predict a number: [m], and the targets likewise."""

import math
from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class MeanAbsoluteError(Metric):
    """The mean distance of a prediction from its target, in the unit of the targets."""

    name = "mae"
    title = "mean absolute error"
    higher = False
    judges = frozenset({"number"})
    sums: ClassVar = {"distance": Sum(whole=False)}

    def tally(self, found: Predictions) -> Sums:
        predicted, targets = found.predicted.cpu().double(), found.targets.cpu().double()
        return {"distance": float((predicted - targets).abs().sum())}

    def value(self, tally: Tally) -> float:
        distance = tally.sums["distance"]
        assert not isinstance(distance, tuple)
        return distance / tally.count


class Pearson(Metric):
    """The correlation of predictions p and targets t,

        sum (p - mean p)(t - mean t) / sqrt(sum (p - mean p)^2 sum (t - mean t)^2),

    0 where either is constant, and undefined where one is not finite. It is made of the sums of p, t, p^2, t^2 and pt: of values whose
    mean is k standard deviations from zero, about 2 log10 k of double precision's 16 digits are lost.
    """

    name = "pearson"
    title = "Pearson correlation"
    higher = True
    judges = frozenset({"number"})
    sums: ClassVar = {"moments": Sum(lambda _: 5, whole=False)}

    def tally(self, found: Predictions) -> Sums:
        p, t = found.predicted.cpu().double(), found.targets.cpu().double()
        return {"moments": tuple(float(x.sum()) for x in (p, t, p * p, t * t, p * t))}

    def value(self, tally: Tally) -> float:
        moments = tally.sums["moments"]
        assert isinstance(moments, tuple)
        p, t, pp, tt, pt = moments
        n = tally.count
        spread_p, spread_t = pp - p * p / n, tt - t * t / n
        if not math.isfinite(spread_p + spread_t):
            return math.nan
        if spread_p <= _NOTHING * pp or spread_t <= _NOTHING * tt:
            return 0.0
        found = (pt - p * t / n) / math.sqrt(spread_p) / math.sqrt(spread_t)
        return min(1.0, max(-1.0, found))


_NOTHING = 1e-14
"""A spread below this share of the squares is what rounding leaves of none."""
