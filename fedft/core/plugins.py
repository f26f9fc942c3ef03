"""What a name in a configuration stands for: one registry a kind, open to other packages.

A name is one of three:

    fedavg-lora                 a row of fedft's own table
    clipped-mean                registered by an installed package, as an entry point of the kind's
                                group (``fedft.strategies``, ``fedft.tasks``, ``fedft.metrics``,
                                ``fedft.methods``, ``fedft.compressors``, ``fedft.meters``,
                                ``fedft.trackers``, ``fedft.trainers``)
    my_package.rules:MyRule     what the module ``my_package.rules`` calls ``MyRule``

Listing names imports nothing, and neither does looking up a name of fedft's own. An entry point is
imported when a run uses it, so one that is broken breaks no other run.

Whoever looks a name up says on whose word code may be imported (:class:`Trust`): a configuration
that the user wrote may name anything, a run directory nothing that the user does not name again, a
server nothing at all. What a process has admitted once stays known to it: importing it a second
time would run nothing new.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Generic, TypeVar, cast

from fedft.core.complaints import shown
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.foreign import definition_of, imported
from fedft.core.names import hint

T = TypeVar("T")

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.([^\W\d]\w*|<locals>))*")


@dataclass(frozen=True, eq=False)
class Trust:
    """On whose word code from outside of fedft is imported.

    Attributes:
        named: ``module:Class`` names that may be imported; None for any.
        installed: whether entry points of installed packages may be.
        given: classes that Python handed over, by ``module:Class``; nothing is imported for them.
    """

    named: frozenset[str] | None = frozenset()
    installed: bool = True
    given: Mapping[str, object] = field(default_factory=dict[str, object])

    def also(self, allowed: Iterable[object]) -> "Trust":
        """The same, and what is named here.

        Args:
            allowed: ``module:Class`` names, or classes, or objects of these classes, or functions.

        Raises:
            ConfigError: a text is no such name.
        """
        members = list(allowed)
        names = [one for one in members if isinstance(one, str)]
        if wrong := [name for name in names if not is_reference(name)]:
            raise ConfigError(
                f"{shown(wrong[0])} is no name of code from outside of fedft",
                fix="Write it as package.module:Class; other names need no permission.",
            )
        given: dict[str, object] = {
            reference_of(one): definition_of(one) for one in members if not isinstance(one, str)
        }
        named = None if self.named is None else self.named | frozenset(names)
        return Trust(named, self.installed, {**self.given, **given})


USER = Trust(None)
"""The user's own word: a configuration, a command line, a call from Python."""

RECORD = Trust()
"""A run directory's word: what the user installed under a plain name, and nothing else."""

REMOTE = Trust(installed=False)
"""A server's word, at a client: nothing but fedft's own."""


_process = RECORD


def trust_process(trust: Trust) -> None:
    """Say once for this process on whose word code is imported where nobody says it.

    It is :data:`RECORD` to begin with. A worker of a simulation is told :data:`USER`, as all that it
    is told comes from the user's own driver; the process of a real client :data:`REMOTE`.
    """
    global _process
    _process = trust


def trusted(context: object) -> Trust:
    """The trust that a validation was given as its context, or else that of the process."""
    return context if isinstance(context, Trust) else _process


@dataclass(frozen=True)
class Member(Generic[T]):
    """What a name stands for.

    Attributes:
        name: to record, so that the same member is found again.
        value: the member.
        distribution: the installed package that registered it; None where it was named otherwise.
    """

    name: str
    value: T
    distribution: str | None = None


class Unfit(Exception):
    """What was found under a name is not of the kind; the message says why, without a subject."""


