"""One class for each text."""

from typing import Any

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Task
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens


class Classification(Task):
    """A head on an encoder or decoder reads a text and gives a logit for each class."""

    name = "classification"
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    columns = (columns.text("text"), columns.label())
    metrics = (METRICS["accuracy"],)
    pools = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        return tokens.labelled(rows.values["text"], rows.one_label, encoder, max_length)
