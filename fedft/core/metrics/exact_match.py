"""The share of generated texts that are the wanted ones, to the letter."""

from typing import ClassVar

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally


class ExactMatch(Metric):
    """Texts that are right over all texts.

    White space at either end does not count. Zero where no row asks for a text.
    """

    name = "exact-match"
    title = "exact match"
    higher = True
    percent = True
    sums: ClassVar = {"exact": Sum(), "texts": Sum()}
    needs_texts = True

    def tally(self, found: Predictions) -> Sums:
        pairs = found.texts or ()
        return {
            "exact": sum(said.strip() == wanted.strip() for said, wanted in pairs),
            "texts": len(pairs),
        }

    def value(self, tally: Tally) -> float:
        exact, texts = tally.sums["exact"], tally.sums["texts"]
        assert not isinstance(exact, tuple) and not isinstance(texts, tuple)
        return exact / texts if texts else 0.0
