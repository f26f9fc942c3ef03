"""What a site changed: the tensors it sent minus those it started from, as one vector.

Shared by the rules that bound a site's influence by the norm of its change.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedft.core.types import ClientUpdate

Change = Mapping[str, Tensor]
"""PEFT name → what was sent minus the start, float64."""


def change_of(update: ClientUpdate) -> Change:
    """``theta_k - theta_start`` over every tensor the site sent."""
    start = update.start.tensors()
    return {name: x.double() - start[name].double() for name, x in update.tensors.items()}


def norm_of(change: Change) -> float:
    """The L2 norm over all tensors, taken together as one vector."""
    return sum(float(d.square().sum()) for d in change.values()) ** 0.5


def clip_factor(norm: float, bound: float) -> float:
    """``min(1, bound / norm)``: what brings a vector of this norm into the ball."""
    return min(1.0, bound / norm) if norm > 0 else 1.0


def shrunk(update: ClientUpdate, factor: float) -> ClientUpdate:
    """The update with ``factor`` times its change; the very same object where that is all of it."""
    if factor == 1.0:
        return update
    start = update.start.tensors()
    tensors = {
        name: (start[name].double() + factor * d).to(update.tensors[name].dtype)
        for name, d in change_of(update).items()
    }
    return replace(update, tensors=tensors)
