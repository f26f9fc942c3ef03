"""Multi-Krum: average the updates that lie closest to their neighbours.

    Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent", NeurIPS 2017, section 4.

    the inner rule gets the m updates of the lowest Krum score, with equal weights

Scores, product space and f are those of :mod:`fedft.strategies.krum`. With m = 1 it is Krum; with m = K
the inner rule with equal weights.

Departures from the paper: as Krum's. The ``inner`` rule averages; the paper takes the plain mean.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import PositiveInt

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.krum import Central


class MultiKrum(Central):
    """The inner rule on the most central updates, equally weighted.

    Attributes:
        byzantine: share of a round's sites that may lie.
        select: m, how many updates are kept; None keeps K - f.
    """

    name: str = "multi-krum"
    select: PositiveInt | None = None

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        K = len(updates)
        m = min(self.select or max(1, K - self.liars(K)), K)
        # Stable, so that equal scores are taken in the order of site names.
        order = self.scores(updates).argsort(stable=True)
        chosen = sorted(int(k) for k in order[:m])
        return self.inner.combine(state, [replace(updates[k], examples=1) for k in chosen])
