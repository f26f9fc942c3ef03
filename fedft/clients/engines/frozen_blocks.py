"""Blocks below the first adapted one are computed once for each example.

Their weights never change (``Base.shift`` reaches adapted layers only), so what enters the first
adapted block is a constant of the example. It is computed for all rows of a pool at a time, kept
for later epochs, rounds and evaluations as far as memory goes, and put in where the blocks would
have run.

What is kept of a row must not depend on which worker met it first, or in which round: matrix
products of other sizes round otherwise. A pool is therefore always computed in the same chunks,
those of :func:`~fedft.core.data.batches.in_chunks`, which for an evaluation are its batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedft.clients.engines.checkpointing import first_adapted
from fedft.clients.engines.unpadded import Packing, Step
from fedft.core.data.batches import in_chunks
from fedft.core.drawn import distinct, traced
from fedft.core.models import Base
from fedft.core.overrides import overridden
from fedft.core.types import Batch, Origin

BUDGET = 1 << 30
"""Bytes of activations that a process keeps. Once they are spent nothing is dropped for something
newer: of sites that come round in turn, a part would be found again and not none."""

Join = Callable[[Sequence[Batch]], Step]
"""Batches of several sites → one step, on the device."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Activations of all rows of a pool.

    Attributes:
        states: rows end to end, in the order of the pool, [tokens, d] in the base's dtype.
        starts: where each row begins, [n].
        tokens: of each row, [n].
    """

    states: Tensor
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def rows(self, positions: NDArray[np.int64]) -> Tensor:
        """Of the given rows, end to end. [T, d]"""
        tokens = self.tokens[positions]
        ends = np.cumsum(tokens)
        moved = np.repeat(self.starts[positions] - (ends - tokens), tokens)
        where = torch.from_numpy(np.arange(len(moved)) + moved)
        return self.states.index_select(0, where.to(self.states.device))


@dataclass(frozen=True)
class _Form:
    """What one row shows about the blocks.

    Attributes:
        tokens: block tokens for each token of an example; images have one "token" and many patches.
        row_bytes: of one block token.
        tuples: a block answers a tuple, not a tensor.
        images: shape of an image; None for text.
    """

    tokens: int
    token_bytes: int
    tuples: bool
    images: torch.Size | None


class Prefix:
    """What enters the first adapted block, for the pools that a process works on.

    Args:
        base: whose blocks below the first adapted one are constant.
        packing: of the same model.
        join: puts batches into the form in which the model sees them.
        budget: bytes to keep.
    """

    def __init__(self, base: Base, packing: Packing, join: Join, budget: int = BUDGET) -> None:
        self._base, self._packing, self._join = base, packing, join
        self._left = budget
        self._budget = budget
        self._depth = first_adapted(base) if packing.possible else 0
        self._kept: dict[str, Kept] = {}
        self._known: _Form | None = None

    def for_training(self, batches: Sequence[Sequence[Batch]]) -> Mapping[str, Kept] | None:
        """Activations of the sites' pools; None where all blocks are to run instead.

        The answer is a function of the batches alone. Blocks run where a site sees less than all
        of its rows, since the others would be computed for nothing, and where the pools together
        exceed the budget.
        """
        if not self._depth or not all(map(traced, batches)):
            return None
        firsts = (own[0].origin for own in batches if own)
        origins = [origin for origin in firsts if origin is not None]
        some = [own for own in batches if own]
        pools = [len(origin.lengths) for origin in origins]
        if any(distinct(own, n) < n for own, n in zip(some, pools, strict=True)):
            return None
        if sum(map(self._size, origins)) > self._budget:
            return None
        return {origin.pool: self._of(origin) for origin in origins}

    def for_evaluation(self, batch: Batch) -> Mapping[str, Kept] | None:
        """Activations of the batch's pool, where they are kept or can be."""
        origin = batch.origin
        if not self._depth or origin is None:
            return None
        if origin.pool not in self._kept and self._size(origin) > self._left:
            return None
        return {origin.pool: self._of(origin)}

    def unopened(self, batch: Batch) -> Batch:
        """The batch with blank images: nothing that is computed of their pixels is used."""
        assert self._known is not None, "no row has been seen"
        if self._known.images is None:
            return batch
        blank = torch.zeros(()).expand(len(batch), *self._known.images)
        return replace(batch, inputs=dict.fromkeys(batch.inputs, blank))

    def entering(self, batches: Sequence[Batch], step: Step, kept: Mapping[str, Kept]) -> Tensor:
        """What enters the first adapted block in this step: [1, T, d] packed, else [n, t, d]."""
        origins = [batch.origin for batch in batches]
        rows = torch.cat([kept[o.pool].rows(o.positions) for o in origins if o is not None])
        if step.layout is not None:
            return rows[None]
        mask, n = step.inputs.get("attention_mask"), sum(step.rows)
        if mask is None:
            return rows.unflatten(0, (n, -1))
        padded = rows.new_zeros(mask.numel(), rows.shape[1])
        padded[mask.flatten() != 0] = rows
        return padded.unflatten(0, (n, -1))

    @contextmanager
    def skipped(self, entering: Tensor | None) -> Iterator[None]:
        """The first adapted block gets ``entering`` and those below do nothing; None changes nothing."""
        with ExitStack() as undo:
            if entering is not None:
                for block in self._packing.blocks[: self._depth]:
                    undo.enter_context(overridden(block, self._nothing))
                hook = self._packing.blocks[self._depth].register_forward_pre_hook(
                    lambda _, args: (entering, *args[1:])
                )
                undo.callback(hook.remove)
            yield

    def _nothing(self, states: Tensor, *_: Any, **__: Any) -> Any:
        assert self._known is not None, "no row has been seen"
        return (states,) if self._known.tuples else states

    # -------------------------------------------------------------------------- computing

    def _of(self, origin: Origin) -> Kept:
        if origin.pool in self._kept:
            return self._kept[origin.pool]
        kept = self._compute(origin)
        if (size := self._size(origin)) <= self._left:
            self._left -= size
            self._kept[origin.pool] = kept
        return kept

    def _size(self, origin: Origin) -> int:
        """Bytes of all rows of a pool."""
        form = self._form(origin)
        return int(origin.lengths.sum()) * form.tokens * form.token_bytes

    def _form(self, origin: Origin) -> _Form:
        if self._known is None:
            self._known = self._look(origin)
        return self._known

    def _look(self, origin: Origin) -> _Form:
        """Run one row to learn what it takes."""
        first = np.zeros(1, np.int64)
        batch = origin.cut(first)
        states, tuples = self._reach(batch)
        pixels = batch.inputs.get("pixel_values")
        return _Form(
            tokens=len(states) // int(origin.lengths[0]),
            token_bytes=states.shape[1] * states.element_size(),
            tuples=tuples,
            images=None if pixels is None else pixels.shape[1:],
        )

    def _compute(self, origin: Origin) -> Kept:
        tokens = origin.lengths * self._form(origin).tokens
        chunks = in_chunks(origin.lengths)
        parts = [self._reach(origin.cut(chunk))[0] for chunk in chunks]
        order = np.concatenate(chunks)
        starts = np.empty_like(tokens)
        starts[order] = np.cumsum(tokens[order]) - tokens[order]
        return Kept(torch.cat(parts), starts, tokens)

    def _reach(self, batch: Batch) -> tuple[Tensor, bool]:
        """Run a batch up to the first adapted block: its real tokens, [T, d]; blocks answer tuples?"""
        below, first = self._packing.blocks[self._depth - 1 : self._depth + 1]
        reached, tuples = None, False

        def look(_: nn.Module, __: Any, answer: Any) -> None:
            nonlocal tuples
            tuples = isinstance(answer, tuple)

        with ExitStack() as undo:
            # Kept activations meet autograd later, which refuses tensors of inference mode.
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            step = self._join([batch])
            undo.callback(below.register_forward_hook(look).remove)
            undo.callback(first.register_forward_pre_hook(_stop).remove)
            undo.enter_context(self._packing.using(step.layout))
            try:
                self._base.model(**step.inputs)
            except _Reached as end:
                reached = end.states
        assert reached is not None, "the model did not run its blocks in order"
        states = reached.flatten(0, 1)
        mask = None if step.layout is not None else step.inputs.get("attention_mask")
        return (states if mask is None else states[mask.flatten() != 0]), tuples


class _Reached(Exception):
    """The forward pass has come to the first adapted block."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(_: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Reached(args[0])
