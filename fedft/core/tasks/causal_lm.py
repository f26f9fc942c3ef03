"""A decoder learns to answer prompts."""

from typing import Any

import torch
from torch import Tensor

from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.asked import Asked, after_prompts
from fedft.core.tasks.base import Task
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens
from fedft.core.types import Batch


class CausalLM(Task):
    """The loss is on the tokens of the answer, each predicted from all tokens before it.

    Correct tokens are counted, too: servers of older versions take no reply without them.
    """

    name = "causal-lm"
    auto = "AutoModelForCausalLM"
    peft = "CAUSAL_LM"
    columns = (columns.text("prompt"), columns.text("answer"))
    metrics = (METRICS["perplexity"],)
    also = (METRICS["accuracy"],)
    head = False
    words = True
    causal = True
    writes = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        return tokens.answered(rows.values["prompt"], rows.values["answer"], encoder, max_length)

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Token t predicts label t + 1: the one place where labels are shifted."""
        positions = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return positions[:, :-1].flatten(), labels[:, 1:].flatten()

    def asked(self, batch: Batch, pad: int) -> Asked:
        return after_prompts(batch, pad)
