"""Tasks, methods, compressors and trackers: ours keep the laws, and each law has a breaker."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from flwr.app import Array
from torch import Tensor

from fedft import conformance
from fedft.clients.methods import METHODS, Method, Rows
from fedft.conformance import compressors, methods, tasks, trackers
from fedft.conformance.laws import Finding
from fedft.core.metrics import Tally
from fedft.core.tasks import TASKS
from fedft.core.tasks.base import Reduction
from fedft.core.tasks.causal_lm import CausalLM
from fedft.core.tasks.classification import Classification
from fedft.core.terms import CHOICES, Term
from fedft.core.wire.compress import COMPRESSORS, Compressor, Key
from fedft.core.wire.compress.base import finite
from fedft.core.wire.compress.casts import Fp32
from fedft.core.wire.compress.int8 import Int8
from fedft.trackers import TRACKERS, Start, Tracker
from tests.core.tasks.other_tasks import OTHERS
from tests.core.top_k import TopK
from tests.strangers import Lines, Shrink, Shrinking, Softened

HERE = __name__


def broken(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.outcome == "broken"]


@pytest.mark.parametrize("name", [*TASKS, *OTHERS])
def test_tasks_keep_the_laws(name: str) -> None:
    found = list(tasks.examine(name, {**TASKS, **OTHERS}[name]))
    assert not broken(found)
    assert sum(finding.outcome == "held" for finding in found) >= 4


@pytest.mark.parametrize("kind", [*COMPRESSORS, TopK])
def test_compressors_keep_the_laws(kind: type[Compressor]) -> None:
    assert not broken(list(compressors.examine(kind.__name__, kind)))


@pytest.mark.parametrize("kind", [*TRACKERS.values(), Lines])
def test_trackers_keep_the_laws(kind: type[Tracker]) -> None:
    assert not broken(list(trackers.examine(kind.__name__, kind)))


@pytest.mark.parametrize("member", [Softened, Shrinking, Lines])
def test_strangers_are_found_sound(member: type) -> None:
    found = list(conformance.check(f"tests.strangers:{member.__name__}"))
    assert found and {finding.outcome for finding in found} == {"held"}


# ── breakers ──────────────────────────────────────────────────────────────────────────────────


class Forgetful(Classification):
    draws: ClassVar[Any] = itertools.count()

    def encode(self, rows: Any, encoder: Any, max_length: int) -> Any:
        return super().encode(rows.take(torch.randperm(len(rows)).numpy()), encoder, max_length)


class Leaking(CausalLM):
    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(labels.numel()), labels.flatten().clamp_min(0)


class Averaged(Classification):
    def tally(self, outputs: Tensor, targets: Tensor, **where: Any) -> Tally:
        found = super().tally(outputs, targets, **where)
        return Tally(found.loss_sum / found.count, found.count, found.sums)


class Summed(Classification):
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        each = super().loss(outputs, targets, "none")
        return each if reduction == "none" else each.sum()


class Unscored(Classification):
    def scores(self, tally: Tally) -> dict[str, float]:
        return {"loss": float("nan"), "accuracy": 0.5}


class Mixing(Shrinking):
    def correct(self, rows: Rows, count: int) -> None:
        rows.grad[:count] += 0.1 * rows.theta[:count].mean(0)


class Idle(Shrinking):
    def correct(self, rows: Rows, count: int) -> None: ...


class Always(Shrinking):
    """Of whatever strength, but of a client that is asked alone."""

    def __init__(self, rows: Rows, terms: Sequence[Any]) -> None:
        self._asked = torch.tensor([float(term is not None) for term in terms])[:, None]

    def correct(self, rows: Rows, count: int) -> None:
        rows.grad[:count] += 0.1 * self._asked[:count] * rows.theta[:count]


class ByPlace(Shrinking):
    """Counts the clients of a pass, which the plain loop has one of."""

    def correct(self, rows: Rows, count: int) -> None:
        rows.grad[:count] += 0.1 * len(rows.plans) * self._strength[:count] * rows.theta[:count]


class Writing(Shrinking):
    def __init__(self, rows: Rows, terms: Sequence[Any]) -> None:
        super().__init__(rows, terms)
        for tensor in rows.plans[0].start.tensors().values():
            tensor.add_(1)


class Promised(Shrink):
    keeps = frozenset({"own-thing"})


class Silent(Shrinking):
    term = Promised


class Doubling(Fp32):
    def decode(self, array: Array) -> Tensor:
        return 3 * super().decode(array)


class Short(Int8):  # a cast may be framed
    def size(self, shape: Any) -> range:
        return range(1, 2)


class Drawing(Int8):
    name: Literal["drawing"] = "drawing"  # type: ignore[assignment]

    def encode(self, x: Tensor, key: Key) -> Array:
        return super().encode(x, Key(int(torch.randint(1000, ()))))


class Shrunk(Int8):
    def encode(self, x: Tensor, key: Key) -> Array:
        return super().encode(finite(x, key) * 0.9, key)


class Crashing(Int8):
    def decode(self, array: Array) -> Tensor:
        try:
            return super().decode(array)
        except ValueError as error:
            raise ZeroDivisionError from error


class Changing(Lines):
    def round(self, line: Any, replies: Any) -> None:
        line["train"] = {"loss": 0}


class Fresh(Lines):
    def started(self, start: Start) -> None:
        (start.folder / "fresh").mkdir(parents=True)


class Straying(Lines):
    def started(self, start: Start) -> None:
        super().started(start)
        (start.run / "stray.txt").write_text("here")


BREAKERS: Mapping[type, str] = {
    Forgetful: "Every row is an example, the same each time",
    Leaking: "Targets never leave padding",
    Averaged: "Sums over slices add up",
    Summed: "The mean loss is the mean of the losses",
    Unscored: "Every metric is scored, and its sums travel",
    ByPlace: "Both engines agree",
    Mixing: "Clients together train as each alone",
    Idle: "It does something",
    Always: "Strength zero changes no bit",
    Writing: "Plans are left as they are",
    Silent: "Records are what the term says",
    Doubling: "It gives back what it was given",
    Short: "The bytes are those of its size",
    Drawing: "The key is all that it draws from",
    Shrunk: "The mean over keys is what was encoded",
    Crashing: "Damaged bytes are refused, or finite",
    Changing: "It hears a whole run, and writes to no line",
    Fresh: "It goes on after a kill",
    Straying: "Its files are in a folder of its own",
}
ALSO = {"Who is not asked is left alone": Mixing}


@pytest.mark.parametrize("kind", BREAKERS, ids=lambda kind: kind.__name__)
def test_who_breaks_a_law_is_found(kind: type) -> None:
    found = {f.law for f in conformance.check(f"{HERE}:{kind.__name__}") if f.outcome == "broken"}
    assert BREAKERS[kind] in found
    assert {law for law, one in ALSO.items() if one is kind} <= found


def test_every_law_has_a_breaker() -> None:
    every = (*tasks.LAWS, *methods.LAWS, *compressors.LAWS, *trackers.LAWS)
    assert {law.says for law in every} == {*BREAKERS.values(), *ALSO}


class Bare:
    """Has the shape of a method, and no base."""

    term = Shrink

    def gradient(self) -> None: ...
    def correct(self) -> None: ...
    def end(self) -> None: ...


class Named(Term):
    kind: Literal["named"] = "named"


class SaysItsKind(Method):
    term = Named


def test_a_method_of_no_base_and_a_term_with_a_kind_are_told() -> None:
    (finding,) = conformance.check(f"{HERE}:Bare")
    assert finding.outcome == "broken" and "derives from" in finding.law
    with pytest.raises(Exception, match="Named says its kind; leave it out"):
        list(conformance.check(f"{HERE}:SaysItsKind"))


def test_our_own_methods_are_named_by_their_terms() -> None:
    assert set(CHOICES) < {method.term for method in METHODS}
