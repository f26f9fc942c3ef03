"""What a plan may ask of local training beyond plain steps, and the tensors that this takes.

A term is said in the vocabulary of optimisation (a proximal term, control variates); no rule's name
is on the wire. Beside the adapter it may use named records of tensors, each PEFT name → tensor:

    receives   records that travel down with the plan
    sends      records that travel up with the reply
    keeps      records that stay at the client from one round to the next

:meth:`Term.shapes` says what each record consists of. It is the only place that does: the wire, its
checks, the count of bytes, the checkpoint and a client's own state all go by it.

To add a term, write a class here and add it to :data:`TERMS`; what a client does for it is one file
in ``fedft/clients/methods``. A method of another package brings its own term, see :data:`REGISTRY`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import Field, ValidationError

from fedft.core.complaints import complaints
from fedft.core.errors import ConfigError, MismatchError, SecurityRefusal
from fedft.core.parts import PREFIX
from fedft.core.plugins import Registry, Trust, Unfit
from fedft.core.strict import Table

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""PEFT name → shape of a tensor."""

Way = Literal["receives", "sends", "keeps"]
"""Where a record goes: down, up, or nowhere."""

WAYS: tuple[Way, ...] = ("receives", "sends", "keeps")

RESERVED = frozenset({"arrays", "delta", "config", "metrics"})
"""Names of the records that every message may have; no term's record is called so."""

MOST_TERMS = 16
"""Terms of one plan."""

_T = TypeVar("_T")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


class Term(Table):
    """Base of every term. One of ours gives ``kind`` a literal type and a default.

    Attributes:
        kind: names the term on the wire, such as ``control-variates``. A term from outside leaves it
            as it is: there it is the name of its method, as a configuration has it.
        receives: names of the records that travel down.
        sends: names of those that travel up.
        keeps: names of those that stay at the client. A record may be both sent and kept, and a
            name may travel in both directions; what is kept and what comes down have different names.
    """

    kind: Any = ""  # a str; each of our own has its literal
    receives: ClassVar[frozenset[str]] = frozenset()
    sends: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[frozenset[str]] = frozenset()

    def shapes(self, record: str, start: Shapes, trained: Collection[str]) -> Shapes:
        """What a record consists of. Default: a tensor for each one that trains, of its shape.

        Args:
            record: its name.
            start: the shapes of all tensors of the adapter that the client starts from.
            trained: the names of those that train in this plan.
        """
        return {name: shape for name, shape in start.items() if name in trained}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for record in cls.receives | cls.sends | cls.keeps:
            if record in RESERVED or not _NAME.fullmatch(record):
                raise TypeError(
                    f"{cls.__name__}: {record!r} cannot name a record; take up to 40 small letters, "
                    f"digits and hyphens, and none of {', '.join(sorted(RESERVED))}"
                )
        if both := cls.receives & cls.keeps:
            raise TypeError(
                f"{cls.__name__}: {min(both)!r} is received and kept; give the two different names"
            )

    def named(self, way: Way) -> frozenset[str]:
        """The records that go this way."""
        return {"receives": self.receives, "sends": self.sends, "keeps": self.keeps}[way]


# ── terms with records, which travel as they are ──────────────────────────────────────────────


class ControlVariates(Term):
    """SCAFFOLD: every gradient g of client k is corrected to ``g + c - c_k``.

    c is the server's control variate and c_k the client's own, which becomes the mean of the
    gradients of this round, before the correction. What it changed by travels back.
    """

    kind: Literal["control-variates"] = "control-variates"
    receives = frozenset({"control"})
    sends = frozenset({"control-change"})
    keeps = frozenset({"own-control"})


class Dynamic(Term):
    """FedDyn: adds ``- <lambda_k, theta> + alpha / 2 ||theta - theta_start||^2`` to the loss.

    lambda_k, the gradient at which client k stopped last, becomes ``lambda_k - alpha (theta - theta_start)``.

    Attributes:
        alpha: weight of the penalty.
    """

    kind: Literal["dynamic"] = "dynamic"
    alpha: Annotated[float, Field(ge=0, le=1e30)] = 0.1
    keeps = frozenset({"own-gradient"})


