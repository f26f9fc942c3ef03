"""What a training engine is: several sites' plans in, their trained adapters out.

Two engines stand behind this interface. :mod:`fedft.clients.engines.loop` is the plain PEFT loop, one site after
another: the readable twin, and the oracle of the tests. :mod:`fedft.clients.engines.cohort` trains several sites
in one forward and backward pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fedft.core.metrics import Tally
from fedft.core.models import Base
from fedft.core.sublayers import Layer
from fedft.core.types import Adapter, Batch, Delta, Records, TrainPlan


@dataclass(frozen=True, eq=False)
class Trained:
    """One site's result.

    Attributes:
        adapter: after training, on the CPU in float32; the parts that did not train are the start's.
        metrics: ``loss``, the mean of the batch losses weighted by examples; ``steps``;
            ``grad_A_norm`` and ``grad_B_norm`` of the first batch, before clipping.
        records: of the plan's terms: every record that one of them sends or keeps, each as
            ``plan.schema`` has it, on the CPU in float32.
    """

    adapter: Adapter
    metrics: Mapping[str, float]
    records: Records = field(default_factory=dict[str, Mapping[str, Tensor]])


class Engine(Protocol):
    """Trains and evaluates adapters on one resident base."""

    base: Base

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """Train each plan on its own batches. Mathematically, each site trains alone.

        Args:
            plans: of different sites; they may differ in rank, parts, optimiser and layers.
            batches: one sequence for each plan, in training order.
        """
        ...

    def evaluate(
        self,
        adapter: Adapter,
        delta: Delta,
        batches: Iterable[Batch],
        layers: tuple[Layer, ...] | None = None,
    ) -> Tally:
        """Score one adapter, without gradients, on the whole model or on some of its blocks."""
        ...

    def reference(self, batch: Batch) -> Tensor:
        """The log-probability that the base alone gives each row's targets. [n] on the CPU

        No adapter and no change of the base is in it: of a rule that merges updates into the base
        it is still the model that the run began with.
        """
        ...

    def bare(self) -> AbstractContextManager[nn.Module]:
        """The frozen network with no adapter in it, for the time of the context.

        Raises:
            MismatchError: this engine's adapter cannot be taken out.
        """
        ...
