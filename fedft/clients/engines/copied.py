"""A copy of a network that shares its frozen weights, and proof that these stayed what they were."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedft.clients.engines.own_code import failed

Fingerprints = Mapping[str, int]
"""Name of a weight → what changes with any one of its bits."""

_CHUNK = 1 << 22
"""Numbers of a weight that are summed at once."""


@dataclass(frozen=True, eq=False)
class Copied:
    """A network of its own around frozen weights that it shares.

    Attributes:
        model: the copy, as peft wrapped it.
        adapter: PEFT name of each tensor of the adapter → its parameter in ``model``.
    """

    model: nn.Module
    adapter: Mapping[str, nn.Parameter]

    def found(self, trainer: str) -> dict[str, Tensor]:
        """The tensors of the adapter as they are now, by PEFT name.

        Raises:
            UpdateRejected: they are not there any more, or others train beside them.
        """
        there = {id(p): n for n, p in self.model.named_parameters(remove_duplicate=False)}
        again = "was the model wrapped again? It is a PeftModel already"
        if gone := [name for name, p in self.adapter.items() if id(p) not in there]:
            raise failed(f"the trainer {trainer} replaced {some(gone)} of the model; {again}")
        known = {id(p) for p in self.adapter.values()}
        beside = [(n, p) for n, p in self.model.named_parameters() if id(p) not in known]
        if more := [n for n, p in beside if p.requires_grad]:
            raise failed(
                f"the trainer {trainer} had {some(more)} trained, which no plan has; {again}"
            )
        return {name: p.detach() for name, p in self.adapter.items()}


def copied(
    model: nn.Module, adapter: Mapping[str, nn.Parameter], shared: Mapping[str, Tensor]
) -> Copied:
    """A copy of a network that shares the storage of its frozen weights.

    Args:
        model: to copy.
        adapter: PEFT name → parameter of it that is to be the copy's own.
        shared: parameters of it that are not.
    """
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in shared.values()
    }
    own = copy.deepcopy(model, memo)
    return Copied(own, {name: memo[id(p)] for name, p in adapter.items()})


def fingerprints(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each weight what changes with any one of its bits."""
    return {name: _sum(weight.detach()) for name, weight in weights.items()}


def _sum(weight: Tensor) -> int:
    """The sum of the bits, taken as whole numbers: no rounding hides a small change."""
    words = weight.contiguous().view(-1)
    size = words.element_size() * words.numel()
    words = words.view(torch.int32 if size % 4 == 0 and size else torch.uint8)
    return sum(int(part.sum(dtype=torch.int64)) for part in _parts(words))


def _parts(words: Tensor) -> Iterator[Tensor]:
    for first in range(0, words.numel(), _CHUNK):
        yield words[first : first + _CHUNK]


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
