"""The mathematics of :mod:`fedft.core.meters.lag`: the next start beside where the sites arrived."""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedft.core.means import squared_distance
from fedft.core.meters.base import Round
from fedft.core.meters.gaps import (
    Gap,
    applied_terms,
    bias_from,
    compared,
    ratio,
    square,
    to_after,
)
from fedft.core.parts import MATRICES
from fedft.core.types import Adapter, Delta, TrainPlan


def function_jump(round_: Round) -> float | None:
    """Root-mean-square over the sites of the relative distance of their next start from W + dW."""
    replies = round_.replies
    if not replies.examples or replies.hidden:
        return None
    plans = distinct(replies.clients, round_.following)
    if not plans:
        return bias_from(round_.once(to_after))["relative"]
    before = round_.before
    starts = [applied_terms(before.delta, plan.start, plan.delta) for plan, _ in plans]
    return _mean_jump(compared(replies, before.adapter.factors, starts), plans)


def _mean_jump(
    gaps: Sequence[Mapping[str, Gap]], plans: Sequence[tuple[TrainPlan, float]]
) -> float | None:
    """Only layers that a site holds count: of the others it has no function."""
    if any(plan.keep & MATRICES for plan, _ in plans):
        return None
    held = [
        (weight, gap)
        for found, (plan, weight) in zip(gaps, plans, strict=True)
        for module, gap in found.items()
        if module in plan.start.factors
    ]
    return ratio(sum(w * gap.error for w, gap in held), sum(w * gap.ideal for w, gap in held))


def distinct(
    sites: Sequence[tuple[str, int]], following: Mapping[str, TrainPlan]
) -> list[tuple[TrainPlan, float]]:
    """Plans that start alike, once each, with the weight of their sites: they cost a QR apiece."""
    groups: list[tuple[TrainPlan, float]] = []
    known = [(following[name], examples) for name, examples in sites if name in following]
    total = sum(examples for _, examples in known)
    for plan, examples in known:
        p = examples / total
        for index, (seen, weight) in enumerate(groups):
            if _same_start(plan, seen):
                groups[index] = (seen, weight + p)
                break
        else:
            groups.append((plan, p))
    return groups


def _same_start(x: TrainPlan, y: TrainPlan) -> bool:
    return _same(x.start.factors, y.start.factors) and _same(x.delta, y.delta)


def _same(x: Delta, y: Delta) -> bool:
    if x is y:
        return True
    return x.keys() == y.keys() and all(
        f is y[module]
        or (
            f.scale == y[module].scale
            and torch.equal(f.B, y[module].B)
            and torch.equal(f.folded_A(), y[module].folded_A())
        )
        for module, f in x.items()
    )


def displacement(means: Mapping[str, Tensor | None], start: Adapter) -> float | None:
    """Relative distance of the server's new factors from the mean of those that came back."""
    following = start.tensors(MATRICES)
    moved = length = 0.0
    for name, mean in means.items():
        target = following.get(name)
        if target is None or mean is None or mean.shape != target.shape:
            return None
        flat = mean.reshape(-1)
        moved += squared_distance(target.double().reshape(-1), flat)
        length += square(flat)
    return ratio(moved, length)
