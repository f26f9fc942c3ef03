"""Batches of rows of about one length, each padded to its own longest.

The order is random where learning needs it and sorted where padding costs: rows are shuffled,
sorted by length within windows of a few batches, cut, and the batches shuffled again.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedft.core.examples import Examples, Rows
from fedft.core.types import Batch, LocalTraining, Origin

EVALUATION_BATCH = 64
"""Rows a batch when no gradients are kept."""

WINDOW = 4
"""Batches among which rows are sorted by length. More saves little padding and makes the batches
of every epoch the same."""


def batches(
    examples: Examples,
    rows: Rows,
    batch_size: int,
    *,
    epochs: int = 1,
    steps: int | None = None,
    generator: torch.Generator,
    pool: str | None = None,
) -> Iterator[Batch]:
    """Training batches.

    Args:
        examples: what to draw from.
        rows: the site's rows of it.
        batch_size: rows a batch; the last of an epoch may be short.
        epochs: passes over the rows; ignored where ``steps`` is set.
        steps: number of batches, over as many epochs as that takes.
        generator: of the order. Epochs are drawn as they are reached.
        pool: a name for ``rows``, by which batches can say where they come from.

    Returns:
        An iterator that pads each batch when it is asked for; empty where there are no rows.
    """
    lengths = examples.lengths[rows]
    yield from map(
        _cutter(examples, rows, lengths, pool),
        batch_rows(lengths, batch_size, epochs=epochs, steps=steps, generator=generator),
    )


def batch_rows(
    lengths: Rows,
    batch_size: int,
    *,
    epochs: int = 1,
    steps: int | None = None,
    generator: torch.Generator,
) -> Iterator[NDArray[np.int64]]:
    """The order behind :func:`batches`: for each batch, positions in ``lengths``."""
    if not len(lengths):
        return
    passes = range(epochs) if steps is None else count()
    order = (chosen for _ in passes for chosen in _epoch(lengths, batch_size, generator))
    yield from islice(order, steps)


class Uniform(Protocol):
    """A source of uniform numbers; :class:`fedft.core.privacy.entropy.Keystream` where they protect people."""

    def random(self, count: int, /) -> NDArray[np.float64]:
        """Uniform on [0, 1). [count]"""
        ...


def poisson_rows(count: int, rate: float, generator: Uniform) -> Rows:
    """Positions below ``count``, each there independently with probability ``rate``, in order."""
    return np.flatnonzero(generator.random(count) < rate)


def poisson_schedule(rows: int, training: LocalTraining) -> tuple[float, int]:
    """Sampling rate and number of a client's DP-SGD steps in one round, as accounted for.

    Args:
        rows: that it trains on.
        training: its settings.
    """
    steps = steps_of(rows, training)
    return min(1.0, training.batch_size / max(1, rows)), steps


def poisson_batches(
    examples: Examples, rows: Rows, rate: float, steps: int, generator: Uniform
) -> Iterator[Batch]:
    """Batches that every row is in independently with probability ``rate``; some may be empty.

    Args:
        examples: what to draw from.
        rows: the site's rows of it.
        rate: all rows are in every batch from 1 on.
        steps: number of batches.
        generator: of who is in which.
    """
    for _ in range(steps):
        chosen = poisson_rows(len(rows), rate, generator)
        if len(chosen):
            yield examples.collate(rows[chosen])
        else:
            yield Batch({}, torch.zeros(0, dtype=torch.int64))


def batch_count(rows: int, batch_size: int, *, epochs: int = 1, steps: int | None = None) -> int:
    """How many batches :func:`batches` gives."""
    if steps is None or not rows:
        return epochs * -(-rows // batch_size)
    return steps


def steps_of(rows: int, training: LocalTraining) -> int:
    """Optimiser steps of a client with so many rows in one round."""
    return batch_count(rows, training.step_rows, epochs=training.epochs, steps=training.steps)


def eval_batches(
    examples: Examples, rows: Rows, batch_size: int = EVALUATION_BATCH, *, pool: str | None = None
) -> Iterator[Batch]:
    """Every row once, in order of length; the same batches each time.

    Args:
        examples: what to draw from.
        rows: which of them.
        batch_size: rows a batch; the last may be short.
        pool: a name for ``rows``, as in :func:`batches`.
    """
    lengths = examples.lengths[rows]
    yield from map(_cutter(examples, rows, lengths, pool), in_chunks(lengths, batch_size))


def in_chunks(lengths: Rows, size: int = EVALUATION_BATCH) -> list[NDArray[np.int64]]:
    """Positions in order of length, ``size`` at a time."""
    order = np.argsort(lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


def _cutter(
    examples: Examples, rows: Rows, lengths: Rows, pool: str | None
) -> Callable[[NDArray[np.int64]], Batch]:
    """Positions in ``rows`` → these rows as a batch that knows where it comes from."""

    def cut(positions: NDArray[np.int64]) -> Batch:
        return examples.collate(rows[positions])

    if pool is None:
        return cut
    own = lengths.astype(np.int64)
    return lambda positions: replace(cut(positions), origin=Origin(pool, own, cut, positions))


def _epoch(
    lengths: Rows, batch_size: int, generator: torch.Generator
) -> Iterator[NDArray[np.int64]]:
    """One pass: shuffle, sort within windows, cut, shuffle the batches."""
    order: NDArray[np.int64] = torch.randperm(len(lengths), generator=generator).numpy()
    window = np.arange(len(order)) // (WINDOW * batch_size)
    order = order[np.lexsort((lengths[order], window))]
    cut = np.split(order, range(batch_size, len(order), batch_size))
    again: NDArray[np.int64] = torch.randperm(len(cut), generator=generator).numpy()
    for index in again:
        yield cut[index]
