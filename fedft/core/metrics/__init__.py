"""What models are judged by: a file a metric, a row each in :data:`METRICS`. Needs no torch."""

from collections.abc import Mapping
from typing import Any, cast

from fedft.core.metrics.accuracy import Accuracy
from fedft.core.metrics.base import (
    Declared,
    Metric,
    Predictions,
    Sum,
    Sums,
    Tally,
    packed,
    unpacked,
)
from fedft.core.metrics.entities import EntityF1, EntityPrecision, EntityRecall
from fedft.core.metrics.exact_match import ExactMatch
from fedft.core.metrics.macro_f1 import MacroF1
from fedft.core.metrics.mrr import MeanReciprocalRank
from fedft.core.metrics.multi_label import LabelMacroF1, LabelMicroF1, SubsetAccuracy
from fedft.core.metrics.perplexity import Perplexity
from fedft.core.metrics.regression import MeanAbsoluteError, Pearson

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Accuracy(),
        Perplexity(),
        MacroF1(),
        LabelMicroF1(),
        LabelMacroF1(),
        SubsetAccuracy(),
        MeanAbsoluteError(),
        Pearson(),
        EntityF1(),
        EntityPrecision(),
        EntityRecall(),
        ExactMatch(),
        MeanReciprocalRank(),
    )
}
"""Name → metric."""


def declared_in(environment: Mapping[str, object]) -> tuple[Declared, ...]:
    """What a run is judged by, the first metric first, as ``environment.json`` records it.

    An older version recorded nothing: its scores are among the metrics that are known. So are those of
    a record that says something else than a list of metrics.
    """
    found = environment.get("metrics")
    try:
        rows = cast("list[dict[str, Any]]", found if isinstance(found, list) else [])
        told = tuple(Declared(**row) for row in rows)
    except TypeError:
        told = ()
    return told or tuple(metric.declared for metric in METRICS.values())


__all__ = [
    "METRICS",
    "Declared",
    "Metric",
    "Predictions",
    "Sum",
    "Sums",
    "Tally",
    "declared_in",
    "packed",
    "unpacked",
]
