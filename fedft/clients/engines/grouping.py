"""Which plans share a pass of the cohort engine."""

from collections.abc import Sequence

import torch

from fedft.clients.engines.stacked import same_layout
from fedft.clients.methods import Method, asked
from fedft.core.errors import ConfigError
from fedft.core.types import Delta, TrainPlan


def groups(plans: Sequence[TrainPlan]) -> list[list[int]]:
    """Indices of the plans that can share a pass, in order of first appearance."""
    groups: list[list[int]] = []
    for k, plan in enumerate(plans):
        if not plan.start.tensors(plan.train):
            raise ConfigError(f"the plan for client {plan.site!r} trains nothing")
        for group in groups:
            if _together(plans[group[0]], plan):
                group.append(k)
                break
        else:
            groups.append([k])
    return groups


def _together(a: TrainPlan, b: TrainPlan) -> bool:
    return (
        a.train == b.train
        and a.training.optimizer == b.training.optimizer
        and a.layers == b.layers
        and _makers(a) == _makers(b)
        and same_layout(a.start, b.start)
        and _same_delta(a.delta, b.delta)
    )


def _makers(plan: TrainPlan) -> list[type[Method]]:
    """The methods that may take the place of the backward pass."""
    return [method for method in asked(plan) if method.makes_gradient]


def _same_delta(a: Delta, b: Delta) -> bool:
    return a is b or (
        a.keys() == b.keys()
        and all(
            a[m].scale == b[m].scale
            and torch.equal(a[m].folded_A(), b[m].folded_A())
            and torch.equal(a[m].B, b[m].B)
            for m in a
        )
    )
