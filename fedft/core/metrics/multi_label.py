"""What models are judged by that predict any number of classes for each item.

Values are those of scikit-learn with all classes given and ``zero_division = 0``.
"""

from typing import Any, ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class _OfLabels(Metric):
    """Made of how often each class was right, predicted wrongly, and missed.

    Targets and predictions are 0 or 1, [m, classes].
    """

    higher = True
    percent = True
    judges = frozenset({"labels"})
    sums: ClassVar = {"label-counts": Sum(lambda classes: 3 * classes)}

    def tally(self, found: Predictions) -> Sums:
        """True positives of each class, then false positives, then false negatives. [3 classes]"""
        on, right = found.predicted.bool(), found.targets.bool()
        parts = (on & right, on & ~right, right & ~on)
        counts: Any = [n for part in parts for n in part.sum(0)]
        return {"label-counts": tuple(map(int, counts))}

    def each(self, tally: Tally) -> list[tuple[int, int]]:
        """Of each class ``2 tp`` and ``2 tp + fp + fn``."""
        counts = tally.sums["label-counts"]
        assert isinstance(counts, tuple)
        n = len(counts) // 3
        tp, fp, fn = ([int(x) for x in counts[i * n : (i + 1) * n]] for i in range(3))
        return [(2 * t, 2 * t + p + m) for t, p, m in zip(tp, fp, fn, strict=True)]


class LabelMicroF1(_OfLabels):
    """``2 tp / (2 tp + fp + fn)`` over the labels of all classes; 0 where there are none."""

    name = "label-micro-f1"
    title = "micro F1"

    def value(self, tally: Tally) -> float:
        each = self.each(tally)
        either = sum(whole for _, whole in each)
        return sum(both for both, _ in each) / either if either else 0.0


class LabelMacroF1(_OfLabels):
    """The mean over the classes of ``2 tp / (2 tp + fp + fn)``.

    A class that is neither right nor predicted anywhere counts as 0.
    """

    name = "label-macro-f1"
    title = "macro F1"

    def value(self, tally: Tally) -> float:
        each = self.each(tally)
        return sum(both / whole for both, whole in each if whole) / len(each)


class SubsetAccuracy(Metric):
    """The share of items all of whose classes are right, and none more: exact match."""

    name = "subset-accuracy"
    title = "subset accuracy"
    higher = True
    percent = True
    judges = frozenset({"labels"})
    sums: ClassVar = {"exact": Sum()}

    def tally(self, found: Predictions) -> Sums:
        same = found.predicted.bool() == found.targets.bool()
        return {"exact": int(same.all(-1).sum())}

    def value(self, tally: Tally) -> float:
        exact = tally.sums["exact"]
        assert not isinstance(exact, tuple)
        return exact / tally.count
