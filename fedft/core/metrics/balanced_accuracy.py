"""Recall of each class, each counted alike: chance level is one over the number of classes."""

from fedft.core.metrics.base import Tally
from fedft.core.metrics.by_class import OfClasses


class BalancedAccuracy(OfClasses):
    """The mean recall over the classes that occur, as ``balanced_accuracy_score`` of scikit-learn."""

    name = "balanced-accuracy"
    title = "balanced accuracy"
    higher = True
    percent = True

    def value(self, tally: Tally) -> float:
        counts = self.counts(tally)
        return float(counts.recall[counts.right > 0].mean())
