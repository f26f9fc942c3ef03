"""Gradient checkpointing: blocks keep what enters them, and run again in the backward pass.

    Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
    arXiv:1604.06174.

Activations of all blocks become the inputs of all blocks and the activations of one. The blocks of
the forward pass run twice: on a frozen base, whose backward pass is no longer than its forward
pass, half as much work again. The numbers are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedft.core.errors import MismatchError
from fedft.core.models import Base
from fedft.core.overrides import overridden
from fedft.core.types import block_of

Surroundings = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""In which a block runs in the forward pass, and in which it runs again."""


def recomputable(base: Base) -> Sequence[nn.Module]:
    """The blocks that keep anything: those from the first adapted one on.

    Raises:
        MismatchError: the blocks of this model cannot be told from its other layers.
    """
    if not base.blocks:
        raise MismatchError(
            f"the blocks of {type(base.model).__name__} cannot be told from its other layers",
            fix="Set [engine] gradient-checkpointing = false.",
        )
    return base.blocks[first_adapted(base) :]


def first_adapted(base: Base) -> int:
    """Index of the first block with an adapted layer; 0 where one lies outside of the blocks."""
    blocks = [block_of(path) for path in base.adapted]
    return min((b for b in blocks if b is not None), default=0) if None not in blocks else 0


@contextmanager
def recomputed(
    blocks: Sequence[nn.Module],
    surroundings: Callable[[], Surroundings] = lambda: (nullcontext(), nullcontext()),
) -> Iterator[None]:
    """For the time of the context, these blocks run again in the backward pass.

    Hooks on a block itself run once. torch's global random numbers are replayed.

    Args:
        blocks: what they are given and what they answer is as it was.
        surroundings: called as a block is reached.
    """
    with ExitStack() as undo:
        for block in blocks:
            again = partial(_kept_small, block.forward, surroundings)
            undo.enter_context(overridden(block, again))
        yield


def _kept_small(
    forward: Callable[..., Any],
    surroundings: Callable[[], Surroundings],
    *args: Any,
    **options: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=surroundings, **options)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """For the time of the context, no keys and values are kept: only generation needs them."""
    config: Any = model.config
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
