"""What can be fine-tuned: a file a task, a row each in :data:`TASKS`."""

from fedft.core.errors import ConfigError
from fedft.core.names import hint
from fedft.core.tasks.base import Reduction, Task, wide
from fedft.core.tasks.causal_lm import CausalLM
from fedft.core.tasks.classification import Classification
from fedft.core.tasks.columns import Column
from fedft.core.tasks.image_classification import ImageClassification
from fedft.core.tasks.rows import RawRows, taken
from fedft.core.tasks.text_pair import TextPair

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        CausalLM(),
        ImageClassification(),
        TextPair(),
    )
}
"""``[model] task`` → what it means."""


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(
            f"[model] task = {name[:80]!r}: no task is called that", fix=hint(name[:80], TASKS)
        )
    return TASKS[name]


__all__ = [
    "TASKS",
    "Column",
    "RawRows",
    "Reduction",
    "Task",
    "taken",
    "task_of",
    "wide",
]
