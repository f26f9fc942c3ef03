"""A decoder learns to answer, to go on with a text, or to write texts like those that it is given."""

from typing import Any

import torch
from torch import Tensor

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks.asked import Asked, after_prompts
from fedft.core.tasks.base import Task
from fedft.core.tasks.formats import FORMATS
from fedft.core.tasks.rows import RawRows
from fedft.core.types import Batch


class CausalLM(Task):
    """The loss is on the tokens of the answers, each predicted from all tokens before it.

    Rows come in one of :data:`~fedft.core.tasks.formats.FORMATS`; of plain texts every token is learnt.
    Correct tokens are counted, too: servers of older versions take no reply without them.
    """

    name = "causal-lm"
    auto = "AutoModelForCausalLM"
    peft = "CAUSAL_LM"
    columns = FORMATS["prompt-answer"].columns
    formats = tuple(FORMATS.values())
    metrics = (METRICS["perplexity"],)
    also = (METRICS["accuracy"],)
    head = False
    words = True
    causal = True
    writes = True
    packs = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        return FORMATS[rows.format or "prompt-answer"].encode(rows.values, encoder, max_length)

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Token t predicts label t + 1: the one place where labels are shifted."""
        positions = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return positions[:, :-1].flatten(), labels[:, 1:].flatten()

    def asked(self, batch: Batch, pad: int) -> Asked:
        return after_prompts(batch, pad)
