"""A number for each text, or for each pair of texts."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Reduction, Task, wide
from fedft.core.tasks.columns import number_of
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens

_USUAL = 10.0
"""Targets that lie or spread further than this are remarked on."""


class Regression(Task):
    """A head with one output, and the squared distance from the target.

    Targets are learnt as they stand: nobody has seen all of them who could standardise them, and
    scores are in their unit. A head begins near zero, and usual learning rates fit targets about one:
    a note says where they are not.
    """

    name = "regression"
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    columns = (
        columns.text("text"),
        columns.text("pair", optional=True),
        columns.number("target"),
    )
    metrics = (METRICS["mae"], METRICS["pearson"])
    pools = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        numbers = [found for v in rows.values["target"] if (found := number_of(v)) is not None]
        texts, pairs = rows.values["text"], rows.values.get("pair")
        targets = np.array(numbers, np.float32)
        found = tokens.labelled(texts, targets, encoder, max_length, pairs)
        return Encoded(found.examples, found.cut, notes=_remarks(np.array(numbers)))

    def options(self, classes: int) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        found = wide(outputs)[:, 0]
        return F.mse_loss(found, targets.to(found.dtype), reduction=reduction)

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


def _remarks(targets: Any) -> tuple[str, ...]:
    if not len(targets):
        return ()
    mean, spread = float(targets.mean()), float(targets.std())
    if max(abs(mean), spread) <= _USUAL:
        return ()
    return (
        f"targets have mean {mean:.6g} and standard deviation {spread:.6g}, and a head begins near zero: "
        "divide them, or shift them, to about one",
    )
