"""How high the right answer stands among all of them."""

from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class MeanReciprocalRank(Metric):
    """The mean of 1 / rank of the right answer. The outputs are these ranks, from 1, [m, 1].

    Voorhees, "The TREC-8 Question Answering Track Report", 1999.
    """

    name = "mrr"
    title = "mean reciprocal rank"
    higher = True
    percent = True
    sums: ClassVar = {"reciprocal-ranks": Sum(whole=False)}
    needs_outputs = True
    judges = frozenset({"rank"})

    def tally(self, found: Predictions) -> Sums:
        from fedft.core.precise import widened

        assert found.outputs is not None
        return {"reciprocal-ranks": float((1 / widened(found.outputs[:, 0])).sum())}

    def value(self, tally: Tally) -> float:
        total = tally.sums["reciprocal-ranks"]
        assert not isinstance(total, tuple)
        return total / tally.count
