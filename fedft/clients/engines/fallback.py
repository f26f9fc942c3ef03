"""The cohort engine, with the plain loop behind it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import Tensor, nn

from fedft.clients.engines.base import Engine, Trained
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.passes import RowsMismatch
from fedft.core.metrics import Tally
from fedft.core.spec import TaskSpec
from fedft.core.sublayers import Layer
from fedft.core.types import Adapter, Batch, Delta, TrainPlan

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Fallback:
    """The cohort engine for as long as its assumption holds, and the plain loop from then on.

    Before the first round it was tried; what is caught here is a batch that the trial had none of.

    Args:
        cohort: on a base that is whole.
        task: what it trains.
    """

    def __init__(self, cohort: CohortEngine, task: TaskSpec) -> None:
        self.base = cohort.base
        self._engine: Engine = cohort
        self._task = task

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        return self._tried(lambda: self._engine.train(plans, batches))

    def evaluate(
        self,
        adapter: Adapter,
        delta: Delta,
        batches: Iterable[Batch],
        layers: tuple[Layer, ...] | None = None,
    ) -> Tally:
        """See :class:`fedft.clients.engines.base.Engine`."""
        known = list(batches)
        return self._tried(lambda: self._engine.evaluate(adapter, delta, known, layers))

    def reference(self, batch: Batch) -> Tensor:
        """See :class:`fedft.clients.engines.base.Engine`."""
        return self._tried(lambda: self._engine.reference(batch))

    def bare(self) -> AbstractContextManager[nn.Module]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        return self._engine.bare()

    def _tried(self, work: Callable[[], Result]) -> Result:
        from fedft.clients.engines.loop import PeftEngine  # peft takes a second to import

        try:
            return work()
        except RowsMismatch as error:
            logger.warning("clients are trained one by one from here on: %s", error.what)
            task = self._task
            self._engine = PeftEngine(
                self.base, task.lora, checkpointing=task.gradient_checkpointing
            )
            return work()
