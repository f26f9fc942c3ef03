"""One class for each image."""

from typing import Any

import numpy as np

from fedft.core.examples import Encoded, Examples, ImageExamples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Task
from fedft.core.tasks.rows import RawRows


class ImageClassification(Task):
    """A head on a vision transformer gives a logit for each class. peft has no name for the task."""

    name = "image-classification"
    auto = "AutoModelForImageClassification"
    columns = (columns.image(), columns.label())
    metrics = (METRICS["accuracy"],)
    reads = "image"

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        examples = ImageExamples(rows.values["image"], rows.one_label, encoder, rows.folder)
        return Encoded(examples, np.zeros(len(rows), np.bool_))
