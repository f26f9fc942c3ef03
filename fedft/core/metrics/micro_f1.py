"""F1 of all items together, whatever their class."""

from fedft.core.metrics.base import Tally
from fedft.core.metrics.by_class import OfClasses


class MicroF1(OfClasses):
    """``2 tp / (2 tp + fp + fn)`` over all classes. With one class an item it is the accuracy."""

    name = "micro-f1"
    title = "micro F1"
    higher = True
    percent = True

    def value(self, tally: Tally) -> float:
        counts = self.counts(tally)
        return 2 * int(counts.hits.sum()) / int((counts.right + counts.predicted).sum())
