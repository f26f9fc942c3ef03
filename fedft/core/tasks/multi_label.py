"""Any number of classes for each text, also none."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Reduction, Task, wide
from fedft.core.tasks.rows import RawRows, joined
from fedft.core.text import tokens

OWN_STRATUM = 10
"""Rows that a set of classes needs to be a stratum of its own."""


class MultiLabel(Task):
    """A logit for each class, each on its own: a class is predicted where its logit is above zero.

    The loss of a row is the mean over the classes of binary cross-entropy, as transformers takes it
    for ``problem_type = "multi_label_classification"``.
    """

    name = "multi-label"
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    columns = (columns.text("text"), columns.labels())
    metrics = (
        METRICS["label-micro-f1"],
        METRICS["label-macro-f1"],
        METRICS["subset-accuracy"],
    )
    pools = True

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        names: list[str] = row["labels"]
        twice = next((name for name, n in Counter(names).items() if n > 1), None)
        return None if twice is None else ("labels", f"{twice[:40]!r} stands there twice")

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        return tokens.labelled(rows.values["text"], _on(rows), encoder, max_length)

    def strata(self, rows: RawRows) -> NDArray[np.int64]:
        """Rows with the same set of classes are a stratum.

        A set that fewer than ten rows have is no stratum: its rows are one with all such rows whose
        rarest class is the same. A split would otherwise leave almost every rare set in training.
        """
        sets = [frozenset(own.tolist()) for own in several(rows)]
        rows_of = Counter(sets)
        frequent = {own for own, n in rows_of.items() if n >= OWN_STRATUM or not own}
        rarest = rarest_class(rows)
        keys = [
            (0, *sorted(own)) if own in frequent else (1, int(rare))
            for own, rare in zip(sets, rarest, strict=True)
        ]
        codes = {key: code for code, key in enumerate(sorted(set(keys)))}
        return np.array([codes[key] for key in keys], np.int64)

    def options(self, classes: int) -> dict[str, Any]:
        return {"num_labels": classes, "problem_type": "multi_label_classification"}

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        logits = wide(outputs)
        each = F.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        ).mean(-1)
        return each if reduction == "none" else each.mean()

    def predicted(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).to(outputs.dtype)


def several(rows: RawRows) -> list[NDArray[np.int64]]:
    """The classes of each row, of a task with several a row."""
    assert rows.labels is not None, "this task has no classes"
    return list(rows.labels)


def rarest_class(rows: RawRows) -> NDArray[np.int64]:
    """Of each row its class that fewest labels of all rows are, the first of equals; -1 without any. [n]"""
    own = several(rows)
    counts = np.bincount(joined(own), minlength=len(rows.classes))
    return np.array(
        [min(set(ids.tolist()), key=lambda i: (counts[i], i), default=-1) for ids in own], np.int64
    )


def _on(rows: RawRows) -> NDArray[np.float32]:
    """1 where a row has the class. [n, classes]"""
    on = np.zeros((len(rows), len(rows.classes)), np.float32)
    for row, own in enumerate(several(rows)):
        on[row, own] = 1
    return on
