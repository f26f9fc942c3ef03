"""Matthews' correlation of what is right with what is predicted, for any number of classes.

Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient",
Computational Biology and Chemistry 28 (2004).
"""

import math

from fedft.core.metrics.base import Tally
from fedft.core.metrics.by_class import OfClasses


class MCC(OfClasses):
    """From -1 to 1. With items n, hits c, and per class t right and p predicted ones:

    ``(c n - Σ t p) / sqrt((n² - Σ t²) (n² - Σ p²))``

    0 where only one class is right or predicted, as in scikit-learn.
    """

    name = "mcc"
    title = "MCC"
    higher = True

    def value(self, tally: Tally) -> float:
        counts = self.counts(tally)
        # Python's integers: squares of counts do not fit into 64 bits.
        right, predicted = list(map(int, counts.right)), list(map(int, counts.predicted))
        n = sum(right)
        both = sum(t * p for t, p in zip(right, predicted, strict=True))
        spread = [n * n - sum(x * x for x in one) for one in (right, predicted)]
        if not all(spread):
            return 0.0
        return (int(counts.hits.sum()) * n - both) / (math.sqrt(spread[0]) * math.sqrt(spread[1]))
