"""The laws of every kind of member, for anybody's members: ``fedft check-plugin`` runs them.

One home for each law: the tables of our own members in ``tests/`` call the same functions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedft.conformance import compressors, meters, methods, metrics, rules, tasks, trackers
from fedft.conformance.laws import Broken, Finding, Law, first_line, require
from fedft.core.errors import ConfigError
from fedft.core.foreign import imported
from fedft.core.meters import REGISTRY as METERS
from fedft.core.metrics import REGISTRY as METRICS
from fedft.core.names import hint
from fedft.core.plugins import USER, Registry, Unfit, distribution_of, is_reference
from fedft.core.tasks import REGISTRY as TASKS
from fedft.core.terms import REGISTRY as METHODS
from fedft.core.wire.compress import REGISTRY as COMPRESSORS
from fedft.strategies import REGISTRY as STRATEGIES
from fedft.trackers import REGISTRY as TRACKERS


@dataclass(frozen=True)
class Kind:
    """One kind of member.

    Attributes:
        registry: where its members are found by name.
        examine: holds one member, given its name, to the kind's laws.
    """

    registry: Registry[Any]
    examine: Callable[[str, Any], Iterator[Finding]]


KINDS: Sequence[Kind] = (
    Kind(STRATEGIES, rules.examine),
    Kind(METERS, meters.examine),
    Kind(TASKS, tasks.examine),
    Kind(METRICS, metrics.examine),
    Kind(METHODS, methods.examine),
    Kind(COMPRESSORS, compressors.examine),
    Kind(TRACKERS, trackers.examine),
)
"""The kinds that a package can add to: a row each."""


def check(package: str) -> Iterator[Finding]:
    """Hold everything that a package registers to the laws of its kind.

    Args:
        package: name of an installed package, as pip or as Python calls it; or one member,
            ``package.module:Class``.

    Raises:
        ConfigError: no installed package registers anything under this name, or no kind takes the
            member.
    """
    if is_reference(package):
        yield from _one(package)
        return
    found = False
    for kind in KINDS:
        for name in _registered_by(kind.registry, package):
            found = True
            try:
                member = kind.registry.find(name, USER)
            except ConfigError as error:
                said = f"{error.what}; {error.fix}"
                yield Finding(kind.registry.kind, name, "It can be found", "broken", said)
                continue
            yield Finding(kind.registry.kind, name, "It can be found", "held")
            yield from kind.examine(name, member.value)
    if not found:
        packages = sorted({p for kind in KINDS for p in _packages(kind.registry)})
        groups = ", ".join(kind.registry.group for kind in KINDS)
        near = f"; {hint(package, packages)}" if packages else ""
        raise ConfigError(
            f"no installed package {package!r} registers anything of fedft's{near}",
            fix=f"Give the package entry points ({groups}) and install it, or name one class as "
            "package.module:Class. See docs/extending.md.",
        )


def _one(reference: str) -> Iterator[Finding]:
    """The laws of the first kind that takes what a name leads to."""
    value = imported(reference, "member")
    reasons: list[str] = []
    for kind in KINDS:
        try:
            member = kind.registry.accept(value)
        except (Unfit, ConfigError) as why:
            reasons.append(f"no {kind.registry.noun}, as {str(why).splitlines()[0]}")
            continue
        yield from kind.examine(reference, member)
        return
    raise ConfigError(
        f"{reference} is of no kind that can be checked: {'; '.join(reasons)}",
        fix="docs/extending.md says what each kind has to be.",
    )


def _registered_by(registry: Registry[Any], package: str) -> list[str]:
    """The names that a package registers in one registry."""
    wanted = _normal(package)
    return [
        name
        for name, entries in sorted(registry.installed().items())
        if any(
            wanted in (_normal(distribution_of(entry)), _normal(entry.value.split(":")[0]))
            or _normal(entry.value).startswith((f"{wanted}.", f"{wanted}:"))
            for entry in entries
        )
    ]


def _packages(registry: Registry[Any]) -> set[str]:
    return {distribution_of(e) for entries in registry.installed().values() for e in entries}


def _normal(name: str) -> str:
    return name.casefold().replace("-", "_")


__all__ = ["KINDS", "Broken", "Finding", "Kind", "Law", "check", "first_line", "require"]
