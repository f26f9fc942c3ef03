"""FedAvgM, FedAdam and FedYogi: the server takes an optimiser's step where a rule takes a mean.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295 (FedAdam, FedYogi).
    Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", 2019, arXiv:1909.06335 (FedAvgM).

With x the state that was sent out and inner(x) what the ``inner`` rule makes of the replies, the
pseudo-gradient is D = inner(x) - x, and entry by entry

    FedAvgM    m <- beta m + D                     x <- x + lr m
    FedAdam    m <- beta1 m + (1 - beta1) D        x <- x + lr m / (sqrt(v) + tau)
               v <- beta2 v + (1 - beta2) D^2
    FedYogi    v <- v - (1 - beta2) D^2 sign(v - D^2), the rest as FedAdam

from m = 0 and v = tau^2, without bias correction, as published. FedAvgM with beta = 0 and lr = 1 is
the inner rule.

A difference between two rounds has a meaning only where entries keep theirs. Tensors that the inner
rule re-draws (FLoRA) or writes in a new basis every round (FlexLoRA, raFLoRA, FedSVD, FedMomentum)
pass through as that rule made them; so do tensors that no site sent this round, which momentum must
not move (RoLoRA), and the base change. Over those rules the optimiser steps the head only.

Departures from the papers: the step is taken on LoRA factors, in which the loss is not the papers'
function. Identical sites are a fixed point of the inner rule, but momentum goes on from what came
before.

Wire: as the inner rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from fedft.core.types import ClientUpdate, ServerState, part_of
from fedft.strategies.combinator import Combinator

Decay = Annotated[float, Field(ge=0, lt=1)]


class FedAvgM(Combinator):
    """Server momentum.

    Attributes:
        lr: server learning rate.
        beta: momentum.
    """

    name: str = "fedavgm"
    lr: PositiveFloat = 1.0
    beta: Decay = 0.9

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = self.inner.combine(state, updates)
        stepped: dict[str, Tensor] = {}
        slots = dict(after.slots)
        for name, x, D in _moves(self, state, after, updates):
            slot = f"fedavgm/m/{name}"
            slots[slot] = self.beta * _slot(state, slot, torch.zeros_like(D)) + D
            stepped[name] = (x.double() + self.lr * slots[slot]).to(x.dtype)
        return replace(after, adapter=after.adapter.replaced(stepped), slots=slots)


class FedAdam(Combinator):
    """Server Adam.

    Attributes:
        lr: server learning rate, eta; the size of a step, about, in every entry.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity; added to the root of the second moment.
    """

    name: str = "fedadam"
    lr: PositiveFloat = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: PositiveFloat = 1e-3

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        def second(v: Tensor, D: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * D.square()

        return _adapted(self, state, updates, second)


class FedYogi(Combinator):
    """Server Yogi: the second moment moves by no more than the newest square.

    Attributes:
        lr, beta1, beta2, tau: as of :class:`FedAdam`.
    """

    name: str = "fedyogi"
    lr: PositiveFloat = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: PositiveFloat = 1e-3

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        def second(v: Tensor, D: Tensor) -> Tensor:
            return v - (1 - self.beta2) * D.square() * torch.sign(v - D.square())

        return _adapted(self, state, updates, second)


def _adapted(
    rule: FedAdam | FedYogi,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    second: Callable[[Tensor, Tensor], Tensor],
) -> ServerState:
    """One adaptive step of every comparable tensor; ``second`` moves the second moment."""
    after = rule.inner.combine(state, updates)
    stepped: dict[str, Tensor] = {}
    slots = dict(after.slots)
    for name, x, D in _moves(rule, state, after, updates):
        first_slot, second_slot = (f"{rule.name}/{moment}/{name}" for moment in "mv")
        m = rule.beta1 * _slot(state, first_slot, torch.zeros_like(D)) + (1 - rule.beta1) * D
        v = second(_slot(state, second_slot, torch.full_like(D, rule.tau**2)), D)
        stepped[name] = (x.double() + rule.lr * m / (v.sqrt() + rule.tau)).to(x.dtype)
        slots[first_slot], slots[second_slot] = m, v
    return replace(after, adapter=after.adapter.replaced(stepped), slots=slots)


def _moves(
    rule: Combinator, before: ServerState, after: ServerState, updates: Sequence[ClientUpdate]
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, x and D = inner(x) - x in float64, of every tensor that the optimiser is to step."""
    old, new = before.adapter.tensors(), after.adapter.tensors()
    sent = dict.fromkeys(name for u in updates for name in u.tensors)
    return [
        (name, old[name], new[name].double() - old[name].double())
        for name in sent
        if part_of(name) in rule.comparable and name in old and old[name].shape == new[name].shape
    ]


def _slot(state: ServerState, name: str, start: Tensor) -> Tensor:
    return state.slots.get(name, start)
