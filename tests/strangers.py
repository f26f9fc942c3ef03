"""A task, a client method and a tracker as another package would bring them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedft.clients.methods import Method, Rows
from fedft.clients.methods.base import strengths
from fedft.core.record.lines import ClientLine, RoundLine
from fedft.core.tasks.base import Reduction
from fedft.core.tasks.classification import Classification
from fedft.core.terms import Term
from fedft.trackers import Start, Tracker


class Softened(Classification):
    """Classification by softened targets."""

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        """Nine parts of the target, one part of all classes."""
        hard = super().loss(outputs, targets, "none")
        even = -outputs.float().log_softmax(-1).mean(-1)
        each = torch.where(self.scored(targets), 0.9 * hard + 0.1 * even, 0.0)
        return each if reduction == "none" else each.sum() / self.scored(targets).sum()


class Shrink(Term):
    """Adds ``strength / 2 ||theta||^2`` to the loss."""

    strength: Annotated[float, Field(ge=0)] = 0.1


class Shrinking(Method):
    """Pulls every client towards zero."""

    term = Shrink

    def __init__(self, rows: Rows, terms: Sequence[Any]) -> None:
        self._strength = strengths(rows, terms, "strength")

    def correct(self, rows: Rows, count: int) -> None:
        """One more summand of the gradient."""
        rows.grad[:count] += self._strength[:count] * rows.theta[:count]

    def end(self, rows: Rows, steps: Sequence[int]) -> Mapping[str, Tensor]:
        """Nothing travels."""
        return {}


class Lines(Tracker):
    """A line a round."""

    def started(self, start: Start) -> None:
        """Begins with what is committed."""
        self._file: Path = start.folder / "lines" / "losses.txt"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(_said(line) for line in start.committed))

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """One more."""
        with self._file.open("a") as file:
            file.write(_said(line))


def _said(line: RoundLine) -> str:
    return f"{line['round']} {line['train']['loss']!r}\n"
