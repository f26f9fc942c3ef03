"""What clients do beside plain steps: one method a file, one row here, or a class of another package."""

from collections.abc import Iterable, Iterator

from fedft.clients.methods.base import Losses, Method, Rows
from fedft.clients.methods.dp_sgd import DPSGD
from fedft.clients.methods.dynamic import Dynamic
from fedft.clients.methods.effective_steps import EffectiveSteps
from fedft.clients.methods.proximal import Proximal
from fedft.clients.methods.scaffold import ControlVariates
from fedft.clients.methods.tail import Tail
from fedft.core import terms
from fedft.core.errors import ConfigError
from fedft.core.terms import Term, kind_of
from fedft.core.types import LocalTraining, TrainPlan

METHODS: tuple[type[Method], ...] = (
    DPSGD,
    ControlVariates,
    Dynamic,
    Tail,
    Proximal,
    EffectiveSteps,
)
"""Every method, in the order in which they correct a gradient."""


def method_of(kind: str) -> type[Method]:
    """The method behind a term's kind; one from outside is known since its term was read.

    Raises:
        MismatchError: none is known here.
    """
    for method in METHODS:
        if kind_of(method.term) == kind:
            return method
    found = None if kind in terms.REGISTRY.own else terms.REGISTRY.known(kind)
    if found is None:
        raise terms.unknown(kind)
    if not issubclass(found, Method):
        raise ConfigError(
            f"the client method {kind} does not derive from fedft.clients.methods.Method",
            fix="docs/extending.md says what one has to be.",
        )
    return found


def terms_of(plan: TrainPlan) -> tuple[Term, ...]:
    """All terms of a plan: those it names, and those that fields of its training stand for."""
    return (*implied(plan.training), *plan.terms)


def implied(training: LocalTraining) -> Iterator[Term]:
    """The terms that have a field of their own on the wire and in the `[training]` table.

    Their values are looked at by the methods, whatever they are: a plan may come from anybody.
    """
    if training.dp_noise:
        yield terms.DPSGD.model_construct(noise=training.dp_noise, clip=training.dp_clip)
    if training.tail_penalty:
        strength, keep = training.tail_penalty, training.tail_keep
        yield terms.Tail.model_construct(strength=strength, keep=keep)
    if training.proximal_mu:
        yield terms.Proximal.model_construct(mu=training.proximal_mu)


def asked(plan: TrainPlan) -> list[type[Method]]:
    """The methods that a plan asks for, in the order in which they correct a gradient.

    Raises:
        MismatchError: of a kind that is not known here.
    """
    return [method_of(kind) for kind in _ordered({term.kind for term in terms_of(plan)})]


def methods(rows: Rows) -> list[Method]:
    """The methods that the plans of some clients ask for, ready for the first step.

    Raises:
        MismatchError: of a kind that is not known here.
        FedftError: a method cannot be run with its values.
    """
    by_client = [{term.kind: term for term in terms_of(plan)} for plan in rows.plans]
    return [
        method_of(kind)(rows, [own.get(kind) for own in by_client])
        for kind in _ordered({kind for own in by_client for kind in own})
    ]


def _ordered(kinds: Iterable[str]) -> list[str]:
    rank = {kind_of(method.term): i for i, method in enumerate(METHODS)}
    return sorted(kinds, key=lambda kind: (rank.get(kind, len(rank)), kind))


__all__ = ["METHODS", "Losses", "Method", "Rows", "asked", "method_of", "methods", "terms_of"]