class EffectiveSteps(Term):
    """FedNova: the client says how many times its change has a gradient of full weight in it.

    ``||a||_1``, where the change is ``- lr sum_t a_t g_t`` over the steps t; one number.
    """

    kind: Literal["effective-steps"] = "effective-steps"
    sends = frozenset({"effective-steps"})

    def shapes(self, record: str, start: Shapes, trained: Collection[str]) -> Shapes:
        return {"a": ()}


TERMS: tuple[type[Term], ...] = (ControlVariates, Dynamic, EffectiveSteps)
"""The terms that fedft knows: a row each."""


# ── terms that travel as fields of LocalTraining ──────────────────────────────────────────────


class Proximal(Term):
    """FedProx: adds ``mu / 2 ||theta - theta_start||^2`` to the loss.

    Attributes:
        mu: its weight.
    """

    kind: Literal["proximal"] = "proximal"
    mu: Annotated[float, Field(ge=0, le=1e30)] = 0.01


class Tail(Term):
    """HetLoRA: adds ``strength sum_modules ||B[:, k:]||_F ||A[k:, :]||_F``, k = floor(``keep`` r).

    Attributes:
        strength: lambda.
        keep: gamma, the share of the rank that is not penalised.
    """

    kind: Literal["tail"] = "tail"
    strength: Annotated[float, Field(ge=0, le=1e30)] = 0.01
    keep: Annotated[float, Field(ge=0, le=1)] = 0.99


class DPSGD(Term):
    """DP-SGD: each example's gradient is clipped, and noise is added to their sum.

    Attributes:
        noise: standard deviation of the noise, in units of ``clip``.
        clip: the bound on the norm of one example's gradient.
    """

    kind: Literal["dp-sgd"] = "dp-sgd"
    noise: Annotated[float, Field(gt=0, le=1e30)] = 1.0
    clip: Annotated[float, Field(gt=0, le=1e30)] = 1.0


# ── terms by name ─────────────────────────────────────────────────────────────────────────────


def kind_of(term: type[Term]) -> str:
    """What the class is called on the wire."""
    return str(term.model_fields["kind"].default)


def known(kind: str) -> type[Term]:
    """The class of a kind; of a method from outside, what the process trusts is imported for it.

    Raises:
        MismatchError: there is none, or nobody trusted asked for its code.
    """
    for term in TERMS:
        if kind_of(term) == kind:
            return term
    if kind in REGISTRY.own:
        raise unknown(kind)  # it travels as fields of LocalTraining
    try:
        return term_of(REGISTRY.find(kind).value)
    except SecurityRefusal as error:
        raise MismatchError(
            f"the plan asks for {kind[:80]!r}, which is no term of local training that is known "
            "here; code from outside of fedft is not imported because a message names it",
            fix="Train by another method, or in a simulation.",
        ) from error
    except ConfigError as error:
        raise unknown(kind) from error


CHOICES: tuple[type[Term], ...] = (Proximal, Tail)
"""The terms that `[training] method` may name: they need no part of a rule at the server."""


def _accept(found: object) -> type[Any]:
    """A client method that others bring along: the class that does the work, with its ``term``."""
    if not isinstance(found, type):
        raise Unfit(f"it is a {type(found).__name__}, not a class derived from {_BASE}")
    if lacks := [name for name in ("gradient", "correct", "end") if not hasattr(found, name)]:
        raise Unfit(f"it has no {', '.join(lacks)}: derive it from {_BASE}")
    term = getattr(found, "term", None)
    if not (isinstance(term, type) and issubclass(term, Term)):
        raise Unfit("its term is no class derived from fedft.core.terms.Term")
    if term in (*TERMS, *CHOICES, DPSGD):
        raise Unfit(f"its term is fedft's own {kind_of(term)!r}; give it one of its own")
    if term.model_fields["kind"].annotation is not Any or kind_of(term):
        raise Unfit(f"{term.__name__} says its kind; leave it out: it is the name of the method")
    return found


_BASE = "fedft.clients.methods.Method"

REGISTRY: Registry[type[Any]] = Registry(
    "methods", "client method", {kind_of(term): term for term in CHOICES}, _accept
)
"""What `[training] method` may name: terms of ours, and the methods of others, each with its term.

A rule of another package asks for the term of such a method with its name as the ``kind``.
"""


def term_of(member: type[Any]) -> type[Term]:
    """The term of a member of :data:`REGISTRY`."""
    return member if issubclass(member, Term) else member.term


