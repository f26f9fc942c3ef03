"""FedNova at the client: how many gradients of full weight its change consists of.

    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, arXiv:2007.07481.

The change of a client is ``- lr sum_t a_t g_t`` over its T steps; what is sent is ``||a||_1``. Told by
the optimiser itself, run on g_t = 1:

    v <- rho v + (1 - lr mu S)    S <- S + v        T times from zero; ||a||_1 = S

with momentum rho and proximal weight mu (FedDyn's alpha is one, too). Without either it is T; with
momentum alone ``(T - rho (1 - rho^T) / (1 - rho)) / (1 - rho)``, with a proximal term alone
``(1 - (1 - lr mu)^T) / (lr mu)``, as in the paper.

Under a schedule a step counts by its learning rate, relative to the largest one of the round; with
Nesterov's momentum a step is 1 + rho v in place of v, and with dampening what comes to v is less by it.

Departures from the paper, which is about SGD with one learning rate: AdamW and other optimisers have
no such a, and count their steps, which are of about one size each; clipping and weight decay are not
counted.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedft.clients.methods.base import Method, Rows, column
from fedft.core.optimizers import settings
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
    rates = training.rates(plan.round, steps)
    lrs = [training.lr if rates is None else rates(i) for i in range(steps)]
    largest = max(lrs, default=0.0) or 1.0
    if training.optimizer != "sgd":
        return float(steps) if rates is None else sum(lr / largest for lr in lrs)
    pull = training.proximal_mu + sum(t.alpha for t in plan.terms if isinstance(t, Dynamic))
    how = settings(training)
    rho, dampening = float(how["momentum"]), float(how.get("dampening", 0.0))
    v = S = 0.0
    for i, lr in enumerate(lrs):
        gradient = 1 - largest * pull * S
        v = rho * v + (gradient if i == 0 else (1 - dampening) * gradient)
        step = gradient + rho * v if how.get("nesterov") else v
        S += step if rates is None else lr / largest * step
    return S
