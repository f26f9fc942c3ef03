"""`[evaluation]`: what a run is measured and judged by."""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, PositiveInt, ValidationInfo

from fedft.core.errors import ConfigError
from fedft.core.meters import DEFAULT, REGISTRY, Meter, chosen
from fedft.core.metrics import REGISTRY as METRIC_REGISTRY
from fedft.core.metrics import Metric
from fedft.core.plugins import trusted
from fedft.core.spec import NEW_TOKENS, Table
from fedft.core.tasks import Task, judged, task_of


def _named(given: Any) -> Any:
    """Meters that Python gave as classes, by the names that find them again."""
    if not isinstance(given, list | tuple):
        return given
    items = cast(Sequence[object], given)
    return [REGISTRY.admit(item).name if isinstance(item, type) else item for item in items]


def _metric_name(given: object) -> object:
    """A metric that Python gave as a class or an object, by the name that finds it again."""
    if isinstance(given, Metric) or (isinstance(given, type) and issubclass(given, Metric)):
        try:
            return METRIC_REGISTRY.admit(given).name
        except ConfigError as error:
            raise ValueError(f"{error.what}; {error.fix}") from error
    return given


def _metric_names(given: Any) -> Any:
    if not isinstance(given, list | tuple):
        return given
    return [_metric_name(item) for item in cast(Sequence[object], given)]


def _admitted(name: str | None, info: ValidationInfo) -> str | None:
    """A metric from outside, imported on the word of whoever names it; the task may have others."""
    if name is not None and (":" in name or name in METRIC_REGISTRY.installed()):
        try:
            return METRIC_REGISTRY.find(name, trusted(info.context)).name
        except ConfigError as error:
            raise ValueError(f"{error.what}; {error.fix}") from error
    return name


def _all_admitted(names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
    for name in names or ():
        _admitted(name, info)
    return names


def _known(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    try:
        chosen(names, trusted(info.context))
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    return names


class EvaluationSpec(Table):
    """`[evaluation]`: what every round is measured and judged by. No model differs for it.

    Attributes:
        metrics: names of what the model is judged by, see :data:`fedft.core.metrics.METRICS`, registered
            ones, or ``package.module:Class``; from Python also classes and objects. The first one
            decides which round is the best, unless ``best`` says another. Absent, those of the task.
        best: name of the metric that decides which round is the best and when patience is over, and
            that runs are compared by. It is measured where ``metrics`` does not name it.
        per_class: count the test set's items by class: a table of precision, recall, F1 and support,
            and the confusion matrix, in the record and the report.
        max_rows: score on a fixed sample of the test set of so many rows, drawn by seed, of every class
            its share. Absent, on all of it.
        before: score the model before the first round, too.
        meters: names of meters, see :data:`fedft.core.meters.METERS`, registered ones, or
            ``package.module:Class``; from Python also the classes. An empty list measures nothing.
            ``spectrum`` is also asked for by ``[rounds] spectrum = true``.
        max_new_tokens: of a text that is generated, where a metric judges texts: at most so many, the
            likeliest each time, until the model ends the text.
    """

    meters: Annotated[tuple[str, ...], BeforeValidator(_named), AfterValidator(_known)] = DEFAULT
    max_new_tokens: PositiveInt = NEW_TOKENS
    metrics: Annotated[
        tuple[str, ...] | None, BeforeValidator(_metric_names), AfterValidator(_all_admitted)
    ] = None
    best: Annotated[str | None, BeforeValidator(_metric_name), AfterValidator(_admitted)] = None
    per_class: bool = False
    max_rows: PositiveInt | None = None
    before: bool = False

    def judges(self, task: str) -> tuple[str, ...]:
        """Names of what a run of this task is judged by, the one that decides first.

        Empty where that is what the task says itself.
        """
        own = [metric.name for metric in task_of(task).metrics]
        names = list(own if self.metrics is None else self.metrics)
        if self.best is not None:
            names = [self.best, *(name for name in names if name != self.best)]
        return () if names == own else tuple(names)

    def judged(self, task: str) -> Task:
        """The task, judged by what is asked for.

        Raises:
            ConfigError: there is no such metric, or the task cannot have it.
        """
        if self.metrics is not None and not self.metrics:
            raise ConfigError(
                "metrics = [] names none, and the first one decides about the best round",
                fix="Name one, or leave the key out for those of the task.",
            )
        return judged(task, self.judges(task), per_class=self.per_class)

    @property
    def kinds(self) -> tuple[type[Meter], ...]:
        """The meters, in the order given."""
        return chosen(self.meters)

    def described(self) -> dict[str, Any]:
        """How meters that reports may not know are drawn, for ``environment.json``; empty of none."""
        later = [kind for kind in self.kinds if not kind.top]
        rows = [{"key": kind.key, "plots": [p.to_json() for p in kind.plots]} for kind in later]
        return {"meters": rows} if rows else {}