class Registry(Generic[T]):
    """All members of one kind.

    Args:
        kind: such as ``strategies``; entry points are looked for in the group ``fedft.<kind>``.
        noun: what an error calls a member.
        own: fedft's own members by name.
        accept: makes a member of what was found under a ``module:Class`` name or an entry point.
            Raises :class:`Unfit`.
    """

    def __init__(
        self, kind: str, noun: str, own: Mapping[str, T], accept: Callable[[object], T]
    ) -> None:
        self.kind = kind
        self.group = f"fedft.{kind}"
        self.noun = noun
        self.own = own
        self.accept = accept
        self._known: dict[str, Member[T]] = {}

    def names(self) -> list[str]:
        """Every plain name: fedft's own in their order, then those of installed packages."""
        return [*self.own, *sorted(_entries(self.group).keys() - self.own.keys())]

    def installed(self) -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
        """What installed packages register, by name; more than one where they disagree."""
        return _entries(self.group)

    def known(self, name: str) -> T | None:
        """The member of a name that is fedft's own or was found before; None of any other."""
        found = self._known.get(name)
        return self.own.get(name) if found is None else found.value

    def find(self, name: str, trust: Trust | None = None) -> Member[T]:
        """The member of a name.

        Args:
            name: as a configuration has it.
            trust: what may be imported for it; None for what the process trusts.

        Raises:
            ConfigError: no member has the name, several have, it cannot be imported, or is not of
                the kind. Names that are near are told.
            SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
        """
        if name in self._known:
            return self._known[name]
        trust = trusted(trust)
        if is_reference(name):
            return self._referred(name, trust)
        rivals = self.installed().get(name, ())
        if name in self.own:
            self._check_not_shadowed(name, rivals)
            return Member(name, self.own[name])
        if not rivals:
            if ":" in name:
                raise ConfigError(
                    f"{shown(name)} is no name of a {self.noun}: what stands before the colon is a module, "
                    "what stands behind it a class",
                    fix="Write it as package.module:Class.",
                )
            raise ConfigError(
                f"no {self.noun} is called {shown(name)}", fix=hint(name[:100], self.names())
            )
        return self._registered(name, rivals, trust)

    def distribution(self, name: str) -> str | None:
        """Name and version of the package that registered a member; None of any other."""
        return self._known[name].distribution if name in self._known else None

    def admit(self, value: object) -> Member[T]:
        """A member given as an object from Python; its name finds it again in this process.

        Raises:
            ConfigError: it is not of the kind.
        """
        member = self._fit(value, reference_of(value))
        own = self._own_name(member)
        if own is not None:
            return Member(own, member)
        name = reference_of(value)
        for plain, entries in self.installed().items():
            if plain not in self.own and {entry.value for entry in entries} == {name}:
                name = (
                    plain  # as a configuration would call it, and as it is found without its user
                )
        self._known[name] = Member(name, member)
        return self._known[name]

    def _own_name(self, value: T) -> str | None:
        return next((name for name, one in self.own.items() if one is value), None)

    def _referred(self, name: str, trust: Trust) -> Member[T]:
        for own, value in self.own.items():
            if reference_of(value) == name:
                return Member(own, value)
        if name in trust.given:
            self._known[name] = Member(name, self._fit(trust.given[name], name))
            return self._known[name]
        if trust.named is not None and name not in trust.named:
            raise SecurityRefusal(
                f"the {self.noun} {name} is code from outside of fedft, and is not imported because "
                "a run directory, or a message, names it",
                fix=f"If you trust it, name it again: --allow {name}; from Python, allow=[{name!r}].",
            )
        value = self._fit(imported(name, self.noun), name)
        self._known[name] = Member(name, value)
        return self._known[name]

    def _registered(
        self, name: str, rivals: tuple[metadata.EntryPoint, ...], trust: Trust
    ) -> Member[T]:
        if len({rival.value for rival in rivals}) > 1:
            raise ConfigError(
                f"several installed packages register a {self.noun} called {name!r}: "
                + ", ".join(f"{_package(rival)} ({rival.value})" for rival in rivals),
                fix=f"Name the one that is meant, such as {rivals[0].value}, or uninstall the others.",
            )
        entry = rivals[0]
        if not trust.installed:
            raise SecurityRefusal(
                f"the {self.noun} {name!r} is of the package {_package(entry)}, and is not imported "
                "because a message names it",
                fix="Whoever runs this client can allow it.",
            )
        try:
            value = self._fit(imported(entry.value, self.noun), entry.value)
        except ConfigError as error:
            raise ConfigError(
                f"the {self.noun} {name!r}, which the installed package {_package(entry)} registers: "
                f"{error.what}",
                fix=f"{error.fix} Or uninstall the package.",
            ) from error
        self._known[name] = Member(name, value, _package(entry))
        return self._known[name]

    def _check_not_shadowed(self, name: str, rivals: tuple[metadata.EntryPoint, ...]) -> None:
        if rivals:
            raise ConfigError(
                f"{name!r} is a {self.noun} of fedft, and the installed package "
                f"{_package(rivals[0])} registers another under the same name",
                fix=f"Name the one that is meant as package.module:Class ({rivals[0].value}, or "
                f"fedft's {reference_of(self.own[name])}), or uninstall the package.",
            )

    def _fit(self, found: object, name: str) -> T:
        try:
            return self.accept(found)
        except Unfit as why:
            raise ConfigError(
                f"{name} is no {self.noun}: {why}",
                fix="docs/extending.md says what one has to be.",
            ) from why


def is_reference(name: str) -> bool:
    """Whether a name is of the form ``package.module:Class``."""
    return _REFERENCE.fullmatch(name) is not None


def reference_of(value: object) -> str:
    """``module:Class`` of a class, or of the class of an object; ``module:function`` of a function."""
    found = definition_of(value)
    return f"{found.__module__}:{found.__qualname__}"


def short_name(name: str) -> str:
    """A name as a part of a folder's name: of ``package.module:Class`` the class alone."""
    return re.split(r"[:.]", name)[-1] if ":" in name else name


def subclass_of(base: type[T], how: str) -> Callable[[object], type[T]]:
    """An ``accept`` for kinds whose members are classes.

    Args:
        base: that they derive from.
        how: the class as a reader finds it, for example ``fedft.strategies.Strategy``.
    """

    def accept(found: object) -> type[T]:
        if not isinstance(found, type):
            raise Unfit(f"it is a {type(found).__name__}, not a class derived from {how}")
        if not issubclass(found, base):
            raise Unfit(f"it does not derive from {how}")
        if inspect.isabstract(found):
            missing = sorted(cast(frozenset[str], vars(found)["__abstractmethods__"]))
            raise Unfit(f"it does not define {', '.join(missing)}")
        return found

    return accept


def distribution_of(entry: metadata.EntryPoint) -> str:
    """Name of the installed package that an entry point is of."""
    return "" if entry.dist is None else entry.dist.name


def _package(entry: metadata.EntryPoint) -> str:
    return "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _entries(group: str) -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
    return _entries_on(group, tuple(sys.path))


@lru_cache(maxsize=32)
def _entries_on(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
    """The entry points of a group; ``path`` is what they depend on."""
    del path
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for entry in _readable(group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _readable(group: str) -> list[metadata.EntryPoint]:
    """A package whose list of entry points cannot be read costs only its own."""
    try:
        return list(metadata.entry_points(group=group))
    except Exception:
        found: dict[str, list[metadata.EntryPoint]] = {}
        for distribution in metadata.distributions():
            try:
                # The first one of a name on the path is the one that is imported.
                found.setdefault(
                    distribution.name, list(distribution.entry_points.select(group=group))
                )
            except Exception:
                continue
        return [entry for entries in found.values() for entry in entries]
