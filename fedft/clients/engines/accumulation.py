"""A step of several forward passes: the rows of one batch, a few at a time.

A client that accumulates draws its steps as it would draw batches of ``batch-size * accumulate`` rows,
so it trains on the same rows in the same steps as with one batch of that size; only fewer of them are
in memory at once. The mean of a step is taken over all of its items, not over the means of its parts:
a part counts by what its items count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from fedft.core.errors import MismatchError
from fedft.core.tasks import Task
from fedft.core.tasks.criterion import Criterion
from fedft.core.types import Batch, LocalTraining


def parts(batch: Batch, training: LocalTraining) -> list[Batch]:
    """The forward passes of a step, in order; the batch itself where it is one.

    Token rows are padded to the longest of their own part where it is known where they come from.
    """
    size = training.batch_size
    if training.accumulate == 1 or len(batch) <= size:
        return [batch]
    return [
        cut(batch, first, min(first + size, len(batch))) for first in range(0, len(batch), size)
    ]


def cut(batch: Batch, first: int, last: int) -> Batch:
    """Rows ``first`` to ``last`` of a batch, the latter left out; none of them where they are equal."""
    origin = batch.origin
    if origin is not None and first == last and len(batch) > 1:  # images of one row are opened
        return cut(cut(batch, 0, 1), 0, 0)
    if origin is not None:
        origin = replace(origin, positions=origin.positions[first:last])
        if first < last:
            return replace(origin.cut(origin.positions), origin=origin)
    own, each = dict(batch.inputs), batch.each
    if any(len(tensor) != len(batch) * each for tensor in own.values()):
        raise MismatchError(
            "an input of this batch has not one row for each of its targets, and cannot be cut",
            fix="Leave [training] accumulate out.",
        )
    rows = slice(first * each, last * each)
    inputs = {name: tensor[rows] for name, tensor in own.items()}
    return Batch(inputs, batch.labels[rows], origin, each)


def counted(batch: Batch, task: Task, criterion: Criterion | None) -> float:
    """What the items of a batch count in a mean: one each, or the weights of their classes."""
    if task.refers:
        return float(len(batch))
    _, targets = task.targets(batch.labels)
    scored = task.scored(targets)
    return float(scored.sum() if criterion is None else criterion.counts(targets, scored).sum())


def shares(of_step: Sequence[Batch], counted: Callable[[Batch], float]) -> list[float]:
    """What of a step's mean each part is, from what its items count. They come to 1, or to 0."""
    if len(of_step) == 1:
        return [1.0]
    amounts = [counted(part) for part in of_step]
    total = sum(amounts)
    return [amount / total if total else 0.0 for amount in amounts]


def passes(
    batches: Sequence[Batch],
    settings: Sequence[LocalTraining],
    task: Task,
) -> Iterator[tuple[list[Batch], list[float]]]:
    """The forward passes of several clients' step, and what of each client's mean each of them is.

    A client with fewer passes than another has no rows in the last ones.

    Args:
        batches: of the step, one a client.
        settings: of as many clients, or more.
        task: whose batches they are.
    """
    each = list(zip(batches, settings, strict=False))
    cuts = [parts(batch, own) for batch, own in each]
    found = [
        shares(of_step, partial(counted, task=task, criterion=Criterion.of(own)))
        for of_step, (_, own) in zip(cuts, each, strict=True)
    ]
    for i in range(max(map(len, cuts))):
        here = [own[i] if i < len(own) else cut(own[0], 0, 0) for own in cuts]
        yield here, [own[i] if i < len(own) else 0.0 for own in found]
