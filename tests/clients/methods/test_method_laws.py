"""The laws that every client method keeps, as one table. A new method is a file and a row here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedft.clients.engines.base import Trained
from fedft.clients.methods import METHODS, Losses, Method, Rows, method_of, methods
from fedft.conformance.training import batches, engines, recorded, start
from fedft.core import terms
from fedft.core.errors import MismatchError
from fedft.core.parts import Part
from fedft.core.terms import Term, kind_of
from fedft.core.types import LocalTraining, TrainPlan

SGD = LocalTraining(optimizer="sgd", lr=0.05, clip_norm=0.5)
ADAMW = LocalTraining(lr=5e-3, weight_decay=0.1)
ALL: frozenset[Part] = frozenset({"A", "B", "head"})


@dataclass(frozen=True)
class Row:
    """One method under test.

    Attributes:
        training, terms: what asks for it; ``none`` asks for it at strength zero, where it has one.
        cohort: whether the cohort engine runs it.
    """

    training: Mapping[str, float] | None = None
    terms: tuple[Term, ...] = ()
    none: tuple[Term, ...] | None = None
    cohort: bool = True


TABLE: dict[type[Method], Row] = {
    method_of("proximal"): Row({"proximal_mu": 0.3}),
    method_of("tail"): Row({"tail_penalty": 0.2, "tail_keep": 0.5}),
    method_of("dp-sgd"): Row({"dp_noise": 1e-12, "dp_clip": 0.1}, cohort=False),
    method_of("control-variates"): Row(
        terms=(terms.ControlVariates(),), none=(terms.ControlVariates(),)
    ),
    method_of("dynamic"): Row(terms=(terms.Dynamic(alpha=0.3),), none=(terms.Dynamic(alpha=0.0),)),
    method_of("effective-steps"): Row(
        terms=(terms.EffectiveSteps(),), none=(terms.EffectiveSteps(),)
    ),
}
rows = pytest.mark.parametrize("row", TABLE.values(), ids=[kind_of(m.term) for m in TABLE])
in_cohorts = pytest.mark.parametrize(
    "row",
    [r for r in TABLE.values() if r.cohort],
    ids=[kind_of(m.term) for m, r in TABLE.items() if r.cohort],
)


def plans(row: Row, training: LocalTraining, ranks: Sequence[int] = (4, 2, 3)) -> list[TrainPlan]:
    """Clients of mixed ranks that are asked for the method, and one that is not."""
    fields: Any = row.training or {}
    own = replace(training, **fields)
    asked = [
        recorded(
            TrainPlan(start(rank, k), train=ALL, training=own, terms=row.terms, site=f"site-{k}"), k
        )
        for k, rank in enumerate(ranks)
    ]
    return [*asked, TrainPlan(start(4, 9), train=ALL, training=training, site="site-9")]


def difference(x: Trained, y: Trained) -> float:
    """Largest difference of any tensor, record or metric."""
    assert x.metrics.keys() == y.metrics.keys()
    assert x.records.keys() == y.records.keys()
    a, b = x.adapter.tensors(), y.adapter.tensors()
    found = [float((a[n] - b[n]).abs().max()) for n in a]
    found += [abs(x.metrics[m] - y.metrics[m]) for m in x.metrics]
    for record, tensors in x.records.items():
        assert tensors.keys() == y.records[record].keys()
        found += [float((t - y.records[record][n]).abs().max()) for n, t in tensors.items()]
    return max(found)


def test_every_method_has_a_row() -> None:
    assert set(TABLE) == set(METHODS)
    assert len({kind_of(m.term) for m in METHODS}) == len(METHODS)


@in_cohorts
@pytest.mark.parametrize("training", [SGD, replace(SGD, momentum=0.9), ADAMW])
def test_both_engines_agree(row: Row, training: LocalTraining) -> None:
    """With mixed ranks, uneven steps, a client without any, and one that is not asked for it."""
    loop, cohort = engines()
    own, work = plans(row, training), [batches(n, n) for n in (2, 3, 0, 1)]
    for x, y in zip(loop.train(own, work), cohort.train(own, work), strict=True):
        assert difference(x, y) <= 3e-8  # records are float32
        assert all(
            float((t - y.adapter.tensors()[n]).abs().max()) <= 1e-10
            for n, t in x.adapter.tensors().items()
        )


@rows
def test_it_does_something(row: Row) -> None:
    """The control of the two laws around it."""
    loop, _ = engines()
    (own, *_), work = plans(row, SGD), [batches(3, 1)]
    plain = replace(own, training=SGD, terms=(), records={})
    (x,), (y,) = loop.train([own], work), loop.train([plain], work)
    moved = max(
        float((t - y.adapter.tensors()[n]).abs().max()) for n, t in x.adapter.tensors().items()
    )
    assert moved > 1e-6 or x.records


@pytest.mark.parametrize("engine", [0, 1], ids=["loop", "cohort"])
@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "row",
    [r for r in TABLE.values() if r.none],
    ids=[kind_of(m.term) for m, r in TABLE.items() if r.none],
)
def test_strength_zero_changes_no_bit(row: Row, training: LocalTraining, engine: int) -> None:
    """A term that corrects by nothing, with records of zeros or without any yet, beside no term."""
    asked = plans(replace(row, terms=row.none or ()), training)
    empty = [replace(p, records={}) for p in asked]
    zeros = [
        replace(p, records={r: {n: t * 0 for n, t in own.items()} for r, own in p.records.items()})
        for p in asked
    ]
    plain = [replace(p, terms=(), records={}) for p in asked]
    work = [batches(n, n) for n in (2, 3, 1, 2)]
    expected = engines()[engine].train(plain, work)
    for same in (empty, zeros):
        for x, y in zip(engines()[engine].train(same, work), expected, strict=True):
            assert x.metrics == y.metrics
            for name, tensor in x.adapter.tensors().items():
                assert torch.equal(tensor, y.adapter.tensors()[name]), name


@in_cohorts
def test_together_is_as_alone(row: Row) -> None:
    _, cohort = engines()
    own, work = plans(row, SGD), [batches(n, n) for n in (2, 3, 1, 2)]
    for plan, mine, together in zip(own, work, cohort.train(own, work), strict=True):
        (alone,) = cohort.train([plan], [mine])
        assert difference(alone, together) <= 3e-8


@rows
def test_records_are_what_the_terms_say(row: Row) -> None:
    """Names and shapes, in both engines, at every rank, where blocks are left out and A is frozen."""
    half = recorded(
        TrainPlan(
            start(3, 5, modules=("layer.1",)),
            train=frozenset({"B", "head"}),
            training=replace(SGD, **(row.training or {})),  # type: ignore[arg-type]
            terms=row.terms,
            layers=(1,),
            site="half",
        ),
        5,
    )
    for engine in engines()[: 1 + row.cohort]:
        own = [*plans(row, SGD), half]
        trained = engine.train(own, [batches(2, k) for k in range(len(own))])
        for plan, found in zip(own, trained, strict=True):
            wanted = {**plan.schema("sends"), **plan.schema("keeps")}
            shapes = {
                r: {n: tuple(t.shape) for n, t in record.items()}
                for r, record in found.records.items()
            }
            assert shapes == {record: dict(own) for record, own in wanted.items()}
            every = [t for record in found.records.values() for t in record.values()]
            assert all(t.dtype == torch.float32 and t.is_contiguous() for t in every)


@rows
def test_a_plan_and_its_records_are_left_as_they_are(row: Row) -> None:
    (plan, *_) = plans(row, SGD)
    before = {r: {n: t.clone() for n, t in own.items()} for r, own in plan.records.items()}
    for engine in engines()[: 1 + row.cohort]:
        engine.train([plan], [batches(2, 1)])
    for record, tensors in before.items():
        assert all(torch.equal(t, plan.records[record][n]) for n, t in tensors.items())


def test_a_kind_that_is_not_known_is_refused_by_name() -> None:
    class Strange(Term):
        kind: Any = "strange"

    plan = TrainPlan(start(3, 0), training=SGD, terms=(Strange(),))
    for engine in engines():
        with pytest.raises(MismatchError, match="'strange'"):
            engine.train([plan], [batches(1, 0)])


# ── a method that takes the place of the backward pass ────────────────────────────────────────


class TwoPoints(Method):
    """A gradient from two losses along one direction, as zeroth-order methods take it."""

    class Term(Term):
        kind: Any = "two-points"

    term = Term
    makes_gradient = True
    EPS = 1e-4

    def __init__(self, rows: Rows, terms: Sequence[Any]) -> None:
        self._z = torch.cos(torch.arange(rows.theta.shape[1], dtype=rows.theta.dtype))

    def gradient(self, rows: Rows, losses: Losses) -> bool:
        start = rows.theta.clone()
        rows.theta.add_(self._z, alpha=self.EPS)
        above = losses.mean()
        rows.theta.copy_(start).sub_(self._z, alpha=self.EPS)
        below = losses.mean()
        rows.theta.copy_(start)
        rows.grad[: len(above)] = ((above - below) / (2 * self.EPS))[:, None] * self._z
        return True


@pytest.fixture
def two_points(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedft.clients.methods as known

    monkeypatch.setattr(known, "METHODS", (TwoPoints, *METHODS))


@pytest.mark.usefixtures("two_points")
def test_a_method_can_make_the_gradient_itself() -> None:
    """In both engines, beside a client that takes its backward pass; and it is the derivative."""
    loop, cohort = engines()
    training = replace(SGD, clip_norm=None, lr=1.0)
    asked = TrainPlan(start(4, 0), train=frozenset({"B"}), training=training, site="zo")
    asked = replace(asked, terms=(TwoPoints.Term(),))
    plain = replace(asked, terms=(), site="plain")
    work = [batches(1, 3), batches(1, 3)]
    (x, x_plain), (y, y_plain) = (e.train([asked, plain], work) for e in (loop, cohort))

    def change(of: Trained) -> Tensor:
        before = asked.start.tensors({"B"})
        return torch.cat([(t - before[n]).flatten() for n, t in of.adapter.tensors({"B"}).items()])

    z = torch.cos(torch.arange(change(x).numel(), dtype=torch.float64))
    assert torch.allclose(change(x), (change(x_plain) @ z) * z, atol=1e-6)
    assert float(change(x).norm()) > 1e-3
    # In the cohort B lies transposed, so that the direction is another one; the size is its own.
    assert torch.allclose(change(x_plain), change(y_plain), atol=1e-10)
    assert float(change(y).norm()) > 1e-3
    for one in (x, y):
        assert one.metrics["loss"] == pytest.approx(x_plain.metrics["loss"], abs=1e-2)


def test_methods_come_in_the_order_of_the_table() -> None:
    class Nothing:
        plans = (TrainPlan(start(2, 0), training=replace(SGD, proximal_mu=0.1, tail_penalty=0.1)),)
        theta = grad = torch.zeros(1, 3)

    found = methods(Nothing())  # type: ignore[arg-type]
    assert [kind_of(type(m).term) for m in found] == ["tail", "proximal"]
