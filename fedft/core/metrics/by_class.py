"""How often each class is right, predicted, and both: what scores of classes are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally

MOST_CELLS = 128**2
"""Cells of a confusion matrix at most: of more classes nobody reads one, and every slice sends it."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Items by class, int64 [classes] each.

    Attributes:
        hits: right and predicted: true positives.
        right: whose class this is: the support.
        predicted: that were taken for it.
    """

    hits: NDArray[np.int64]
    right: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of what was taken for the class, how much is; 0 where nothing was."""
        return _over(self.hits, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Of what is of the class, how much was taken for it; 0 where nothing is."""
        return _over(self.hits, self.right)

    @property
    def f1(self) -> NDArray[np.float64]:
        """``2 tp / (2 tp + fp + fn)``; 0 where the class is neither right nor predicted."""
        return _over(2 * self.hits, self.right + self.predicted)


def _over(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


class OfClasses(Metric):
    """Base of metrics that are made of :class:`Counts`: three numbers a class, not a matrix."""

    sums: ClassVar[Mapping[str, Sum]] = {"by-class": Sum(lambda classes: 3 * classes)}
    judges = frozenset({"class"})

    def tally(self, found: Predictions) -> Sums:
        """Hits, right ones and predicted ones, end to end. [3 classes]"""
        right = found.targets
        hits = right[found.predicted == right]
        counts: Any = (hits, right, found.predicted)
        return {
            "by-class": tuple(
                int(n) for ids in counts for n in ids.cpu().bincount(minlength=found.classes)
            )
        }

    @staticmethod
    def counts(tally: Tally) -> Counts:
        """The sums as arrays."""
        hits, right, predicted = np.array(tally.numbers("by-class"), np.int64).reshape(3, -1)
        return Counts(hits, right, predicted)


class PerClass(OfClasses):
    """The table of classes and the confusion matrix, for the record; its value is in no report.

    The matrix is left out where it would have more than :data:`MOST_CELLS` cells.
    """

    name = "per-class"
    higher = True
    sums: ClassVar[Mapping[str, Sum]] = {
        **OfClasses.sums,
        "cells": Sum(lambda classes: classes**2 if classes**2 <= MOST_CELLS else 0),
    }

    def tally(self, found: Predictions) -> Sums:
        own = super().tally(found)
        n = found.classes
        if n**2 > MOST_CELLS:
            return {**own, "cells": ()}
        cells: Any = (found.targets * n + found.predicted).cpu().bincount(minlength=n**2)
        return {**own, "cells": tuple(map(int, cells))}

    def value(self, tally: Tally) -> float:
        return float(self.counts(tally).f1.mean())

    def matrix(self, tally: Tally) -> list[list[int]] | None:
        """Items by right and predicted class, a row for each right one; None of too many classes."""
        n, cells = len(self.counts(tally).right), tally.numbers("cells")
        return [[int(x) for x in cells[i * n : (i + 1) * n]] for i in range(n)] if cells else None
