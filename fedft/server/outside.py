"""Code from outside of fedft that a run uses: which it is, and whether it is still the same."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import BaseModel

from fedft.core.foreign import source_of
from fedft.core.meters import REGISTRY as METERS
from fedft.core.metrics import REGISTRY as METRICS
from fedft.core.plugins import Registry
from fedft.core.tasks import REGISTRY as TASKS
from fedft.core.tasks import task_of
from fedft.core.terms import REGISTRY as METHODS
from fedft.core.trainers import REGISTRY as TRAINERS
from fedft.core.wire.compress import REGISTRY as COMPRESSORS
from fedft.server.config import RunConfig
from fedft.strategies import REGISTRY as STRATEGIES
from fedft.strategies import Strategy
from fedft.trackers import REGISTRY as TRACKERS
from fedft.trackers import found

Sources = Mapping[str, Mapping[str, str | None]]
"""Name in the configuration → what :func:`~fedft.core.foreign.source_of` says of it."""


def outside(config: RunConfig) -> Sources:
    """Where each member of a run that is not fedft's own comes from."""
    return {
        name: source_of(member, registry.distribution(name))
        for registry, name, member in _members(config)
        if name not in registry.own
    }


def _members(config: RunConfig) -> Iterator[tuple[Registry[Any], str, object]]:
    """Everything that a configuration names, with where it is found: a row each kind."""
    for rule in _rules(config.strategy):
        yield STRATEGIES, rule.name, rule
    for name, meter in zip(config.evaluation.meters, config.evaluation.kinds, strict=True):
        yield METERS, name, meter
    for name in config.evaluation.judges(config.model.task):
        if (metric := METRICS.known(name)) is not None:  # others are the task's own
            yield METRICS, name, metric
    yield TASKS, config.model.task, task_of(config.model.task)
    for term in config.training.terms():
        yield METHODS, term.kind, METHODS.find(term.kind).value
    if (trainer := config.training.trainer) is not None:
        yield TRAINERS, trainer, TRAINERS.find(trainer).value
    for name in config.track.trackers:
        yield TRACKERS, name, found(name)
    compressor = config.engine.compressor
    yield COMPRESSORS, COMPRESSORS.admit(type(compressor)).name, compressor


def _rules(rule: Strategy) -> Iterator[Strategy]:
    """A rule and those inside of it."""
    yield rule
    for value in dict(cast(BaseModel, rule)).values():
        if isinstance(value, Strategy):
            yield from _rules(value)


def changes(recorded: Any, config: RunConfig) -> Iterator[str]:
    """A sentence for each member that is not what it was when the run started.

    Args:
        recorded: what :func:`outside` said then, as it was read from the run directory.
        config: of the run.
    """
    then = cast(Mapping[str, Any], recorded) if isinstance(recorded, Mapping) else {}
    for name, now in outside(config).items():
        before = then.get(name)
        if not isinstance(before, Mapping) or dict(cast(Mapping[str, Any], before)) == now:
            continue
        was, package = str(before.get("package")), str(now["package"])
        what = (
            f"of {was} and is of {package}"
            if was != package
            else "other code under the same version"
        )
        yield f"{name} was {what}: the rest of this run is not bit-exact"
