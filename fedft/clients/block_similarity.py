"""What a site says of its layers: how alike they are on its own examples, and how important.

A layer is a block, or half of one: what is compared is the residual stream as each leaves it. Only
the two results leave the site, L (L - 1) / 2 similarities and L importances. A base that holds no
block of its own accord runs this one block at a time: the largest it needs at once is a block and
the activations of a few rows.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedft.clients.engines.base import Engine
from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.core import similarity, sublayers
from fedft.core.adapters.scale import effective
from fedft.core.errors import MismatchError
from fedft.core.precise import widened
from fedft.core.sublayers import HALVES, Layer, Sublayer
from fedft.core.types import Adapter, Batch, Delta, Granularity, Importance


@dataclass(frozen=True, eq=False)
class Comparison:
    """One site's answer.

    Attributes:
        similarity: CKA above the diagonal, [L (L - 1) / 2]; see :func:`similarity.upper`.
        importance: of each layer, [L]: of blocks in order, of each block attention first.
        rows: on which it was measured.
    """

    similarity: Tensor
    importance: Tensor
    rows: int


def compare(
    engine: Engine,
    adapter: Adapter,
    delta: Delta,
    batches: Sequence[Batch],
    kind: Importance,
    granularity: Granularity = "block",
) -> Comparison:
    """Compare the blocks of the model with this adapter, or their halves.

    Args:
        engine: with the base.
        adapter: in force.
        delta: change of the base weights in force.
        batches: the site's own rows.
        kind: ``block-influence``, or ``ablation``: by how much the loss rises without a layer,
            which takes L + 1 passes.
        granularity: whether a layer is a block or half of one.

    Raises:
        MismatchError: too few rows; halves that cannot be told apart; or ``ablation`` at a site
            that cannot hold the whole model.
    """
    rows = sum(len(batch) for batch in batches)
    if rows < similarity.FEWEST_ROWS:
        raise MismatchError(
            f"blocks are compared on {similarity.FEWEST_ROWS} rows, and {rows} are here"
        )
    if kind == "ablation" and engine.base.lean:
        raise MismatchError(
            "ablation needs the whole model, and this client holds a part of it",
            fix='Set [pruning] importance = "block-influence".',
        )
    if granularity == "sublayer":
        engine.base.check_divisible()
    seen = _run(engine, effective(adapter, delta).factors, batches, granularity)
    cka = similarity.linear_cka([torch.cat(trace.pooled) for trace in seen])
    if kind == "ablation":
        importance = _ablation(engine, adapter, delta, batches, granularity)
    else:
        importance = torch.stack([torch.cat(trace.influence).mean() for trace in seen])
    return Comparison(similarity.upper(cka), importance, rows)


@dataclass
class _Trace:
    """What one layer did: means over the tokens of its output, and its influence on every token."""

    pooled: list[Tensor] = field(default_factory=list[Tensor])
    influence: list[Tensor] = field(default_factory=list[Tensor])

    def note(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Of one batch: the residual stream around the layer, [b, t, d], and its real tokens."""
        real = torch.ones(after.shape[:2], dtype=torch.bool) if mask is None else mask
        count = real.sum(1, keepdim=True)
        self.pooled.append((widened(after) * real[..., None]).sum(1) / count)  # [b, d]
        self.influence.append(similarity.block_influence(before[real], after[real]))


def _run(
    engine: Engine, weights: Delta, batches: Sequence[Batch], granularity: Granularity
) -> list[_Trace]:
    base = engine.base
    parts = 1 if granularity == "block" else len(HALVES)
    seen = [_Trace() for _ in range(parts * len(base.blocks))]
    mask: Tensor | None = None
    stream: list[Tensor] = []  # as it enters a block, and as it leaves each layer in it

    def reach(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        stream.append(sublayers.pass_on(*args, **options))

    def leave(index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], after: Tensor) -> None:
            states = [*stream, after]
            for part, (before, reached) in enumerate(pairwise(states)):
                seen[parts * index + part].note(before, reached, mask)
            stream.clear()

        return hook

    with ExitStack() as undo:
        model = undo.enter_context(engine.bare())
        undo.enter_context(base.streaming(weights))
        undo.enter_context(torch.inference_mode())
        if (vocabulary := Vocabulary.of(base)) is not None:  # nobody asks for logits here
            undo.enter_context(vocabulary.entered())
        for index, block in enumerate(base.blocks):
            for module in [block] if parts == 1 else [block, sublayers.between(block)]:
                undo.callback(module.register_forward_pre_hook(reach, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(leave(index)).remove)
        for batch in batches:
            inputs = {name: tensor.to(base.device) for name, tensor in batch.inputs.items()}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            model(**inputs)
    return seen


def _ablation(
    engine: Engine,
    adapter: Adapter,
    delta: Delta,
    batches: Sequence[Batch],
    granularity: Granularity,
) -> Tensor:
    """By how much the mean loss rises where one layer is skipped, for each, [L] float64."""

    def loss(layers: tuple[Layer, ...] | None) -> float:
        tally = engine.evaluate(adapter, delta, batches, layers)
        return tally.loss_sum / tally.count

    blocks = range(len(engine.base.blocks))
    layers: list[Layer] = [*blocks]
    if granularity == "sublayer":
        layers = [Sublayer(block, half) for block in blocks for half in HALVES]
    whole = loss(None)
    without = [loss(tuple(other for other in layers if other != layer)) for layer in layers]
    return torch.tensor(without, dtype=torch.float64) - whole
