"""The laws of client methods, see :mod:`fedft.conformance.training` for what they train."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fedft.clients.engines.base import Trained
from fedft.clients.methods import Method
from fedft.conformance.laws import Finding, Law, held, require
from fedft.conformance.training import batches, engines, recorded, start
from fedft.core.parts import Part
from fedft.core.terms import REGISTRY, Term, term_of
from fedft.core.types import LocalTraining, TrainPlan

_ALL: frozenset[Part] = frozenset({"A", "B", "head"})
_SGD = LocalTraining(optimizer="sgd", lr=0.05, clip_norm=0.5)
_STEPS = (2, 3, 1)

Kind = type[Any]
"""A method, or the term of one of fedft's own."""


def _term(method: Kind, **values: Any) -> Term:
    name = REGISTRY.admit(method).name
    return term_of(method).model_validate({**values, "kind": name})


def _plans(term: Term) -> list[TrainPlan]:
    """Two clients of unequal rank that are asked for it, and one that is not."""
    asked = [
        recorded(
            TrainPlan(start(r, k), train=_ALL, training=_SGD, terms=(term,), site=f"site-{k}"), k
        )
        for k, r in enumerate((4, 2))
    ]
    return [*asked, TrainPlan(start(4, 9), train=_ALL, training=_SGD, site="site-9")]


def _train(engine: int, plans: list[TrainPlan], first: int = 0) -> list[Trained]:
    work = [batches(n, first + k) for k, n in enumerate(_STEPS[first : first + len(plans)])]
    return list(engines()[engine].train(plans, work))


def _distance(x: Trained, y: Trained) -> float:
    a, b = x.adapter.tensors(), y.adapter.tensors()
    found = [float((a[n] - b[n]).abs().max()) for n in a]
    for record, tensors in x.records.items():
        found += [float((t - y.records[record][n]).abs().max()) for n, t in tensors.items()]
    return max(found)


def both_engines_agree(method: Kind) -> None:
    """With mixed ranks, uneven steps, and a client that is not asked for it."""
    plans = _plans(_term(method))
    for plan, x, y in zip(plans, _train(0, plans), _train(1, plans), strict=True):
        far = _distance(x, y)
        require(far <= 3e-8, f"{plan.site} ends {far:.2g} apart in the two engines")


def together_is_as_alone(method: Kind) -> None:
    """K clients in one pass train as each by itself."""
    plans = _plans(_term(method))
    engine = 0 if method.by_example else 1
    for k, together in enumerate(_train(engine, plans)):
        (alone,) = _train(engine, [plans[k]], k)
        far = _distance(alone, together)
        require(far <= 3e-8, f"{plans[k].site} ends {far:.2g} away from where it ends alone")


def who_is_not_asked_is_left_alone(method: Kind) -> None:
    """A client that is not asked for it trains to the same bits beside one that is."""
    *_, plain = plans = _plans(_term(method))
    engine = 0 if method.by_example else 1
    without = [replace(plan, terms=(), records={}) for plan in plans]
    x, y = (_train(engine, p)[-1].adapter.tensors() for p in (plans, without))
    changed = [name for name in x if not torch.equal(x[name], y[name])]
    require(not changed, f"{plain.site} was not asked, and {', '.join(changed)[:80]} differ")


def it_does_something(method: Kind) -> None:
    """With the defaults of its table."""
    asked, *_ = _plans(_term(method))
    (x,), (y,) = _train(0, [asked]), _train(0, [replace(asked, terms=(), records={})])
    moved = max(
        float((t - y.adapter.tensors()[n]).abs().max()) for n, t in x.adapter.tensors().items()
    )
    require(moved > 0 or bool(x.records), "training with it is training without it")


def strength_zero_changes_no_bit(method: Kind) -> None:
    """``strength = 0`` is as if it had not been asked for."""
    plans = _plans(_term(method, strength=0.0))
    without = [replace(plan, terms=(), records={}) for plan in plans]
    for engine in range(1 if method.by_example else 2):
        for x, y in zip(_train(engine, plans), _train(engine, without), strict=True):
            require(_distance(replace(x, records={}), y) == 0, "strength = 0 changes the training")


def plans_are_left_as_they_are(method: Kind) -> None:
    """Neither the start nor a record of a plan is written to."""
    plan, *_ = _plans(_term(method))
    everything = {"start": plan.start.tensors(), **plan.records}
    before = {r: {n: t.clone() for n, t in own.items()} for r, own in everything.items()}
    _train(0, [plan])
    for record, tensors in everything.items():
        changed = [n for n, t in tensors.items() if not torch.equal(t, before[record][n])]
        require(not changed, f"it wrote to {record}: {', '.join(changed)[:80]}")


def records_are_what_the_term_says(method: Kind) -> None:
    """Names and shapes of what is sent and kept."""
    plan, *_ = _plans(_term(method))
    (found,) = _train(0, [plan])
    wanted = {**plan.schema("sends"), **plan.schema("keeps")}
    shapes = {r: {n: tuple(t.shape) for n, t in own.items()} for r, own in found.records.items()}
    require(
        shapes == {record: dict(own) for record, own in wanted.items()},
        f"it leaves {sorted(shapes)}, and the term says {sorted(wanted)}",
    )


LAWS = (
    Law(
        "Both engines agree",
        both_engines_agree,
        lambda m: not m.by_example and not m.makes_gradient,
    ),
    Law("Clients together train as each alone", together_is_as_alone),
    Law("Who is not asked is left alone", who_is_not_asked_is_left_alone),
    Law("It does something", it_does_something),
    Law(
        "Strength zero changes no bit",
        strength_zero_changes_no_bit,
        lambda m: "strength" in term_of(m).model_fields,
    ),
    Law("Plans are left as they are", plans_are_left_as_they_are),
    Law("Records are what the term says", records_are_what_the_term_says),
)


def examine(name: str, method: Kind) -> Iterator[Finding]:
    """What came of holding a client method, with the defaults of its table, to every law."""
    derived = "It derives from fedft.clients.methods.Method"
    if not issubclass(method, Method):
        yield Finding("methods", name, derived, "broken", f"{method.__name__} does not")
        return
    yield Finding("methods", name, derived, "held")
    yield from held("methods", name, method, LAWS)
