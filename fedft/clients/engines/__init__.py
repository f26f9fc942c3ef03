"""How a client's batches become an update: the plain loop, and many clients in one pass.

:data:`ENGINES` says which engine a family of adapters is trained by; plain LoRA has two.
"""

from collections.abc import Callable, Mapping

from fedft.clients.engines.base import Engine
from fedft.core.models import Base
from fedft.core.spec import TaskSpec
from fedft.core.tasks import task_of

Making = Callable[[TaskSpec, Base], Engine]
"""Makes the engine of a task on its loaded base."""


def _lora(task: TaskSpec, base: Base) -> Engine:
    alone = task_of(task.model.task).alone
    if (task.cohort == 1 or not alone) and not task.lean:
        from fedft.clients.engines.loop import PeftEngine

        return PeftEngine(base, task.lora, checkpointing=task.gradient_checkpointing)
    from fedft.clients.engines.cohort import CohortEngine
    from fedft.clients.engines.fallback import Fallback

    cohort = CohortEngine(base, task.lora, checkpointing=task.gradient_checkpointing)
    return cohort if task.lean else Fallback(cohort, task)


def _hydralora(task: TaskSpec, base: Base) -> Engine:
    from fedft.clients.engines.hydra import HydraEngine

    return HydraEngine(base, task.lora, checkpointing=task.gradient_checkpointing)


def _peft(task: TaskSpec, base: Base) -> Engine:
    from fedft.clients.engines.peft_engine import WholeEngine

    return WholeEngine(base, task.lora, task.seed, checkpointing=task.gradient_checkpointing)


ENGINES: Mapping[str, Making] = {"lora": _lora, "hydralora": _hydralora, "peft": _peft}
"""Name of a family in :mod:`fedft.core.adapters` → its engine: a row each."""
