"""What the robust means and central DP share: one summary of the replies in place of their mean.

Over a rule that uses the replies through their mean alone, any other summary of them can stand in
for that mean. It is handed to the ``inner`` rule as the one reply of the round, whose own equation
(FFA-LoRA's, FedSVD's, a server optimiser's step) goes on from there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from fedft.core.types import Adapter, ClientUpdate, ServerState
from fedft.strategies.combinator import Combinator


class Summary(Combinator, ABC):
    """A rule that replaces the mean of the replies under another rule.

    Raises:
        ValueError: the inner rule needs more of the replies than their mean.
    """

    @property
    def guards(self) -> str:
        return f"{self.label} makes one summary of the changes of the adapter"

    @property
    def uses_mean_only(self) -> bool:
        return False

    @model_validator(mode="after")
    def _inner_takes_a_summary(self) -> Self:
        if not self.inner.uses_mean_only:
            raise ValueError(
                f"inner: {self.inner.name} needs the replies one by one, and this rule gives it one "
                "summary of them; choose fedavg-lora, ffa-lora, rolora or fedsvd, or one of "
                "fedprox, fedavgm, fedadam and fedyogi over these"
            )
        return self

    def handed(
        self, state: ServerState, tensors: Mapping[str, Tensor], start: Adapter
    ) -> ServerState:
        """The inner rule's new state, with ``tensors`` as the only reply."""
        return self.inner.combine(state, [ClientUpdate("summary", 1, tensors, start)])


class Coordinatewise(Summary, ABC):
    """A summary that is taken of every entry alone, over the sites that sent it, unweighted."""

    @property
    def chooses(self) -> bool:
        return True

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """The summary over the first axis of [K, ...], whose values ascend along it. float64"""

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        names = dict.fromkeys(name for u in updates for name in u.tensors)
        reduced = {
            name: self._over([u.tensors[name] for u in updates if name in u.tensors])
            for name in names
        }
        return self.handed(state, reduced, updates[0].start)

    def _over(self, tensors: Sequence[Tensor]) -> Tensor:
        ascending = torch.stack([t.double() for t in tensors]).sort(dim=0).values
        return self.reduce(ascending).to(tensors[0].dtype)
