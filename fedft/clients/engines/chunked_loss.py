"""The loss of a causal language model, without the logits of all tokens over all words.

For a scored token with hidden state h, target t and a frozen output layer with rows w_v,

    l_v = h w_v + b_v        loss = log sum_v e^{l_v} - l_t
    d loss / d h = (sum_{v != t} e^{l_v} (w_v - w_t)) / sum_v e^{l_v}

Both sums are taken over slices of the vocabulary, relative to the largest logit so far: when a
slice raises it, what has been summed is scaled down (as in Milakov and Gimelshein, "Online
normalizer calculation for softmax", arXiv:1805.02867). One slice's logits are in memory at a time
and every row of the layer is read once; the products are those of the plain way, no more.
The target's own term is kept out of the sums, so that a token that is almost certain keeps a
gradient of full precision. A model that does something to the answer of its output layer before
they are its logits, such as capping them, has them computed by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedft.clients.engines.stacked import frozen_linear
from fedft.core.metrics import Predictions, Tally
from fedft.core.models import Base
from fedft.core.overrides import overridden
from fedft.core.precise import widened, widest
from fedft.core.tables import WINDOW
from fedft.core.tasks import Task

_NARROWEST = 512
"""Words of a slice, at least: products with few columns are slow."""


class Vocabulary:
    """Scores tokens by what enters a frozen output layer.

    Args:
        layer: [V, d].
        release: called with the bounds of every slice of rows that has been read.
    """

    def __init__(self, layer: nn.Linear, release: Callable[[int, int], None] | None = None) -> None:
        self._layer = layer
        self._release = release or _keep

    @staticmethod
    def of(base: Base) -> "Vocabulary | None":
        """That of a base; None where its own forward pass has to make the logits, or a metric reads them."""
        output = base.output
        # A task that refers scores what its rows come to, not logits.
        if output is None or (base.kind.needs_outputs and not base.kind.refers):
            return None
        if any(layer is output.layer for layer in base.adapted.values()):
            return None
        return Vocabulary(output.layer, None if output.table is None else output.table.release)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For the time of the context, the model's ``logits`` are what enters its output layer."""
        with overridden(self._layer, _pass_on):
            yield

    def losses(self, states: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each token, with a gradient for ``states``. [m] float32 or float64

        Args:
            states: what enters the output layer, [m, d].
            targets: [m] int64.
            smoothing: share of a label that is spread evenly over all words.
        """
        each = cast(Tensor, _Losses.apply(states, targets, self))
        return each + smoothing * self._lead(states, targets) if smoothing else each

    def _lead(self, states: Tensor, targets: Tensor) -> Tensor:
        """``l_t - mean_v l_v``, by which a label that is spread evenly costs more. [m]

        As the mean of the logits is the logit of the mean row, no slice is looked at again.
        """
        weight, bias = self._layer.weight, self._layer.bias
        row, level = self._mean
        own = weight[targets].to(row.dtype) - row  # [m, d]
        self._release(0, len(weight))
        lead = (states.to(weight.dtype).to(row.dtype) * own).sum(-1)
        return lead if bias is None else lead + (bias[targets].to(row.dtype) - level)

    @cached_property
    def _mean(self) -> tuple[Tensor, Tensor]:
        """The mean row, [d], and the mean bias of the layer, which is frozen."""
        weight, bias = self._layer.weight.detach(), self._layer.bias
        total = torch.zeros(weight.shape[1], dtype=widest(weight.device), device=weight.device)
        size = _slice(1, weight)
        for start in range(0, len(weight), size):
            total += weight[start : start + size].sum(0, dtype=total.dtype)
            self._release(start, min(start + size, len(weight)))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        level = total.new_zeros(()) if bias is None else bias.detach().mean(dtype=total.dtype)
        return (total / len(weight)).to(dtype), level.to(dtype)

    def tally(self, task: Task, states: Tensor, targets: Tensor) -> Tally:
        """Score tokens without a gradient; arguments as for :meth:`losses`, and the ``task``."""
        scan = self.scan(states, targets, gradient=False)
        found = Predictions(scan.losses, scan.best, targets, self._layer.out_features)
        return task.counted(found, float(widened(scan.losses).sum()))

    def scan(self, states: Tensor, targets: Tensor, *, gradient: bool) -> "Scan":
        """Go over the vocabulary once.

        Raises:
            IndexError: a target is not in the vocabulary.
        """
        if not bool(((targets >= 0) & (targets < self._layer.out_features)).all()):
            raise IndexError(f"a target is outside of {self._layer.out_features} words")
        weight, bias = self._layer.weight, self._layer.bias
        states = states.to(weight.dtype)  # some models widen their logits
        sums = _Sums(states, gradient=gradient)
        size = _slice(len(states), weight)
        for start in range(0, len(weight), size):
            stop = min(start + size, len(weight))
            sums.add(start, weight[start:stop], None if bias is None else bias[start:stop], targets)
            self._release(start, stop)
        return sums.result()


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over the vocabulary finds.

    Attributes:
        losses: of each token, [m].
        best: the word with the largest logit, [m] int64.
        gradient: of each token's loss with respect to its state, [m, d]; None if not asked for.
    """

    losses: Tensor
    best: Tensor
    gradient: Tensor | None


class _Sums:
    """Sums over the slices so far, in float32 or float64, relative to the largest logit so far."""

    def __init__(self, states: Tensor, *, gradient: bool) -> None:
        m, d = states.shape
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        self._states = states
        self._top = states.new_full((m,), -torch.inf, dtype=dtype)
        self._best = torch.zeros(m, dtype=torch.int64, device=states.device)
        self._own = torch.zeros_like(self._top)  # l_t
        self._rest = torch.zeros_like(self._top)  # sum_{v != t} e^{l_v - top}
        self._pull = states.new_zeros(m, d, dtype=dtype) if gradient else None  # … times w_v
        self._towards = torch.zeros_like(states) if gradient else None  # w_t

    def add(self, start: int, rows: Tensor, bias: Tensor | None, targets: Tensor) -> None:
        """Take in the words from ``start``, with these rows of the output layer. [s, d]"""
        logits = frozen_linear(self._states, rows, bias).to(self._top.dtype)  # [m, s]
        highest, at = logits.max(1)
        self._best = torch.where(highest > self._top, at + start, self._best)
        top = torch.maximum(self._top, highest)
        shrink = (self._top - top).exp_()
        here = ((targets >= start) & (targets < start + len(rows))).nonzero().squeeze(1)
        word = targets[here] - start
        self._own[here] = logits[here, word]
        logits.sub_(top[:, None]).exp_()
        logits[here, word] = 0.0
        self._rest.mul_(shrink).add_(logits.sum(1))
        if self._pull is not None and self._towards is not None:
            self._pull.mul_(shrink[:, None])
            self._pull += frozen_linear(logits.to(rows.dtype), rows.T, None)
            self._towards[here] = rows[word]
        self._top = top

    def result(self) -> Scan:
        gap = self._own - self._top
        total = self._rest + gap.exp()
        gradient = None
        if self._pull is not None and self._towards is not None:
            gradient = self._pull.sub_(self._rest[:, None] * self._towards).div_(total[:, None])
        certain = gap == 0  # of the largest logit log(1 + rest) keeps all digits
        losses = torch.where(certain, self._rest.log1p(), total.log() - gap)
        return Scan(losses, self._best, gradient)


class _Losses(torch.autograd.Function):
    """Losses whose gradients are ready when they are: the layer is read once for both."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        found = vocabulary.scan(states, targets, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(found.gradient)
        ctx.dtype = states.dtype
        return found.losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(ctx.dtype), None, None


def _slice(tokens: int, weight: Tensor) -> int:
    """Words at a time: neither their rows nor their logits exceed a window, unless it is narrow."""
    widest = max(tokens, weight.shape[1]) * weight.element_size()
    return max(_NARROWEST, WINDOW // widest)


def _pass_on(states: Tensor) -> Tensor:
    return states


def _keep(_start: int, _stop: int) -> None:
    """An output layer in memory stays there."""
