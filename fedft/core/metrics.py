"""Losses and scores: sums that can be added over batches, shards and sites."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedft.core.precise import widened
from fedft.core.types import IGNORED


def loss_targets(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Line up predictions and labels.

    Args:
        logits: [b, classes], or [b, t, vocabulary] for a causal language model.
        labels: [b], or [b, t] with ``IGNORED`` where no loss is taken.

    Returns:
        Predictions [n, classes] and targets [n]. Token t predicts label t + 1.
    """
    if labels.ndim == 1:
        return logits, labels
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32: the mean over the examples, or over all answer tokens. Scalar."""
    predictions, targets = loss_targets(logits, labels)
    return F.cross_entropy(_wide(predictions), targets, ignore_index=IGNORED)


def _wide(predictions: Tensor) -> Tensor:
    return predictions if predictions.dtype == torch.float64 else predictions.float()


@dataclass(frozen=True)
class Tally:
    """Sums over scored items: examples, or answer tokens of a causal language model."""

    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.loss_sum + other.loss_sum, self.correct + other.correct, self.count + other.count
        )

    @staticmethod
    def of(logits: Tensor, labels: Tensor) -> "Tally":
        """Score one batch; shapes as for :func:`loss_targets`."""
        predictions, targets = loss_targets(logits, labels)
        losses = F.cross_entropy(
            _wide(predictions), targets, ignore_index=IGNORED, reduction="none"
        )
        scored = targets != IGNORED
        correct = (predictions.argmax(-1) == targets) & scored
        return Tally(float(widened(losses).sum()), int(correct.sum()), int(scored.sum()))

    @staticmethod
    def total(tallies: Iterable["Tally"]) -> "Tally":
        """The sum, in the order given."""
        result = Tally()
        for tally in tallies:
            result += tally
        return result

    def scores(self, task: str) -> dict[str, float]:
        """``loss`` with ``accuracy``, or with ``perplexity`` for a causal language model."""
        if self.count == 0:
            return {}
        loss = self.loss_sum / self.count
        if task == "causal-lm":
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"loss": loss, "accuracy": self.correct / self.count}


def better(task: str, candidate: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether ``candidate`` beats ``best``: by accuracy, or by loss for a language model."""
    if best is None:
        return True
    if task == "causal-lm":
        return candidate["loss"] < best["loss"]
    return candidate["accuracy"] > best["accuracy"]