def choice(name: str, table: Mapping[str, Any], trust: Trust | None = None) -> Term:
    """The term behind `[training] method`, with the table of its own below that.

    Args:
        name: one of ours, a registered one, or ``package.module:Class`` of a method.
        table: its values.
        trust: what may be imported for it; None for what the process trusts.

    Raises:
        ValueError: there is none of this name, or its table is not its own.
        SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
    """
    rules = {kind_of(t): "a rule of [strategy]" for t in TERMS} | {"dp-sgd": "[training] dp"}
    if name in rules:
        able = ", ".join(map(kind_of, CHOICES))
        raise ValueError(f"{name!r} is what {rules[name]} asks for; known: {able}")
    try:
        found = REGISTRY.find(name, trust)
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    term = _filled(found.name, term_of(found.value), table)
    if records := term.receives | term.sends:
        raise ValueError(
            f"{name} needs a rule of [strategy] that asks for it: the records "
            f"{', '.join(sorted(records))} travel"
        )
    return term


def _filled(name: str, term: type[Term], table: Mapping[str, Any]) -> Term:
    try:
        return term.model_validate({**table, "kind": name})
    except ValidationError as error:
        fault = complaints(error)[0]
        where = ".".join(fault.path)
        raise ValueError(f"{name}.{where} = {fault.shown}: {fault.rule}") from error


def unknown(kind: str) -> MismatchError:
    """What to raise where a plan asks for a term of a kind that is not known."""
    return MismatchError(
        f"the plan asks for {kind[:80]!r}, which is no term of local training that is known here",
        fix="Install the version of fedft that the server runs.",
    )


def terms_json(terms: Sequence[Term]) -> list[dict[str, Any]]:
    """The terms as JSON data, for a plan."""
    return [term.model_dump(mode="json") for term in terms]


def terms_from(data: object) -> tuple[Term, ...]:
    """The inverse, of data that may come from anybody.

    Raises:
        MismatchError: they are none, or of a kind that is not known here.
    """
    if not isinstance(data, list) or len(cast(list[object], data)) > MOST_TERMS:
        raise MismatchError(f"the terms of a plan are a list of at most {MOST_TERMS}")
    return tuple(map(_term, cast(list[object], data)))


def _term(data: object) -> Term:
    fields = cast(dict[str, object], data) if isinstance(data, dict) else {}
    kind = fields.get("kind")
    if not isinstance(kind, str):
        raise MismatchError("a term of a plan is a table that says its kind")
    try:
        return known(kind).model_validate(fields)
    except ValidationError as error:
        fault = complaints(error)[0]
        where = ".".join((kind, *fault.path))[:80]
        raise MismatchError(
            f"a term of the plan cannot be used: {where} = {fault.shown}: {fault.rule}"
        ) from error


def records_of(
    terms: Sequence[Term], way: Way, start: Shapes, trained: Collection[str]
) -> dict[str, Shapes]:
    """Every record of some terms that goes one way, and what it consists of.

    Args:
        terms: of one plan.
        way: which records are meant.
        start: the shapes of all tensors of the adapter.
        trained: the names of those that train.

    Raises:
        ValueError: two terms have a record of the same name.
    """
    found: dict[str, Shapes] = {}
    for term in terms:
        for record in sorted(term.named(way)):
            if record in found:
                raise ValueError(f"two terms of one plan both have a record {record!r}")
            found[record] = dict(term.shapes(record, start, trained))
    return found


def entry(record: str, name: str) -> str:
    """The name of one tensor of a record among tensors of other records, ``record/name``.

    So a rule names what it keeps in its slots, and a client's state what it keeps beside its parts
    of the adapter. A PEFT name has a dot before any slash: it is never taken for an entry.
    """
    return f"{record}/{name}"


def is_entry(name: str) -> bool:
    """Whether a name is one that :func:`entry` gives to a tensor of the adapter in some record."""
    record, _, tensor = name.partition("/")
    return bool(_NAME.fullmatch(record)) and tensor.startswith(PREFIX)


def entries(record: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a record under their names among those of others."""
    return {entry(record, name): tensor for name, tensor in tensors.items()}


def taken(record: str, named: Mapping[str, _T]) -> dict[str, _T]:
    """The inverse of :func:`entries`: one record's tensors from among those of others."""
    prefix = entry(record, "")
    return {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
