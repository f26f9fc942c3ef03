"""What a site says of its blocks: how alike they are on its own examples, and how important.

Only the two results leave the site, L (L - 1) / 2 similarities and L importances. A base that
holds no block of its own accord runs this one block at a time: the largest it needs at once is a
block and the activations of a few rows.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clients.engine import Engine
from fedft.core import similarity
from fedft.core.errors import MismatchError
from fedft.core.models import effective
from fedft.core.types import Adapter, Batch, Delta, Importance


@dataclass(frozen=True, eq=False)
class Comparison:
    """One site's answer.

    Attributes:
        similarity: CKA above the diagonal, [L (L - 1) / 2]; see :func:`similarity.upper`.
        importance: of each block, [L].
        rows: on which it was measured.
    """

    similarity: Tensor
    importance: Tensor
    rows: int


def compare(
    engine: Engine, adapter: Adapter, delta: Delta, batches: Sequence[Batch], kind: Importance
) -> Comparison:
    """Compare the blocks of the model with this adapter.

    Args:
        engine: with the base.
        adapter: in force.
        delta: change of the base weights in force.
        batches: the site's own rows.
        kind: ``block-influence``, or ``ablation``: by how much the loss rises without a block,
            which takes L + 1 passes.

    Raises:
        MismatchError: too few rows; or ``ablation`` at a site that cannot hold the whole model.
    """
    rows = sum(len(batch) for batch in batches)
    if rows < similarity.FEWEST_ROWS:
        raise MismatchError(
            f"blocks are compared on {similarity.FEWEST_ROWS} rows, and {rows} are here"
        )
    if kind == "ablation" and engine.base.lean:
        raise MismatchError(
            "ablation needs the whole model, and this site holds a part of it",
            fix='Set [pruning] importance = "block-influence".',
        )
    seen = _run(engine, effective(adapter, delta).factors, batches)
    cka = similarity.linear_cka([torch.cat(trace.pooled) for trace in seen])
    if kind == "ablation":
        importance = _ablation(engine, adapter, delta, batches)
    else:
        importance = torch.stack([torch.cat(trace.influence).mean() for trace in seen])
    return Comparison(similarity.upper(cka), importance, rows)


@dataclass
class _Trace:
    """What one block did: means over the tokens of its output, and its influence on every token."""

    pooled: list[Tensor] = field(default_factory=list[Tensor])
    influence: list[Tensor] = field(default_factory=list[Tensor])


def _run(engine: Engine, weights: Delta, batches: Sequence[Batch]) -> list[_Trace]:
    base = engine.base
    seen = [_Trace() for _ in base.blocks]
    mask: Tensor | None = None

    def watch(index: int) -> Any:
        def hook(
            _: nn.Module, args: tuple[Any, ...], options: dict[str, Any], after: Tensor
        ) -> None:
            before = args[0] if args else options["hidden_states"]
            real = torch.ones(after.shape[:2], dtype=torch.bool) if mask is None else mask
            count = real.sum(1, keepdim=True)
            pooled = (after.double() * real[..., None]).sum(1) / count  # [b, d]
            seen[index].pooled.append(pooled)
            seen[index].influence.append(similarity.block_influence(before[real], after[real]))

        return hook

    with ExitStack() as undo:
        model = undo.enter_context(engine.bare())
        undo.enter_context(base.streaming(weights))
        undo.enter_context(torch.inference_mode())
        for index, block in enumerate(base.blocks):
            undo.callback(block.register_forward_hook(watch(index), with_kwargs=True).remove)
        for batch in batches:
            inputs = {name: tensor.to(base.device) for name, tensor in batch.inputs.items()}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            model(**inputs)
    return seen


def _ablation(engine: Engine, adapter: Adapter, delta: Delta, batches: Sequence[Batch]) -> Tensor:
    """By how much the mean loss rises where one block is skipped, for each, [L] float64."""

    def loss(layers: tuple[int, ...] | None) -> float:
        tally = engine.evaluate(adapter, delta, batches, layers)
        return tally.loss_sum / tally.count

    L = len(engine.base.blocks)
    whole = loss(None)
    without = [loss(tuple(i for i in range(L) if i != k)) for k in range(L)]
    return torch.tensor(without, dtype=torch.float64) - whole
