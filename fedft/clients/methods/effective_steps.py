"""FedNova at the client: how many gradients of full weight its change consists of.

    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, arXiv:2007.07481.

The change of a client is ``- lr sum_t a_t g_t`` over its T steps; what is sent is ``||a||_1``. Told by
the optimiser itself, run on g_t = 1:

    v <- rho v + (1 - lr mu S)    S <- S + v        T times from zero; ||a||_1 = S

with momentum rho and proximal weight mu (FedDyn's alpha is one, too). Without either it is T; with
momentum alone ``(T - rho (1 - rho^T) / (1 - rho)) / (1 - rho)``, with a proximal term alone
``(1 - (1 - lr mu)^T) / (lr mu)``, as in the paper.

Departures from the paper, which is about SGD: AdamW has no such a, and counts its steps, which are of
about one size each; clipping and weight decay are not counted.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedft.clients.methods.base import Method, Rows, column
from fedft.core.terms import Dynamic
from fedft.core.terms import EffectiveSteps as Term
from fedft.core.types import TrainPlan


class EffectiveSteps(Method):
    """See :class:`fedft.core.terms.EffectiveSteps`."""

    term = Term

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        """Nothing to look at before the first step."""

    def end(self, rows: Rows, steps: Sequence[int]) -> Mapping[str, Tensor]:
        counted = [effective(plan, n) for plan, n in zip(rows.plans, steps, strict=True)]
        return {"effective-steps": column(rows, counted)}


def effective(plan: TrainPlan, steps: int) -> float:
    """``||a||_1`` of this many steps under a plan."""
    training = plan.training
    if training.optimizer == "adamw":
        return float(steps)
    pull = training.proximal_mu + sum(t.alpha for t in plan.terms if isinstance(t, Dynamic))
    v = S = 0.0
    for _ in range(steps):
        v = training.momentum * v + (1 - training.lr * pull * S)
        S += v
    return S
