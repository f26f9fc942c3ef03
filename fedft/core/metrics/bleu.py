"""How many runs of one to four words of a translation its reference has, over the whole corpus.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002;
Post, "A Call for Clarity in Reporting BLEU Scores", 2018.
"""

from functools import cache
from typing import Any, ClassVar

from fedft.core.extras import extra
from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally

_ORDERS = 4


@cache
def library() -> Any:
    """Sacrebleu's BLEU, made once."""
    with extra("metrics", "the metric bleu needs it"):
        from sacrebleu.metrics.bleu import BLEU
    return BLEU(force=True)  # without a remark on texts that look tokenised


class Bleu(Metric):
    """From 0 to 100, by sacrebleu with its defaults: 13a words, exponential smoothing, case kept.

    The counts of runs of words, and the lengths, add up; the score is made of their sums.
    """

    name = "bleu"
    title = "BLEU"
    higher = True
    needs_texts = True
    sums: ClassVar = {"bleu": Sum(lambda _: 2 * _ORDERS + 2, whole=False)}

    def tally(self, found: Predictions) -> Sums:
        """Runs in common and runs said, by length; then words said and wanted. [10]"""
        assert found.texts is not None
        if not found.texts:
            return {"bleu": (0.0,) * (2 * _ORDERS + 2)}
        said, wanted = zip(*found.texts, strict=True)
        one = library().corpus_score(list(said), [list(wanted)])
        return {"bleu": tuple(map(float, (*one.counts, *one.totals, one.sys_len, one.ref_len)))}

    def value(self, tally: Tally) -> float:
        *runs, said, wanted = map(int, tally.numbers("bleu"))
        score = library().compute_bleu(
            runs[:_ORDERS], runs[_ORDERS:], said, wanted, smooth_method="exp"
        )
        return float(score.score)
