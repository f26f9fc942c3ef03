"""Tasks that fedft does not have, each as one would add it: what the seam has to carry."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedft.core.examples import Encoded, Examples, TokenExamples
from fedft.core.metrics import METRICS, Metric, Predictions, Sum, Sums, Tally
from fedft.core.names import kind_of
from fedft.core.tasks import Column, RawRows, Reduction, Task, columns
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import IGNORED


def _words_fault(value: object, _: object) -> str | None:
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        return f"a list of words is expected, got {kind_of(value)}"
    return None if value else "no word at all"


class TokenClassification(Task):
    """A class for each word, on the word's first token."""

    name = "token-classification"
    auto = "AutoModelForTokenClassification"
    peft = "TOKEN_CLS"
    columns = (Column("words", _words_fault), columns.labels("tags"))
    metrics = (METRICS["macro-f1"], METRICS["accuracy"])

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        words, tags = row["words"], row["tags"]
        return None if len(words) == len(tags) else ("tags", f"{len(tags)} for {len(words)} words")

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        text = TextEncoder.of(encoder)
        ids: list[list[int]] = []
        marks: list[list[int]] = []
        assert rows.labels is not None
        for words, tags in zip(rows.values["words"], rows.labels, strict=True):
            pieces = text.plain.encode(words).rows
            ids.append([i for piece in pieces for i in piece][:max_length])
            own = [
                m
                for piece, tag in zip(pieces, tags, strict=True)
                for m in [int(tag), *[IGNORED] * (len(piece) - 1)]
            ]
            marks.append(own[:max_length])
        examples = TokenExamples.from_lists(ids, text.special.pad, token_labels=marks)
        return Encoded(examples, np.zeros(len(ids), np.bool_))

    def strata(self, rows: RawRows) -> NDArray[np.int64] | None:
        """The rarest class of a row: the highest id, here."""
        assert rows.labels is not None
        return np.array([int(max(tags)) for tags in rows.labels], np.int64)

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        flat = labels.flatten()
        return torch.arange(len(flat), device=flat.device), flat


def _recipe() -> type[Task]:
    """The task of ``docs/extending.md``, as it is printed there."""
    section = PAGE.read_text("utf-8").split("## A new task", 1)[1].split("\n## ", 1)[0]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code[1], str(PAGE), "exec"), namespace)
    return namespace["MultiLabel"]


PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
MultiLabel = _recipe()


class MeanAbsoluteError(Metric):
    """The mean distance of a prediction from its target."""

    name = "mae"
    title = "mean absolute error"
    higher = False
    sums = {"distance": Sum(whole=False)}
    needs_outputs = True

    def tally(self, found: Predictions) -> Sums:
        assert found.outputs is not None
        return {"distance": float((found.outputs[:, 0] - found.targets).abs().double().sum())}

    def value(self, tally: Tally) -> float:
        distance = tally.sums["distance"]
        assert not isinstance(distance, tuple)
        return distance / tally.count


def _number_fault(value: object, _: object) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return None if number else f"a number is expected, got {kind_of(value)}"


class Regression(Task):
    """A number a text. -100 is a number like others."""

    name = "regression"
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    columns = (columns.text("text"), Column("value", _number_fault))
    metrics = (MeanAbsoluteError(),)
    pools = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        text = TextEncoder.of(encoder)
        found = tokens.framed(rows.values["text"], encoder, max_length)
        values = np.array(rows.values["value"], np.float32)
        examples = TokenExamples.from_lists(found.rows, text.special.pad, labels=values)
        return Encoded(examples, found.cut)

    def options(self, classes: int) -> dict[str, Any]:
        return {"num_labels": 1}

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets.to(outputs.dtype), reduction=reduction)

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


class Contrastive(Task):
    """Each text is to be nearest to itself among the texts of its batch: no example is alone."""

    name = "contrastive"
    auto = "AutoModelForSequenceClassification"
    columns = (columns.text("text"), columns.label())
    metrics = (METRICS["accuracy"],)
    pools = True
    alone = False

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        text = TextEncoder.of(encoder)
        found = tokens.framed(rows.values["text"], encoder, max_length)
        examples = TokenExamples.from_lists(found.rows, text.special.pad, labels=rows.one_label)
        return Encoded(examples, found.cut)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = F.normalize(model(**inputs).logits, dim=-1)
        return found @ found.T

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, torch.arange(len(labels), device=labels.device)


OTHERS: dict[str, Task] = {
    task.name: task for task in (TokenClassification(), MultiLabel(), Regression(), Contrastive())
}
