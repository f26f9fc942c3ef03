"""How much of a text's words another one has: ROUGE-1, ROUGE-2 and ROUGE-L.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
"""

# pyright: standard
# rouge-score has no types.

from functools import cache
from typing import Any, ClassVar

from fedft.core.extras import extra
from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


@cache
def scorer(kind: str) -> Any:
    """rouge-score's scorer of one kind, made once."""
    with extra("metrics", f"the metric {kind} needs it"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer([kind])


class _Rouge(Metric):
    """The mean F-measure over the texts, by rouge-score, without stemming.

    Its words are runs of a to z and 0 to 9: a text in another script has none, and scores 0.
    """

    kind: ClassVar[str]
    higher = True
    percent = True
    needs_texts = True

    def tally(self, found: Predictions) -> Sums:
        assert found.texts is not None
        own = scorer(self.kind)
        each = [float(own.score(wanted, said)[self.kind].fmeasure) for said, wanted in found.texts]
        return {self.name: sum(each), f"{self.name}-texts": len(each)}

    def value(self, tally: Tally) -> float:
        texts = tally.number(f"{self.name}-texts")
        return tally.number(self.name) / texts if texts else float("nan")


class Rouge1(_Rouge):
    """Words in common."""

    name, title, kind = "rouge-1", "ROUGE-1", "rouge1"
    sums: ClassVar = {"rouge-1": Sum(whole=False), "rouge-1-texts": Sum()}


class Rouge2(_Rouge):
    """Pairs of words in common."""

    name, title, kind = "rouge-2", "ROUGE-2", "rouge2"
    sums: ClassVar = {"rouge-2": Sum(whole=False), "rouge-2-texts": Sum()}


class RougeL(_Rouge):
    """The longest common subsequence of words."""

    name, title, kind = "rouge-l", "ROUGE-L", "rougeL"
    sums: ClassVar = {"rouge-l": Sum(whole=False), "rouge-l-texts": Sum()}
