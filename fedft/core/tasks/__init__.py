"""What can be fine-tuned: a file a task, a row each in :data:`TASKS`, or a class of another package."""

import inspect
from collections.abc import Callable
from typing import cast

from fedft.core.plugins import Registry, Trust, Unfit, subclass_of
from fedft.core.tasks.base import Reduction, Task, rows_of, wide
from fedft.core.tasks.causal_lm import CausalLM
from fedft.core.tasks.classification import Classification
from fedft.core.tasks.columns import Column
from fedft.core.tasks.image_classification import ImageClassification
from fedft.core.tasks.multi_label import MultiLabel
from fedft.core.tasks.regression import Regression
from fedft.core.tasks.rows import RawRows, taken
from fedft.core.tasks.sentence_embeddings import SentenceEmbeddings
from fedft.core.tasks.seq2seq import Seq2Seq
from fedft.core.tasks.text_pair import TextPair
from fedft.core.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        CausalLM(),
        ImageClassification(),
        TextPair(),
        MultiLabel(),
        Regression(),
        TokenClassification(),
        Seq2Seq(),
        SentenceEmbeddings(),
    )
}
"""``[model] task`` → what it means."""

_of_kind = subclass_of(Task, "fedft.core.tasks.Task")


def _accept(found: object) -> Task:
    """The one object of a class, or an object as it is, if it says all that has no default."""
    kind = _of_kind(found if isinstance(found, type) else type(found))
    own = next((task for task in TASKS.values() if type(task) is kind), None)
    if own is not None:
        return own
    wanted = [name for name in inspect.get_annotations(Task) if not hasattr(kind, name)]
    # The name is of the configuration: whoever brings a task is found by another one.
    if missing := sorted(set(wanted) - {"name"}):
        raise Unfit(f"it does not say {', '.join(missing)}")
    if not kind.metrics:
        raise Unfit("its metrics are none, and the first one decides about the best round")
    try:
        return found if isinstance(found, Task) else cast(Callable[[], Task], kind)()
    except Exception as error:
        raise Unfit(f"it cannot be made: {type(error).__name__}: {error}") from error


REGISTRY: Registry[Task] = Registry("tasks", "task", TASKS, _accept)
"""Every task by name."""


def task_of(name: str, trust: Trust | None = None) -> Task:
    """The task of a name.

    Args:
        name: one of ours, a registered one, or ``package.module:Class``.
        trust: what may be imported for it; None for what the process trusts.

    Raises:
        ConfigError: there is none.
        SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
    """
    return REGISTRY.find(name, trust).value


__all__ = [
    "REGISTRY",
    "TASKS",
    "Column",
    "RawRows",
    "Reduction",
    "Task",
    "rows_of",
    "taken",
    "task_of",
    "wide",
]
