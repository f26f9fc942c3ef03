"""What an aggregation rule is: frozen hyperparameters and pure functions of data.

A rule never sees Flower, Ray, a socket, a file or a clock. What it needs of a client it says in a
:class:`~fedft.core.types.TrainPlan`; what it makes of the answers is a new
:class:`~fedft.core.types.ServerState`. Its hyperparameters are the `[strategy]` table of the
configuration: the validated table *is* the strategy object.

To add a rule, write one file with a subclass of :class:`Strategy` that implements ``combine`` (and
``plan`` where clients do something other than train and send everything), add it to the union in
``strategies/__init__.py``, and give it a row in the conformance table of ``tests/strategies``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedft.core.types import Adapter, ClientUpdate, Part, ServerState, Site, TrainPlan


class Strategy(BaseModel, ABC):
    """Base of every aggregation rule.

    Attributes:
        mixed_ranks: whether sites may train different ranks under this rule.
        personal: the parts that stay at the sites; a run of such a rule has no single global
            model, and each site is to be judged with its own parts.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    mixed_ranks: ClassVar[bool] = False
    personal: ClassVar[frozenset[Part]] = frozenset()

    def init(self, adapter: Adapter) -> ServerState:
        """The state before the first round."""
        return ServerState(adapter)

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        """What ``site`` is to do this round. Default: train A, B and the head, send all three."""
        return TrainPlan(start=state.adapter, delta=state.delta)

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """One round: fold the updates into a new state.

        The laws that hold for every rule are kept here: sites without examples are left out,
        updates are folded in the order of site names, and a round with no usable update changes
        nothing but the round's number.
        """
        usable = sorted((u for u in updates if u.examples > 0), key=lambda u: u.site)
        following = replace(state, round=state.round + 1)
        return self.combine(following, usable) if usable else following

    @abstractmethod
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The rule's own equation.

        Args:
            state: as it was broadcast, with ``round`` already counted up to the round in hand.
            updates: at least one, each with at least one example, in the order of site names.
        """


def weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """``p_k = n_k / sum_j n_j`` over the sites that took part."""
    total = sum(u.examples for u in updates)
    return [u.examples / total for u in updates]


def weighted_mean(tensors: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """``sum_k p_k x_k``, accumulated in float64 in the order given; the dtype is kept."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, p, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def mean_of(
    updates: Sequence[ClientUpdate], p: Sequence[float], names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of every tensor the sites sent (or of ``names`` only), by name."""
    chosen = list(updates[0].tensors) if names is None else list(names)
    return {name: weighted_mean([u.tensors[name] for u in updates], p) for name in chosen}


def mean_head(updates: Sequence[ClientUpdate], p: Sequence[float]) -> Mapping[str, Tensor]:
    """The weighted mean of the fully trained tensors; empty where the sites sent none."""
    head = [name for name in updates[0].start.head if name in updates[0].tensors]
    return mean_of(updates, p, head)
