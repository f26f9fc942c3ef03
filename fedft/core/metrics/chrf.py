"""How many runs of one to six characters of a translation its reference has, and the other way round.

Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015.
"""

from collections import Counter
from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally

_ORDERS = 6
_BETA = 2.0
"""How much more recall counts than precision."""


class ChrF(Metric):
    """From 0 to 100: chrF2 over the corpus, equal to sacrebleu with its defaults; white space is no
    character.

    With runs of n characters said, wanted and in common, summed over all texts, P and R are the means
    over n of common / said and common / wanted, where both are; the score is
    ``100 (1 + β²) P R / (β² P + R)``.
    """

    name = "chrf"
    title = "chrF"
    higher = True
    needs_texts = True
    sums: ClassVar = {"chrf": Sum(lambda _: 3 * _ORDERS, whole=False)}

    def tally(self, found: Predictions) -> Sums:
        """Runs said, wanted and in common, for each length. [18]"""
        assert found.texts is not None
        sums = [0.0] * (3 * _ORDERS)
        for pair in found.texts:
            said, wanted = ("".join(text.split()) for text in pair)
            for n in range(_ORDERS):
                mine, theirs = _runs(said, n + 1), _runs(wanted, n + 1)
                # As sacrebleu: where the reference is too short to have any, nothing was said too much.
                sums[3 * n] += mine.total() if theirs else 0
                sums[3 * n + 1] += theirs.total()
                sums[3 * n + 2] += (mine & theirs).total()
        return {"chrf": tuple(sums)}

    def value(self, tally: Tally) -> float:
        counts = tally.numbers("chrf")
        orders = [counts[3 * n : 3 * n + 3] for n in range(_ORDERS)]
        both = [(same / said, same / wanted) for said, wanted, same in orders if said and wanted]
        if not both:
            return 0.0
        precision, recall = (sum(values) / len(both) for values in zip(*both, strict=True))
        if not precision + recall:
            return 0.0
        return 100 * (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def _runs(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
