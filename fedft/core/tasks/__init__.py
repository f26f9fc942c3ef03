"""What can be fine-tuned: a file a task, a row each in :data:`TASKS`, or a class of another package."""

import inspect
from collections.abc import Callable, Sequence
from typing import cast

from fedft.core.errors import ConfigError
from fedft.core.metrics import METRICS, PER_CLASS, Metric
from fedft.core.metrics import REGISTRY as METRIC_REGISTRY
from fedft.core.names import hint
from fedft.core.plugins import Registry, Trust, Unfit, subclass_of
from fedft.core.tasks.base import Reduction, Task, by_row, log_likelihoods, rows_of, wide
from fedft.core.tasks.causal_lm import CausalLM
from fedft.core.tasks.classification import Classification
from fedft.core.tasks.columns import Column
from fedft.core.tasks.image_classification import ImageClassification
from fedft.core.tasks.multi_label import MultiLabel
from fedft.core.tasks.preference import Preference
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
        Preference(),
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


def judged(
    name: str, metrics: Sequence[str] = (), *, per_class: bool = False, trust: Trust | None = None
) -> Task:
    """The task of a name, judged by what a run is to be judged by.

    Args:
        name: as for :func:`task_of`.
        metrics: names of metrics, the one that decides first; empty for the task's own.
        per_class: whether items are counted by class, too.
        trust: as for :func:`task_of`.

    Raises:
        ConfigError: there is no such metric, it is named twice, or this task cannot have it.
        SecurityRefusal: as for :func:`task_of`.
    """
    task = task_of(name, trust)
    if not metrics and not per_class:
        return task
    found = [_metric_of(task, one, trust) for one in metrics] or list(task.metrics)
    keys = [metric.name for metric in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"the metric {twice!r} is named twice", fix="Name it once.")
    if per_class and not task.can_be_judged_by(PER_CLASS):
        raise ConfigError(
            f"per-class = true counts items by class, and {name} has no class an item",
            fix="Leave it out.",
        )
    return task.with_metrics(found, (PER_CLASS,) if per_class else ())


def _metric_of(task: Task, name: str, trust: Trust | None) -> Metric:
    """A metric of a name: the task's own first."""
    own = {metric.name: metric for metric in task.metrics}
    if name in own:
        return own[name]
    able = [
        *own,
        *(m.name for m in METRICS.values() if m.name not in own and task.can_be_judged_by(m)),
    ]
    try:
        metric = METRIC_REGISTRY.find(name, trust).value
    except ConfigError as error:
        if name in METRIC_REGISTRY.installed() or ":" in name:
            raise
        raise ConfigError(error.what, fix=hint(name[:100], able)) from error
    if task.can_be_judged_by(metric):
        return metric
    raise ConfigError(
        f"the metric {name!r} cannot judge what a model says in {task.name}",
        fix=f"Choose among {', '.join(able)}.",
    )


__all__ = [
    "REGISTRY",
    "TASKS",
    "Column",
    "RawRows",
    "Reduction",
    "Task",
    "by_row",
    "judged",
    "log_likelihoods",
    "rows_of",
    "taken",
    "task_of",
    "wide",
]
