"""Participation and failure: rows 18-24 and 30 of the fault catalogue, on InlineGrid."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedft.core.digest import state_digest
from fedft.core.errors import ConfigError, QuorumFailure
from fedft.core.tasks import task_of
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    LocalTraining,
    ServerState,
    Site,
    TrainPlan,
)
from fedft.core.wire import codec
from fedft.core.wire.compress import compressor_of
from fedft.server.collect import plain
from fedft.server.collect.plain import received
from fedft.server.config import PruningSpec
from fedft.server.deadline import Pace
from fedft.server.exchange import grouped
from fedft.server.federation import Completed, Federation, Ledger
from fedft.server.grids.inline import Fault, Faults, InlineGrid
from fedft.server.messages import Waiting
from fedft.server.pruning import Pruning
from fedft.server.replies import Intake
from fedft.server.rounds import one_round, opened, rounds
from fedft.server.tables import RoundsSpec
from fedft.server.validation import CHECK_FAILED, PLAN_FAILED
from fedft.strategies import FedAvgLoRA, FedAvgM, Strategy
from fedft.strategies.fedsa_lora import FedSALoRA

CLIENTS = 6


@dataclass(frozen=True)
class Everybody:
    """A roster whose cohort is a rotating window: attempt k takes the next sites."""

    def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
        first = attempt * count
        return [self._site(i % CLIENTS) for i in range(first, first + count)]

    def _site(self, index: int) -> Site:
        return Site(f"site-{index}", examples=10 * (index + 1))

    def ready(self, count: int) -> bool:
        return True

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
    if plan.keep:
        context.state["left"] = ConfigRecord({"round": plan.round})
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
        kind=task_of("classification"),
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


def test_a_round_whose_result_cannot_be_sent_ends_the_run_at_the_last_one() -> None:
    """Sent as infinity it would come back as NaN from every site, and pass for their failure."""
    running_away = replace(federation(count=3), strategy=FedAvgM(lr=1e20))
    following = rounds(running_away, ServerState(initial()))
    last = next(following).state
    told = r"round 2: fedavgm over fedavg-lora made .*lora_A"
    with pytest.raises(ConfigError, match=told) as caught:
        next(following)
    assert last.round == 1
    assert last.adapter.factors["q"].A.isfinite().all()
    assert "max-update-norm" in caught.value.fix
    assert not running_away.grid.wait(["any"], timeout=0), "nothing is left under way"
    steady = replace(federation(count=3), strategy=FedAvgM())
    assert len(list(rounds(steady, ServerState(initial())))) == 3


def test_a_lost_slice_of_the_test_set_is_no_score() -> None:
    """A score over seven eighths of the test set would pass for the whole one."""
    with pytest.raises(QuorumFailure, match="slices of the test set"):
        run([Fault("raise", ordinal=1, message_type="evaluate", node=1)])


def test_a_failed_evaluation_leaves_nothing_under_way() -> None:
    """The sites' own evaluations were asked for with it."""
    lost = federation([Fault("raise", ordinal=1, message_type="evaluate", node=1)])
    with pytest.raises(QuorumFailure, match="slices of the test set"):
        one_round(replace(lost, holdout=True), ServerState(initial()))
    assert not lost.grid.wait(["any"], timeout=0)


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


# --- what goes wrong with one real client is that client's matter ---


class Picky(FedAvgLoRA):
    """A rule that cannot plan for some sites."""

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        if site.name in ("site-1", "site-4"):
            raise KeyError(4)
        return super().plan(state, site)


def test_a_site_that_cannot_be_planned_costs_itself_its_place() -> None:
    completed = one_round(
        replace(federation(), strategy=Picky(), real=True), ServerState(initial())
    )
    assert completed.record["failures"] == {"plan": ["site-1"]}
    assert completed.record["cohort"] == ["site-0", "site-1", "site-2"]
    assert value_of(completed) == pytest.approx(weighted(0, 2))
    [line] = [line for line in completed.replies if line["status"] != "ok"]
    assert (line["site"], line["code"]) == ("site-1", PLAN_FAILED)
    assert "KeyError: 4" in line["reason"]


def test_in_a_simulation_the_same_exception_ends_the_run() -> None:
    """It is a mistake of ours; and the control of the test above."""
    with pytest.raises(ConfigError, match="KeyError: 4"):
        one_round(replace(federation(), strategy=Picky()), ServerState(initial()))


