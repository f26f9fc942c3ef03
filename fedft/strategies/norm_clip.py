"""Norm clipping: no site moves further than a bound, under any rule.

    Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", 2019,
    arXiv:1911.07963.

With D_k what site k sent minus what it started from, all tensors taken as one vector,

    D_k <- D_k min(1, C / ||D_k||)

and the ``inner`` rule goes on from the clipped updates. A site that scales its lie up gains nothing
beyond C; one that lies within the bound (a sign flip) is not noticed, only kept to its weight.

Departures from the paper: the bound is on the LoRA factors and the head, not on a whole model.
Without ``max-norm`` C is the median of the round's norms, over the sites that moved at all: it needs
no tuning, follows the norms as they shrink, and stays among honest norms while fewer than half of
the sites that moved lie. Sites that return their start have no say in how far others may go: where
they are the most, the median over all would be zero and the model would stand still.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from math import inf
from statistics import median

from pydantic import PositiveFloat

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.changes import change_of, clip_factor, norm_of, shrunk
from fedft.strategies.combinator import Combinator


class NormClip(Combinator):
    """The inner rule on updates of bounded norm.

    Attributes:
        max_norm: C, the largest L2 norm of a site's change; None is the median of the round's norms
            that are not zero.
    """

    name: str = "norm-clip"
    max_norm: PositiveFloat | None = None

    @property
    def guards(self) -> str:
        return f"{self.label} bounds the change of the adapter"

    @property
    def uses_mean_only(self) -> bool:
        return False

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        norms = [norm_of(change_of(u)) for u in updates]
        bound = _median_of_moved(norms) if self.max_norm is None else self.max_norm
        clipped = [
            shrunk(u, clip_factor(norm, bound)) for u, norm in zip(updates, norms, strict=True)
        ]
        return self.inner.combine(state, clipped)


def _median_of_moved(norms: Sequence[float]) -> float:
    """The median of those above zero; infinite where there is none, and nothing to clip."""
    moved = [norm for norm in norms if norm > 0]
    return median(moved) if moved else inf
