"""Tempered averaging: between counting examples and counting clients.

    p_k = n_k^q / sum_j n_j^q        theta = sum_k p_k theta_k

q = 1 is FedAvg-LoRA; q = 0 counts every client alike, so that one with most of the examples does not
decide alone.

Wire: as FedAvg-LoRA.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies import Strategy
from fedft.strategies.base import weighted_sum


class Tempered(Strategy):
    """Average A, B and the head, each client by a power of its examples.

    Attributes:
        power: q.
    """

    power: Annotated[float, Field(ge=0, le=1)] = 0.5

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """One round; ``updates`` are in the order of the clients' names, none of them empty."""
        mean = {}
        for name, old in state.adapter.tensors().items():
            holders = [u for u in updates if name in u.tensors]  # others hold fewer layers
            if holders:
                p = _shares([u.examples for u in holders], self.power)
                mean[name] = weighted_sum([u.tensors[name] for u in holders], p).to(old.dtype)
        return replace(state, adapter=state.adapter.replaced(mean))


def _shares(examples: Sequence[int], power: float) -> list[float]:
    # Of shares, not of counts: seven times as many examples everywhere change no bit.
    total = sum(examples)
    tempered = [(n / total) ** power for n in examples]
    return [w / sum(tempered) for w in tempered]
