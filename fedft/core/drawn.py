"""Batches of a round that are made when they are asked for, one at a time.

A plan says how many there are, and a plan comes from a server. What a client holds of them is
therefore never more than the one in hand, whatever the number.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import overload

from fedft.core.errors import SecurityRefusal
from fedft.core.types import Batch

_ends: ContextVar[float] = ContextVar("ends", default=float("inf"))


class Overtime(SecurityRefusal):
    """A piece of work takes longer than whoever does it allows."""


@contextmanager
def within(seconds: float, clock: Callable[[], float] = time.monotonic) -> Generator[None]:
    """Inside, no batch is made after so many seconds.

    Raises:
        Overtime: one was asked for later.
    """
    token = _ends.set(clock() + seconds)
    try:
        yield
    finally:
        _ends.reset(token)


def check_time() -> None:
    """Go on, or not: see :func:`within`.

    Raises:
        Overtime: the time is over.
    """
    if time.monotonic() > _ends.get():
        raise Overtime(
            "this piece of work took longer than this client allows, and was given up",
            fix="Allow more with --most-seconds.",
        )


@dataclass(eq=False)
class Drawn(Sequence[Batch]):
    """Batches in training order. Reading them in order makes each once, and keeps one.

    Args:
        draw: makes the batches from the first one on. What is asked for out of order is drawn anew
            from the start, so ``draw`` has to give the same ones each time where that matters.
        length: how many batches there are.
        rows: how many different rows are among them, as far as that is no secret.
    """

    draw: Callable[[], Iterator[Batch]]
    length: int
    rows: int
    _coming: Iterator[Batch] | None = field(default=None, init=False)
    _at: int = field(default=-1, init=False)
    _last: Batch | None = field(default=None, init=False)

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return self.length > 0  # len() has no word for more than sys.maxsize

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        place = index + self.length if index < 0 else index
        if not 0 <= place < self.length:
            raise IndexError(index)
        if self._coming is None or place < self._at:
            self._coming, self._at, self._last = self.draw(), -1, None
        if place > self._at:
            check_time()
            self._last = next(islice(self._coming, place - self._at - 1, None))
            self._at = place
        assert self._last is not None
        return self._last

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(self.length))


def distinct(batches: Sequence[Batch], rows: int) -> int:
    """How many of ``rows`` rows are among the batches of one round, at most all of them."""
    if isinstance(batches, Drawn):
        return min(rows, batches.rows)
    return min(rows, sum(map(len, batches)))


def traced(batches: Sequence[Batch]) -> bool:
    """Whether each batch says where its rows come from; those that are drawn do so alike."""
    looked_at = batches[:1] if isinstance(batches, Drawn) else batches
    return all(batch.origin is not None for batch in looked_at)
