"""One class for each pair of texts, as in GLUE: do they mean the same, does one follow from the other?

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding", ICLR 2019, arXiv:1804.07461.
"""

from typing import Any

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Task
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens


class TextPair(Task):
    """Both texts are one row, with what the tokenizer puts between them.

    Where it marks which token is of which text, the model is told so (``token_type_ids``). A row that
    is too long loses tokens of its longer text.
    """

    name = "text-pair"
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    columns = (columns.text("text"), columns.text("pair"), columns.label())
    metrics = (METRICS["accuracy"], METRICS["macro-f1"])
    pools = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        texts, pairs = rows.values["text"], rows.values["pair"]
        return tokens.labelled(texts, rows.one_label, encoder, max_length, pairs)
