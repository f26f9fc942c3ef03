"""F1 of each class, counted by how often the class is right."""

from fedft.core.metrics.base import Tally
from fedft.core.metrics.by_class import OfClasses


class WeightedF1(OfClasses):
    """The mean of the classes' F1, weighted by their support; an F1 that is not defined counts as 0."""

    name = "weighted-f1"
    title = "weighted F1"
    higher = True
    percent = True

    def value(self, tally: Tally) -> float:
        counts = self.counts(tally)
        return float((counts.f1 * counts.right).sum() / counts.right.sum())
