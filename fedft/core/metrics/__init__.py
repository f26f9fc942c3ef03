"""What models are judged by: a file a metric, a row each in :data:`METRICS`. Needs no torch."""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from fedft.core.metrics.accuracy import Accuracy
from fedft.core.metrics.auroc import AUROC
from fedft.core.metrics.balanced_accuracy import BalancedAccuracy
from fedft.core.metrics.base import (
    MOST_GATHERED,
    Declared,
    Metric,
    Predictions,
    Sum,
    Sums,
    Tally,
    packed,
    unpacked,
)
from fedft.core.metrics.bleu import Bleu
from fedft.core.metrics.by_class import PerClass
from fedft.core.metrics.chrf import ChrF
from fedft.core.metrics.entities import EntityF1, EntityPrecision, EntityRecall
from fedft.core.metrics.exact_match import ExactMatch
from fedft.core.metrics.macro_f1 import MacroF1
from fedft.core.metrics.margin import Margin
from fedft.core.metrics.mcc import MCC
from fedft.core.metrics.micro_f1 import MicroF1
from fedft.core.metrics.mrr import MeanReciprocalRank
from fedft.core.metrics.multi_label import LabelMacroF1, LabelMicroF1, SubsetAccuracy
from fedft.core.metrics.perplexity import Perplexity
from fedft.core.metrics.regression import MeanAbsoluteError, Pearson
from fedft.core.metrics.rouge import Rouge1, Rouge2, RougeL
from fedft.core.metrics.spearman import Spearman
from fedft.core.metrics.weighted_f1 import WeightedF1
from fedft.core.plugins import Registry, Unfit, subclass_of

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
        MicroF1(),
        WeightedF1(),
        BalancedAccuracy(),
        MCC(),
        AUROC(),
        Spearman(),
        Rouge1(),
        Rouge2(),
        RougeL(),
        Bleu(),
        ChrF(),
        Margin(),
    )
}
"""Name → metric."""

PER_CLASS = PerClass()
"""What ``[evaluation] per-class`` records; it is no score, and has no name in a configuration."""

_TAKEN = frozenset({"loss", "round", "n", PER_CLASS.name})
"""Keys of scores that are no metric's."""

_of_kind = subclass_of(Metric, "fedft.core.metrics.Metric")


def _accept(found: object) -> Metric:
    """The one object of a class, or an object as it is, if it says all that has no default."""
    kind = _of_kind(found if isinstance(found, type) else type(found))
    own = next((metric for metric in METRICS.values() if type(metric) is kind), None)
    if own is not None:
        return own
    if missing := [name for name in ("name", "higher") if not hasattr(kind, name)]:
        raise Unfit(f"it does not say {', '.join(missing)}")
    name = kind.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", name) or name in _TAKEN:
        raise Unfit(
            f"its name {name[:60]!r} cannot be a key of a record: at most 40 letters, digits, dots, "
            f"dashes and underscores, and none of {', '.join(sorted(_TAKEN))}"
        )
    if name in METRICS:
        raise Unfit(f"its name {name!r} is that of one of fedft's own")
    try:
        return found if isinstance(found, Metric) else cast(Callable[[], Metric], kind)()
    except Exception as error:
        raise Unfit(f"it cannot be made: {type(error).__name__}: {error}") from error


REGISTRY: Registry[Metric] = Registry("metrics", "metric", METRICS, _accept)
"""Every metric by name."""


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
    "MOST_GATHERED",
    "PER_CLASS",
    "REGISTRY",
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
