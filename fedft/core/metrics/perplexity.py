"""How many words a language model wavers between, on average."""

import math

from fedft.core.metrics.base import Metric, Tally

_LARGEST = 700.0
"""e to a larger power is no float."""


class Perplexity(Metric):
    """``e`` to the mean loss of a token. It is compared by the loss, which does not overflow."""

    name = "perplexity"
    higher = False
    by = "loss"
    judges = frozenset({"word"})

    def value(self, tally: Tally) -> float:
        return math.exp(min(tally.loss_sum / tally.count, _LARGEST))
