"""Norm clipping: no site moves further than a bound, under any rule.

    Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", 2019,
    arXiv:1911.07963.

With D_k what site k sent minus what it started from, all tensors taken as one vector,

    D_k <- D_k min(1, C / ||D_k||)

and the ``inner`` rule goes on from the clipped updates. A site that scales its lie up gains nothing
beyond C; one that lies within the bound (a sign flip) is not noticed, only kept to its weight.

Departures from the paper: the bound is on the LoRA factors and the head, not on a whole model.
Without ``max-norm`` C is the median of the round's norms: it needs no tuning, follows the norms as
they shrink, and stays among honest norms while fewer than half of the sites lie.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import PositiveFloat

from fedft.core.types import ClientUpdate, ServerState
from strategies.changes import change_of, clip_factor, norm_of, shrunk
from strategies.combinator import Combinator


class NormClip(Combinator):
    """The inner rule on updates of bounded norm.

    Attributes:
        max_norm: C, the largest L2 norm of a site's change; None is the median of the round's.
    """

    name: Literal["norm-clip"] = "norm-clip"
    max_norm: PositiveFloat | None = None

    @property
    def mean_only(self) -> bool:
        return False

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        norms = [norm_of(change_of(u)) for u in updates]
        bound = median(norms) if self.max_norm is None else self.max_norm
        clipped = [
            shrunk(u, clip_factor(norm, bound)) for u, norm in zip(updates, norms, strict=True)
        ]
        return self.inner.combine(state, clipped)
