"""Several rows in one sequence: little padding, and no row sees another.

Which rows go together is found by best fit decreasing: the longest row first, each into the
sequence that it fills best (Johnson, "Near-optimal bin packing algorithms", MIT, 1973, who shows
that this takes at most 11/9 of the fewest sequences, and a few). The number of sequences is a
function of the lengths alone; which rows of one length go together is drawn anew each epoch.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray

from fedft.core.errors import MismatchError
from fedft.core.examples import Examples, Rows, TokenExamples
from fedft.core.types import Batch

Bins = list[NDArray[np.int64]]
"""The rows of each sequence."""


def best_fit(lengths: Rows, capacity: int) -> Bins:
    """Rows by sequence.

    Args:
        lengths: of the rows, [n], none above ``capacity``.
        capacity: tokens of a sequence.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} tokens in a sequence of {capacity}")
    bins: list[list[int]] = []
    left: dict[int, deque[int]] = {}  # free tokens → sequences that have so many
    free: list[int] = []  # the keys of it, ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(free, length)
        if at == len(free):
            space, found = capacity, len(bins)
            bins.append([])
        else:
            space = free[at]
            found = left[space].popleft()
            if not left[space]:
                del left[space], free[at]
        bins[found].append(row)
        if rest := space - length:
            if rest not in left:
                left[rest] = deque()
                insort(free, rest)
            left[rest].append(found)
    return [np.array(own, np.int64) for own in bins]


def packed_rows(
    lengths: Rows,
    capacity: int,
    batch_size: int,
    *,
    epochs: int = 1,
    steps: int | None = None,
    generator: torch.Generator,
) -> Iterator[Bins]:
    """For each batch the rows of its sequences, as positions in ``lengths``.

    Args:
        lengths: of the rows, [n].
        capacity: tokens of a sequence.
        batch_size: sequences a batch; the last of an epoch may be short.
        epochs: passes over the rows; ignored where ``steps`` is set.
        steps: number of batches, over as many epochs as that takes.
        generator: of the order.
    """
    if not len(lengths):
        return
    passes = range(epochs) if steps is None else count()
    order = (own for _ in passes for own in _epoch(lengths, capacity, batch_size, generator))
    yield from islice(order, steps)


def packed_batches(
    examples: Examples,
    rows: Rows,
    capacity: int,
    batch_size: int,
    *,
    epochs: int = 1,
    steps: int | None = None,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Training batches of packed sequences; arguments as for :func:`packed_rows`.

    Raises:
        MismatchError: these are no rows of tokens.
    """
    if not isinstance(examples, TokenExamples):
        raise MismatchError(
            "data.packing puts rows of tokens into one sequence, and these rows are none",
            fix="Leave data.packing out.",
        )
    for bins in packed_rows(
        examples.lengths[rows],
        capacity,
        batch_size,
        epochs=epochs,
        steps=steps,
        generator=generator,
    ):
        yield examples.packed([rows[own] for own in bins])


def packed_count(
    lengths: Rows, capacity: int, batch_size: int, *, epochs: int = 1, steps: int | None = None
) -> int:
    """How many batches :func:`packed_batches` gives."""
    if not len(lengths):
        return 0
    return epochs * -(-len(best_fit(lengths, capacity)) // batch_size) if steps is None else steps


def _epoch(
    lengths: Rows, capacity: int, batch_size: int, generator: torch.Generator
) -> Iterator[Bins]:
    order: NDArray[np.int64] = torch.randperm(len(lengths), generator=generator).numpy()
    bins = best_fit(lengths[order], capacity)
    again: NDArray[np.int64] = torch.randperm(len(bins), generator=generator).numpy()
    for first in range(0, len(bins), batch_size):
        yield [order[bins[int(i)]] for i in again[first : first + batch_size]]
