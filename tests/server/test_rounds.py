"""Participation and failure: rows 18-24 and 30 of the fault catalogue, on InlineGrid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedft.core import codec
from fedft.core.errors import QuorumFailure
from fedft.core.types import Adapter, Factors, LocalTraining, ServerState, Site, TrainPlan
from server.config import RoundsSpec
from server.grids.inline import Fault, Faults, InlineGrid
from server.rounds import Completed, Federation, grouped, one_round, rounds
from strategies import FedAvgLoRA

CLIENTS = 6


@dataclass(frozen=True)
class Everybody:
    """A roster whose cohort is a rotating window: attempt k takes the next sites."""

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        first = attempt * count
        return [self._site(i % CLIENTS) for i in range(first, first + count)]

    def _site(self, index: int) -> Site:
        return Site(f"site-{index}", examples=10 * (index + 1))

    def node_of(self, site: Site) -> int:
        return int(site.name.removeprefix("site-")) + 1


def initial() -> Adapter:
    return Adapter({"q": Factors(torch.ones(1, 2), torch.zeros(2, 1), 1.0)})


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Site k answers A = k + 1 everywhere, B = k + 1 everywhere."""
    plan = codec.train_plan(message.content, initial(), 0)
    value = float(plan.site.removeprefix("site-")) + 1
    tensors = {name: torch.full_like(t, value) for name, t in plan.sent().items()}
    return Message(codec.reply_content(tensors, int(10 * value), {"loss": value}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    sums = MetricRecord({"num-examples": 4, "loss-sum": 2.0, "correct": 3})
    return Message(RecordDict({"metrics": sums}), reply_to=message)


def federation(
    faults: Sequence[Fault] = (), reorder: int | None = None, **settings: Any
) -> Federation:
    table = {"count": 1, "per-round": 3, "quorum": 2, **settings}
    return Federation(
        strategy=FedAvgLoRA(),
        roster=Everybody(),
        grid=InlineGrid(app, CLIENTS, faults=Faults(tuple(faults), reorder)),
        task="{}",
        training=LocalTraining(),
        settings=RoundsSpec.model_validate(table),
        seed=0,
        kind="classification",
    )


def run(faults: Sequence[Fault] = (), **settings: Any) -> Completed:
    return one_round(federation(faults, **settings), ServerState(initial()))


def value_of(completed: Completed) -> float:
    return float(completed.state.adapter.factors["q"].A[0, 0])


def weighted(*sites: int) -> float:
    """FedAvg by hand: site k answers k + 1 with weight k + 1."""
    return sum((k + 1) ** 2 for k in sites) / sum(k + 1 for k in sites)


def test_an_undisturbed_round() -> None:
    completed = run()
    assert value_of(completed) == pytest.approx(weighted(0, 1, 2))
    assert completed.record["failures"] == {}
    assert completed.record["eval"] == {"loss": 0.5, "accuracy": 0.75}
    assert completed.record["train"]["loss"] == pytest.approx(weighted(0, 1, 2))
    assert completed.record["bytes"] == {"up": 3 * 16, "down": 3 * 16}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("drop", "timeout"), ("raise", "error"), ("kill", "error"), ("nan", "nan")],
)
def test_one_lost_site_costs_its_place_not_the_round(kind: Any, reason: str) -> None:
    completed = run([Fault(kind, node=2, message_type="train")])
    assert completed.record["failures"] == {reason: ["site-1"]}
    assert value_of(completed) == pytest.approx(weighted(0, 2))  # weights are renormalised
    assert completed.record["attempts"] == 1


def test_a_straggler_is_not_aggregated_after_the_deadline() -> None:
    slow = [Fault("delay", node=2, seconds=30, message_type="train")]
    completed = run(slow, **{"deadline-s": 0.2})
    assert completed.record["failures"] == {"timeout": ["site-1"]}
    assert value_of(completed) == pytest.approx(weighted(0, 2))


def test_a_result_that_comes_twice_counts_once() -> None:
    completed = run([Fault("duplicate", node=2, message_type="train")])
    assert value_of(completed) == pytest.approx(weighted(0, 1, 2))
    assert completed.record["bytes"]["up"] == 3 * 16


def test_below_quorum_a_fresh_cohort_is_asked() -> None:
    lost = [Fault("drop", node=n, message_type="train") for n in (1, 2)]
    completed = run(lost)
    assert completed.record["attempts"] == 2
    assert completed.record["cohort"] == ["site-3", "site-4", "site-5"]
    assert completed.record["failures"] == {"timeout": ["site-0", "site-1"]}
    assert value_of(completed) == pytest.approx(weighted(3, 4, 5))


def test_without_quorum_the_run_pauses_and_the_model_is_as_it_was() -> None:
    lost = federation([Fault("raise", message_type="train")], retries=1)
    state = ServerState(initial())
    with pytest.raises(QuorumFailure, match="6 error"):
        list(rounds(lost, state))
    assert state.round == 0


def test_a_lost_slice_of_the_test_set_is_no_score() -> None:
    """A score over seven eighths of the test set would pass for the whole one."""
    with pytest.raises(QuorumFailure, match="slices of the test set"):
        run([Fault("raise", ordinal=1, message_type="evaluate", node=1)])


def test_arrival_order_changes_nothing() -> None:
    digests = set[float]()
    for reorder in (None, 1, 2, 3):
        completed = one_round(federation(reorder=reorder), ServerState(initial()))
        digests.add(value_of(completed))
    assert len(digests) == 1


def plans(count: int, **changes: Any) -> list[TrainPlan]:
    return [TrainPlan(initial(), **changes) for _ in range(count)]


@pytest.mark.parametrize(("count", "size"), [(10, 8), (10, 3), (7, 7), (1, 8), (9, 2)])
def test_passes_are_of_equal_size_and_hold_everybody_once(count: int, size: int) -> None:
    groups = grouped(plans(count), size)
    assert sorted(i for g in groups for i in g) == list(range(count))
    lengths = [len(g) for g in groups]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


def test_plans_of_different_kinds_share_no_pass() -> None:
    mixed = plans(3) + plans(2, train=frozenset({"B"})) + plans(2, layers=(0,))
    assert grouped(mixed, 8) == [[0, 1, 2], [3, 4], [5, 6]]
