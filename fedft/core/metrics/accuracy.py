"""The share of items whose likeliest class is the right one."""

from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class Accuracy(Metric):
    """Correct items over all items."""

    name = "accuracy"
    higher = True
    percent = True
    judges = frozenset({"class", "word"})
    sums: ClassVar = {"correct": Sum()}

    def tally(self, found: Predictions) -> Sums:
        return {"correct": int((found.predicted == found.targets).sum())}

    def value(self, tally: Tally) -> float:
        correct = tally.sums["correct"]
        assert not isinstance(correct, tuple)
        return correct / tally.count
