"""Tasks that fedft does not have, each as one would add it: what the seam has to carry."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedft.core.examples import Encoded, Examples, TokenExamples
from fedft.core.metrics import METRICS
from fedft.core.tasks import RawRows, Task, columns
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder


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


OTHERS: dict[str, Task] = {task.name: task for task in (MultiLabel(), Contrastive())}
