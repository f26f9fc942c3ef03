"""The losses of several clients' items, where each client may train by a criterion of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.clients.engines.unpadded import Step
from fedft.core.tasks import Task, by_row, wide
from fedft.core.tasks.criterion import Criterion


class ItemLosses:
    """Takes the losses of a pass.

    Args:
        task: what is trained.
        vocabulary: of a task whose outputs are words, where they are scored slice by slice.
    """

    def __init__(self, task: Task, vocabulary: Vocabulary | None) -> None:
        self._task, self._vocabulary = task, vocabulary

    def losses(
        self,
        answers: Tensor,
        targets: Tensor,
        items: Sequence[int],
        criteria: Sequence[Criterion | None],
        shares: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """The loss of each item, and what of its client's mean it counts. Both [m]

        Args:
            answers: outputs of the items, [m, …]; with a vocabulary its states, [m, d].
            targets: [m, …].
            items: of each client.
            criteria: of each client; none at all where all train by the task's own loss.
            shares: what of each client's step this pass is.
        """
        amounts: Sequence[float] = items
        if not any(criteria):
            each = self._each(None, answers, targets)
        else:
            own = zip(criteria, answers.split(list(items)), targets.split(list(items)), strict=True)
            each = torch.cat([self._each(*one) for one in own])
            amounts = sums(targets, items, self._task, criteria)
        return each, per_item(each, items, shares, amounts)

    def of_rows(self, answers: Tensor, step: Step) -> Tensor:
        """The log-probability of each row's targets; arguments as for :meth:`losses`. [n]"""
        assert step.answers is not None, "a row as a whole is made of its tokens"
        if self._vocabulary is not None:
            losses = self._vocabulary.losses(answers, step.targets)
        else:
            losses = F.cross_entropy(wide(answers), step.targets, reduction="none")
        return by_row(losses, step.answers, step.shape)

    def _each(self, criterion: Criterion | None, answers: Tensor, targets: Tensor) -> Tensor:
        if self._vocabulary is not None:
            smoothing = 0.0 if criterion is None else criterion.smoothing
            return self._vocabulary.losses(answers, targets, smoothing)
        if criterion is None:
            return self._task.loss(answers, targets, "none")
        return self._task.training_loss(answers, targets, criterion, "none")


def per_item(
    each: Tensor, items: Sequence[int], shares: Sequence[float], amounts: Sequence[float]
) -> Tensor:
    """What of its client's mean each item counts, [m], where they lie under each other."""
    share = [s / (n or 1) for s, n in zip(shares, amounts, strict=True)]
    weight = torch.tensor(share, dtype=each.dtype).repeat_interleave(torch.tensor(items))
    return weight.to(each.device)


def sums(
    targets: Tensor, items: Sequence[int], task: Task, criteria: Sequence[Criterion | None]
) -> list[float]:
    """What the items of each client count, where they lie under each other."""
    each = zip(targets.split(list(items)), criteria, strict=True)
    return [
        float(len(own)) if by is None else float(by.counts(own, task.scored(own)).sum())
        for own, by in each
    ]
