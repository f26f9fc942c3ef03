"""What the base alone gives the targets of a row, computed once for each row and kept.

The base never changes, so the log-probability that it gives an answer is a constant of the row: it
is computed when a batch first has the row, and looked up in later epochs, rounds and evaluations.

What is kept must not depend on which worker met the row first, or in which batch: matrix products
of other sizes round otherwise. A row is therefore always computed in the same company, a few rows of
about its length out of the pool it was drawn from, as in :mod:`fedft.clients.engines.frozen_blocks`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.data.batches import in_chunks
from fedft.core.types import Batch, Origin

BUDGET = 64 << 20
"""Bytes that a process keeps: of eight million rows. Pools that were asked for least recently go."""

_TOGETHER = 8
"""Examples computed at once: so few that a client needs no more memory for it than for a step."""


@dataclass(eq=False)
class _Pool:
    """What is known of one pool.

    Attributes:
        values: a row an example, NaN where it is not known yet. [n, each] float64
        chunks: positions that are computed together.
        chunk: which of them each position is in, [n].
    """

    values: NDArray[np.float64]
    chunks: list[NDArray[np.int64]]
    chunk: NDArray[np.int64]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.values.nbytes + 2 * self.chunk.nbytes

    @staticmethod
    def of(origin: Origin, each: int) -> "_Pool":
        """One of which nothing is known."""
        n = len(origin.lengths)
        chunks, chunk = in_chunks(origin.lengths, _TOGETHER), np.empty(n, np.int64)
        for index, positions in enumerate(chunks):
            chunk[positions] = index
        return _Pool(np.full((n, each), np.nan), chunks, chunk)


class References:
    """Log-probabilities of rows by the base alone, for the pools that a process works on.

    Args:
        compute: of the rows of a batch, [b * each].
        budget: bytes to keep.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], budget: int = BUDGET) -> None:
        self._compute, self._budget = compute, budget
        self._pools: dict[str, _Pool] = {}  # that asked for most recently last

    def of(self, batch: Batch) -> Tensor:
        """Of each row of a batch, on the CPU. [b * each] float64"""
        origin = batch.origin
        if origin is None:  # rows that nobody can find again
            return self._compute(batch).double()
        pool = self._pools.pop(origin.pool, None) or _Pool.of(origin, batch.each)
        self._pools[origin.pool] = pool
        own = origin.positions
        unknown = own[np.isnan(pool.values[own, 0])]
        for index in np.unique(pool.chunk[unknown]).tolist():
            positions = pool.chunks[index]
            found: NDArray[np.float64] = self._compute(origin.cut(positions)).double().numpy()
            pool.values[positions] = found.reshape(len(positions), batch.each)
        self._forget()
        values = pool.values[own].reshape(-1)
        return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]

    def _forget(self) -> None:
        """Let go of pools until the rest fits; the one in hand stays."""
        total = sum(pool.size for pool in self._pools.values())
        while total > self._budget and len(self._pools) > 1:
            total -= self._pools.pop(next(iter(self._pools))).size
