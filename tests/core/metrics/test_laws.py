"""Every metric is held to the laws that a metric of another package is held to."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from fedft.conformance import Broken, metrics
from fedft.core.metrics import METRICS, PER_CLASS, Metric, Predictions, Sum, Tally

ALL = [*METRICS.values(), PER_CLASS]


@pytest.mark.parametrize("law", metrics.LAWS, ids=lambda law: law.says)
@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_metric_keeps_the_laws(metric: Metric, law: Any) -> None:
    law.check(metric)


class _Mean(Metric):
    """The mean loss; the classes below break one law each."""

    name = "mean"
    higher = False
    sums: ClassVar = {"all": Sum(whole=False)}

    def tally(self, found: Predictions) -> Any:
        return {"all": float(found.losses.sum())}

    def value(self, tally: Tally) -> float:
        return tally.number("all") / tally.count


class _Undeclared(_Mean):
    sums: ClassVar = {}


class _MeanOfMeans(_Mean):
    def tally(self, found: Predictions) -> Any:
        return {"all": float(found.losses.mean()) if len(found.losses) else 0.0}

    def value(self, tally: Tally) -> float:
        return tally.number("all")


class _Miscounted(_Mean):
    sums: ClassVar = {"all": Sum()}  # whole numbers of items

    def tally(self, found: Predictions) -> Any:
        return {"all": 1000}


class _Writes(_Mean):
    def tally(self, found: Predictions) -> Any:
        found.losses.zero_()
        return {"all": 0.0}


class _OfNobody(_Mean):
    judges = frozenset({"melodies"})


BROKEN = (_Undeclared, _MeanOfMeans, _Miscounted, _Writes, _OfNobody)


@pytest.mark.parametrize(
    ("broken", "law"),
    list(zip(BROKEN, metrics.LAWS, strict=True)),
    ids=[b.__name__ for b in BROKEN],
)
def test_a_law_finds_what_breaks_it(broken: Callable[[], Metric], law: Any) -> None:
    law.check(_Mean())
    with pytest.raises(Broken):
        law.check(broken())