def test_where_nobody_can_be_planned_the_run_pauses() -> None:
    class Useless(FedAvgLoRA):
        def plan(self, state: ServerState, site: Site) -> TrainPlan:
            raise KeyError(4)

    lost = replace(federation(retries=1), strategy=Useless(), real=True)
    with pytest.raises(QuorumFailure, match=r"6 plan; the first: .*KeyError: 4"):
        list(rounds(lost, ServerState(initial())))


@pytest.mark.parametrize("step", ["node_of", "train", "validate"])
def test_nor_one_that_cannot_be_addressed_encoded_or_checked(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(honest: Any, name_of: Any) -> Any:
        def call(*args: Any) -> Any:
            if name_of(*args) == "site-1":
                raise ZeroDivisionError("site-1")
            return honest(*args)

        return call

    if step == "node_of":
        monkeypatch.setattr(
            Everybody, step, breaking(Everybody.node_of, lambda roster, site: site.name)
        )
    elif step == "train":
        honest = codec.Encoder.train
        monkeypatch.setattr(codec.Encoder, step, breaking(honest, lambda encoder, plan: plan.site))
    else:
        broken = breaking(plain.validate, lambda content, plan, site, *_: site.name)
        monkeypatch.setattr(plain, step, broken)
    completed = one_round(replace(federation(), real=True), ServerState(initial()))
    reason = "check" if step == "validate" else "plan"
    assert completed.record["failures"] == {reason: ["site-1"]}
    [line] = [line for line in completed.replies if line["status"] != "ok"]
    assert line["code"] == (CHECK_FAILED if step == "validate" else PLAN_FAILED)
    assert "ZeroDivisionError" in line["reason"]
    assert value_of(completed) == pytest.approx(weighted(0, 2))


def test_a_site_whose_reply_is_no_good_is_told_so() -> None:
    told: list[tuple[str, str]] = []

    class Telling(InlineGrid):
        def refuse(self, message_id: str, reason: str) -> None:
            told.append((message_id, reason))

    faults = Faults((Fault("nan", node=2, message_type="train"),))
    grid = Telling(app, CLIENTS, faults=faults)
    opening = opened(replace(federation(), grid=grid), ServerState(initial()))
    list(received(replace(federation(), grid=grid), opening.sent, opening.ledger))
    bad = [id_ for id_, (site, _) in opening.sent.asked.items() if site.name == "site-1"]
    assert [id_ for id_, _ in told] == bad
    assert told[0][1].startswith("nan: site-1")


def test_whom_a_round_waits_for_is_told() -> None:
    seen: list[Waiting | None] = []
    slow = [Fault("delay", node=2, seconds=30, message_type="train")]
    watched = replace(federation(slow, **{"deadline-s": 1.2, "retries": 1}), watch=seen.append)
    one_round(watched, ServerState(initial()))
    assert seen[-1] is None  # also after a wait that ended with the deadline
    about = [waiting for waiting in seen if waiting is not None]
    assert {(w.what, w.verb, w.wanted) for w in about} == {("round 1", "answered", 3)}
    assert about[-1].missing == ("site-1",) and about[-1].done == 2
    line = about[-1].line(lambda name: "asleep")
    assert "round 1: 2 of 3 answered; waiting for site-1 (asleep), " in line
    assert " s; gives up at " in line


def test_rounds_of_real_clients_have_a_deadline_without_being_told() -> None:
    pace = Pace(flops=1e9, flops_per_s=1e9, bytes_per_s=1000.0, least_s=5.0)
    untold = replace(federation(), pace=pace)
    assert untold.patience_s([(10, 2000), (3, 9000)]) == 5 + 10 + 2  # the slowest of them
    assert untold.patience_s([]) == 5
    told = replace(federation(**{"deadline-s": 7.0}), pace=pace)
    assert told.patience_s([(10, 2000)]) == 7
    assert federation().patience_s([(10, 2000)]) is None  # a simulation waits for all


def test_a_deadline_that_nobody_set_closes_a_round() -> None:
    slow = [Fault("delay", node=2, seconds=60, message_type="train")]
    pace = Pace(flops=0.0, least_s=0.2)
    completed = one_round(replace(federation(slow), pace=pace), ServerState(initial()))
    assert completed.record["failures"] == {"timeout": ["site-1"]}


def test_without_comparisons_other_sites_are_asked_then_the_run_pauses() -> None:
    """Row 71: one cohort that errs is not the end of a run that prunes."""
    asked: list[str] = []

    class Counting(InlineGrid):
        def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
            jobs = list(jobs)
            asked.extend(str(m.metadata.dst_node_id) for job in jobs for m in job)
            return super().push_jobs(jobs)

    faults = Faults((Fault("raise", message_type="evaluate"),))
    pruning = Pruning(PruningSpec(selection="cka"), lambda site: 2, 2, 0)
    lost = replace(
        federation(retries=1), grid=Counting(app, CLIENTS, faults=faults), pruning=pruning
    )
    with pytest.raises(QuorumFailure, match="after 2 attempts"):
        list(rounds(lost, ServerState(initial())))
    assert asked == ["1", "2", "3", "4", "5", "6"]


# --- replies are folded as they come ---


class OneByOne(FedAvgLoRA):
    """The same rule, but it says that it needs every reply."""

    @property
    def uses_mean_only(self) -> bool:
        return False


@pytest.mark.parametrize("wire", ["fp32", "bf16"])  # in which these toy clients answer
def test_folding_replies_as_they_come_gives_the_bits_of_all_of_them(wire: Any) -> None:
    def outcome(rule: Strategy) -> tuple[list[str], list[dict[str, Any]]]:
        federated, _ = watched(reorder=3, strategy=rule, compressor=compressor_of(wire))
        completed = list(rounds(federated, ServerState(initial())))
        lines = [{k: v for k, v in c.record.items() if k != "seconds"} for c in completed]
        return [state_digest(c.state) for c in completed], lines

    assert outcome(FedAvgLoRA()) == outcome(OneByOne())


def alive(rule: Strategy, count: int) -> int:
    """The most replies that live at one time while so many are taken in."""
    living: WeakSet[ClientUpdate] = WeakSet()
    most = 0

    def arriving() -> Iterator[ClientUpdate]:
        nonlocal most
        start = initial()
        for site in range(count):
            tensors = {n: torch.full_like(t, float(site)) for n, t in start.tensors().items()}
            update = ClientUpdate(f"site-{site:03d}", 1, tensors, start)
            living.add(update)
            yield update
            most = max(most, len(living))

    intake = Intake(rule).add(arriving())
    assert len(intake) == count
    return most


def test_a_rule_of_the_mean_holds_no_reply_however_many_come() -> None:
    assert alive(FedAvgLoRA(), 50) <= 2
    assert alive(OneByOne(), 50) == 50


def replies_of(delay_s: float) -> tuple[Generator[ClientUpdate, None, None], Ledger]:
    """The replies of six sites, each alone, of which the third is late."""
    faults = Faults((Fault("delay", node=3, seconds=delay_s),))
    federated = replace(
        federation(),
        grid=InlineGrid(app, CLIENTS, faults=faults),
        settings=RoundsSpec.model_validate({"per-round": CLIENTS, "deadline-s": 5}),
    )
    opening = opened(federated, ServerState(initial()))
    return received(federated, opening.sent, opening.ledger), opening.ledger


def test_a_reply_waits_for_those_before_it() -> None:
    updates, _ = replies_of(0.1)
    assert [update.site for update in updates] == [f"site-{k}" for k in range(CLIENTS)]


def test_a_reply_does_not_wait_for_those_after_it() -> None:
    updates, ledger = replies_of(60)
    assert [next(updates).site for _ in range(2)] == ["site-0", "site-1"]
    assert ledger.failures == {}  # nobody has waited until the deadline
    assert [update.site for update in updates] == ["site-3", "site-4", "site-5"]
    assert ledger.failures == {"timeout": ["site-2"]}


# --- the next round is opened while this one is evaluated ---


class Watched(InlineGrid):
    """Notes which kind of message of which round is pushed, and when a round's scores are in."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log: list[str] = []

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        jobs = list(jobs)
        about = jobs[0][0].metadata
        self.log.append(f"{about.message_type} {about.group_id}")
        return super().push_jobs(jobs)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self.log.append(f"{reply.metadata.message_type} {reply.metadata.group_id} answered")
        return replies


def watched(
    count: int = 3, reorder: int | None = None, **changes: Any
) -> tuple[Federation, list[str]]:
    grid = Watched(app, CLIENTS, faults=Faults(reorder=reorder))
    settings = {"count": count, "per-round": 3, "quorum": 2, "evaluate-every": 1}
    federated = replace(
        federation(), grid=grid, settings=RoundsSpec.model_validate(settings), **changes
    )
    return federated, grid.log


def goes_ahead(log: list[str]) -> bool:
    begins = next(i for i, line in enumerate(log) if line in ("train 2", "evaluate 2"))
    return begins < log.index("evaluate 1 answered")


def test_a_round_is_opened_before_the_last_one_is_evaluated() -> None:
    federated, log = watched()
    everything = list(rounds(federated, ServerState(initial())))
    assert goes_ahead(log)
    assert log.index("evaluate 1") < log.index("train 2")
    assert "train 4" not in log
    assert [completed.state.round for completed in everything] == [1, 2, 3]


def test_going_ahead_changes_nothing() -> None:
    def line(completed: Completed) -> dict[str, Any]:
        return {key: value for key, value in completed.record.items() if key != "seconds"}

    federated, log = watched()
    ahead = list(rounds(federated, ServerState(initial())))
    one_by_one, state = list[Completed](), ServerState(initial())
    for _ in range(3):
        one_by_one.append(one_round(watched()[0], state))
        state = one_by_one[-1].state
    assert goes_ahead(log)
    assert [line(c) for c in ahead] == [line(c) for c in one_by_one]
    assert [c.replies for c in ahead] == [c.replies for c in one_by_one]
    for x, y in zip(ahead, one_by_one, strict=True):
        assert state_digest(x.state) == state_digest(y.state)


class NotThere(Everybody):
    def ready(self, count: int) -> bool:
        return False


class Compared(Pruning):
    def due(self, state: ServerState) -> bool:
        return state.round == 1


class Charged:
    """An account that draws no cohort."""

    poisson = False

    def spend(self, round_: int, cohort: Sequence[Site]) -> None: ...

    def guarantee(self) -> dict[str, Any]:
        return {}

    def of_sites(self, names: Sequence[str]) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    "change",
    [
        {"roster": NotThere()},
        {"privacy": Charged()},
        {"pruning": Compared(PruningSpec(selection="stride"), lambda site: 1, 1, 0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_has_to_wait_for_the_last_round_waits(change: dict[str, Any]) -> None:
    federated, log = watched(**change)
    generator = rounds(federated, ServerState(initial()))
    with suppress(QuorumFailure):  # the toy app cannot compare blocks
        next(generator)
        next(generator)
    assert not goes_ahead(log)


def test_a_run_that_may_end_early_waits_for_its_scores() -> None:
    federated, log = watched()
    settings = federated.settings.model_copy(update={"patience": 5})
    list(rounds(replace(federated, settings=settings), ServerState(initial())))
    assert not goes_ahead(log)


def test_states_of_the_next_round_are_not_in_this_ones_commit() -> None:
    """Sites leave the round's number behind, and some are done before the last evaluation is."""
    federated, log = watched(reorder=1, strategy=FedSALoRA(head="shared"))
    grid = federated.grid
    assert isinstance(grid, Watched)
    for completed in rounds(federated, ServerState(initial())):
        touched = grid.touched_states()
        left = {int(state["left"]["round"]) for state in touched.values() if state}  # type: ignore
        assert left == {completed.state.round}
        grid.states_committed(touched)
    assert goes_ahead(log)


def test_who_stops_asking_leaves_nothing_under_way() -> None:
    federated, log = watched()
    generator = rounds(federated, ServerState(initial()))
    next(generator)
    assert log[-1] != "train 2 answered"
    generator.close()
    assert isinstance(federated.grid, Watched)
    assert not federated.grid.wait(["any"], timeout=0)  # nothing is queued


def test_an_error_of_the_next_round_does_not_cost_this_one() -> None:
    class Failing(Everybody):
        def sample(self, seed: int, round_: int, attempt: int, count: int) -> list[Site]:
            if round_ == 2:
                raise ConfigError("nobody")
            return super().sample(seed, round_, attempt, count)

    federated, _ = watched(roster=Failing())
    generator = rounds(federated, ServerState(initial()))
    assert next(generator).record["eval"] == {"loss": 0.5, "accuracy": 0.75}
    with pytest.raises(ConfigError, match="nobody"):
        next(generator)
