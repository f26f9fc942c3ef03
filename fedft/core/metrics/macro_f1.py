"""F1 of each class, each counted alike: what accuracy hides where classes are of uneven size."""

from typing import Any, ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class MacroF1(Metric):
    """The mean over the classes of ``2 tp / (2 tp + fp + fn)``.

    A class that is neither right nor predicted anywhere counts as 0, as in scikit-learn with
    ``zero_division = 0`` and all labels given.
    """

    name = "macro-f1"
    title = "macro F1"
    higher = True
    percent = True
    judges = frozenset({"class"})
    sums: ClassVar = {"confusion": Sum(lambda classes: classes**2)}

    def tally(self, found: Predictions) -> Sums:
        """Items by right and predicted class, row by row. [classes * classes]"""
        cells = (found.targets * found.classes + found.predicted).cpu()
        counts: Any = cells.bincount(minlength=found.classes**2)
        return {"confusion": tuple(map(int, counts))}

    def value(self, tally: Tally) -> float:
        counts = tally.sums["confusion"]
        assert isinstance(counts, tuple)
        n = round(len(counts) ** 0.5)
        rows = [counts[i * n : (i + 1) * n] for i in range(n)]
        either = [sum(rows[i]) + sum(row[i] for row in rows) for i in range(n)]  # 2 tp + fp + fn
        return sum(2 * rows[i][i] / either[i] for i in range(n) if either[i]) / n
