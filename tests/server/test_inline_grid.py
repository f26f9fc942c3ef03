"""The inline grid: what all simulation grids promise, and the faults it can inject."""

import itertools
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedft.core.errors import ConfigError
from fedft.server.grids.flower import APP_CRASHED, APP_RAISED, NODE_UNAVAILABLE
from fedft.server.grids.inline import Fault, Faults, InlineGrid
from fedft.server.grids.serve import resolve


def echo(message: Message, context: Context) -> Message:
    """Counts its calls in the node's state and sends back what it was sent."""
    calls = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1  # type: ignore
    context.state["calls"] = ConfigRecord({"n": calls})
    content = RecordDict(dict(message.content.items()))
    content["about"] = MetricRecord({"node": context.node_id, "calls": calls})
    return Message(content, reply_to=message)


def stateless(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def request(node: int, kind: str = "train", round_: int = 1, **records: Any) -> Message:
    return Message(RecordDict(dict(records)), node, kind, group_id=str(round_))


def pull_all(grid: InlineGrid, ids: list[str], pulls: int = 50) -> list[Message]:
    return list(itertools.chain.from_iterable(grid.pull_messages(ids) for _ in range(pulls)))


def nodes_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def about(reply: Message) -> MetricRecord:
    return reply.content.metric_records["about"]


# --- messages and jobs ---


def test_a_node_sees_its_partition_and_the_run_config() -> None:
    seen: list[Context] = []

    def app(message: Message, context: Context) -> Message:
        seen.append(context)
        return stateless(message, context)

    with InlineGrid(app, 5, {"lr": 0.1}) as grid:
        grid.send_and_receive([request(4)])
    assert seen[0].node_id == 4
    assert seen[0].node_config == {"partition-id": 3, "num-partitions": 5}
    assert seen[0].run_config == {"lr": 0.1}


def test_one_job_runs_a_pull_and_each_reply_comes_once() -> None:
    with InlineGrid(stateless, 9) as grid:
        ids = grid.push_jobs([[request(1), request(2)], [request(3)]])
        assert nodes_of(grid.pull_messages(ids)) == [1, 2]
        assert nodes_of(grid.pull_messages(ids)) == [3]
        assert grid.pull_messages(ids) == []


def test_only_what_was_asked_for_is_given_and_the_rest_is_kept() -> None:
    with InlineGrid(stateless, 9) as grid:
        first, second = grid.push_messages([request(1), request(2)])
        assert pull_all(grid, [second])[0].metadata.reply_to_message_id == second
        assert grid.pull_messages([first])[0].metadata.reply_to_message_id == first


def test_send_and_receive_answers_in_the_order_of_the_messages() -> None:
    with InlineGrid(stateless, 9, faults=Faults(reorder=3)) as grid:
        replies = grid.send_and_receive([request(n) for n in range(1, 10)])
    assert nodes_of(replies) == list(range(1, 10))


def test_wait_ends_when_no_reply_can_come() -> None:
    with InlineGrid(stateless, 9) as grid:
        ids = grid.push_messages([request(1)])
        assert grid.wait(ids)
        grid.pull_messages(ids)
        assert not grid.wait(ids)


def test_a_client_that_raises_gives_an_error_reply_and_keeps_its_old_state() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["half"] = ConfigRecord({"done": True})
        raise KeyError("no such column")

    with InlineGrid(app, 2) as grid:
        (reply,) = grid.send_and_receive([request(2)])
        assert reply.error.code == APP_RAISED
        assert "KeyError: 'no such column' (test_inline_grid.py:" in str(reply.error.reason)
        assert reply.metadata.src_node_id == 2
        assert dict(grid.states) == {}


@pytest.mark.parametrize("leave", [SystemExit(3), ValueError("x" * 5000)])
def test_neither_exit_nor_a_long_message_reaches_the_server(leave: BaseException) -> None:
    def app(message: Message, context: Context) -> Message:
        raise leave

    with InlineGrid(app, 1) as grid:
        (reply,) = grid.send_and_receive([request(1)])
    assert reply.error.code == APP_RAISED
    assert len(str(reply.error.reason)) <= 1000


@pytest.mark.parametrize("wrong", [None, "done", Message])
def test_what_is_no_reply_becomes_an_error_reply(wrong: Any) -> None:
    def app(message: Message, context: Context) -> Any:
        return request(1) if wrong is Message else wrong

    with InlineGrid(app, 1) as grid:
        (reply,) = grid.send_and_receive([request(1)])
    assert reply.error.code == APP_RAISED


def test_a_message_to_a_node_that_is_not_there_is_answered_with_an_error() -> None:
    with InlineGrid(stateless, 3) as grid:
        replies = grid.send_and_receive([request(3), request(4)])
    assert replies[0].has_content()
    assert replies[1].error.code == NODE_UNAVAILABLE


def test_a_cohort_with_a_node_twice_and_a_message_sent_twice_are_refused() -> None:
    with InlineGrid(stateless, 3) as grid:
        with pytest.raises(ValueError, match="each node once"):
            grid.push_jobs([[request(1), request(1)]])
        message = request(1)
        with pytest.raises(ValueError, match="already under way"):
            grid.push_messages([message, message])
        grid.push_messages([message])
        with pytest.raises(ValueError, match="already under way"):
            grid.push_messages([message])


def test_clients_cannot_change_what_others_were_sent() -> None:
    def app(message: Message, context: Context) -> Message:
        message.content.config_records["config"]["steps"].append(1)  # type: ignore[union-attr]
        message.content.array_records["arrays"].clear()
        return Message(RecordDict(dict(message.content.items())), reply_to=message)

    shared = RecordDict(
        {"config": ConfigRecord({"steps": [0]}), "arrays": ArrayRecord([np.ones(2)])}
    )
    with InlineGrid(app, 2) as grid:
        replies = grid.send_and_receive([Message(shared, node, "train") for node in (1, 2)])
    assert [r.content.config_records["config"]["steps"] for r in replies] == [[0, 1], [0, 1]]
    assert shared.config_records["config"]["steps"] == [0]
    assert len(shared.array_records["arrays"]) == 1


def test_a_closed_grid_refuses_work_and_closes_again() -> None:
    grid = InlineGrid(stateless, 1)
    grid.close()
    grid.close()
    with pytest.raises(ValueError, match="closed"):
        grid.push_messages([request(1)])
    with pytest.raises(ValueError, match="closed"):
        grid.pull_messages([])


def test_a_million_nodes_cost_no_objects() -> None:
    tracemalloc.start()
    with InlineGrid(stateless, 1_000_000) as grid:
        ids = grid.get_node_ids()
        assert (len(ids), ids[0], ids[-1]) == (1_000_000, 1, 1_000_000)
        (reply,) = grid.send_and_receive([request(1_000_000)])
        assert reply.has_content()
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


# --- cohorts ---


class CohortApp:
    """Trains all sites of a job in one call; takes a plain call for everything else."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.calls.append([-context.node_id])
        return stateless(message, context)

    def train_many(self, messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
        self.calls.append([context.node_id for context in contexts])
        # The last first: replies are matched by id, not by place.
        return (Message(RecordDict(), reply_to=m) for m in reversed(messages))


def test_an_app_that_trains_many_gets_the_train_messages_of_a_job_at_once() -> None:
    app = CohortApp()
    with InlineGrid(app, 9) as grid:
        jobs = [
            [request(5), request(6, "evaluate"), request(7)],
            [request(8)],
            [request(9, "query")],
        ]
        ids = grid.push_jobs(jobs)
        replies = pull_all(grid, ids)
    assert app.calls == [[5, 7], [-6], [8], [-9]]
    assert nodes_of(replies) == [5, 6, 7, 8, 9]
    assert not any(reply.has_error() for reply in replies)


def test_if_train_many_raises_every_message_of_the_job_gets_an_error() -> None:
    class Broken(CohortApp):
        def train_many(self, messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
            yield Message(RecordDict(), reply_to=messages[0])
            raise MemoryError("too many")

    with InlineGrid(Broken(), 9) as grid:
        ids = grid.push_jobs([[request(1), request(2)], [request(3, "evaluate")]])
        replies = pull_all(grid, ids)
    assert [r.has_error() for r in replies] == [True, True, False]


def test_a_site_that_train_many_leaves_out_gets_an_error_alone() -> None:
    class Forgetful(CohortApp):
        def train_many(self, messages: list[Message], contexts: list[Context]) -> Iterator[Message]:
            return iter([Message(RecordDict(), reply_to=messages[1])])

    with InlineGrid(Forgetful(), 9) as grid:
        replies = pull_all(grid, grid.push_jobs([[request(1), request(2)]]))
    assert [r.has_error() for r in replies] == [True, False]


# --- states ---


def test_a_state_lives_from_round_to_round_and_only_for_nodes_that_have_one() -> None:
    with InlineGrid(echo, 1000) as grid:
        for round_ in (1, 2, 3):
            (reply,) = grid.send_and_receive([request(7, round_=round_)])
            assert about(reply)["calls"] == round_
        assert list(grid.states) == [7]
    with InlineGrid(stateless, 10) as grid:
        grid.send_and_receive([request(1)])
        assert dict(grid.states) == {}


def test_only_changed_states_are_touched_until_they_are_committed() -> None:
    def app(message: Message, context: Context) -> Message:
        what = message.content.config_records["do"]["what"]
        if what == "grow":
            context.state.setdefault("log", ConfigRecord({"seen": []}))["seen"].append(1)  # type: ignore
        if what == "clear":
            context.state.clear()
        return stateless(message, context)

    def tell(grid: InlineGrid, what: str, *nodes: int) -> None:
        grid.send_and_receive([request(n, do=ConfigRecord({"what": what})) for n in nodes])

    with InlineGrid(app, 10) as grid:
        tell(grid, "grow", 1, 2)
        assert list(grid.touched_states()) == [1, 2]
        grid.states_committed([1, 2])
        tell(grid, "read", 1, 2)
        assert grid.touched_states() == {}
        tell(grid, "grow", 2)  # changes a list in place
        assert list(grid.touched_states()) == [2]
        tell(grid, "clear", 1)
        assert grid.touched_states()[1] is None
        assert list(grid.states) == [2]


def test_states_are_loaded_back() -> None:
    with InlineGrid(echo, 10) as grid:
        grid.load_states({3: RecordDict({"calls": ConfigRecord({"n": 41})}), 4: RecordDict()})
        assert list(grid.states) == [3]
        assert grid.touched_states() == {}
        (reply,) = grid.send_and_receive([request(3)])
    assert about(reply)["calls"] == 42


def test_a_state_counts_when_its_reply_is_pulled_and_the_node_goes_on_with_it() -> None:
    with InlineGrid(echo, 10) as grid:
        _, second = grid.push_messages([request(7, round_=1), request(7, round_=2)])
        assert [about(r)["calls"] for r in pull_all(grid, [second])] == [2]
        assert dict(grid.states[7].items()) == {"calls": ConfigRecord({"n": 2})}
    with InlineGrid(echo, 10) as grid:
        ids = grid.push_messages([request(7, round_=1), request(8)])
        pull_all(grid, ids[1:])  # node 7 was served before it
        assert list(grid.states) == list(grid.touched_states()) == [8]
        pull_all(grid, ids[:1])
        assert sorted(grid.touched_states()) == [7, 8]


def test_what_a_cancelled_job_left_is_gone_though_it_was_done() -> None:
    with InlineGrid(echo, 10) as grid:
        done, other = grid.push_messages([request(7), request(8)])
        pull_all(grid, [other])
        grid.cancel([done])
        (reply,) = grid.send_and_receive([request(7, round_=2)])
        assert about(reply)["calls"] == 1


# --- giving up ---


def test_what_was_cancelled_is_not_done_and_not_answered() -> None:
    served: list[int] = []

    def app(message: Message, context: Context) -> Message:
        served.append(context.node_id)
        return stateless(message, context)

    with InlineGrid(app, 9) as grid:
        ids = grid.push_jobs([[request(1), request(2)], [request(3)]])
        grid.cancel(ids[1:])
        assert nodes_of(pull_all(grid, ids)) == [1]
        assert served == [1]


def test_a_late_reply_is_dropped_with_its_state() -> None:
    faults = Faults((Fault("delay", node=1, seconds=0.05),))
    with InlineGrid(echo, 2, faults=faults) as grid:
        assert nodes_of(grid.send_and_receive([request(1), request(2)], timeout=0.02)) == [2]
        time.sleep(0.06)
        (reply,) = grid.send_and_receive([request(2)])
        assert about(reply)["calls"] == 2
        assert list(grid.states) == [2]


# --- faults ---


def test_a_fault_strikes_only_what_it_names() -> None:
    message = request(3, "evaluate", round_=2)
    assert Fault("drop").strikes(message, 0)
    assert Fault("drop", node=3, round=2, ordinal=1, message_type="evaluate").strikes(message, 1)
    for other in (
        Fault("drop", node=2),
        Fault("drop", round=1),
        Fault("drop", ordinal=0),
        Fault("drop", message_type="train"),
    ):
        assert not other.strikes(message, 1)


def test_dropped_messages_are_never_answered_and_never_served() -> None:
    with InlineGrid(echo, 3, faults=Faults((Fault("drop", node=2, round=1),))) as grid:
        assert nodes_of(grid.send_and_receive([request(n) for n in (1, 2, 3)])) == [1, 3]
        replies = grid.send_and_receive([request(2, round_=2)])
        assert about(replies[0])["calls"] == 1


def test_a_delayed_reply_comes_when_it_is_due() -> None:
    faults = Faults((Fault("delay", node=1, seconds=0.1),))
    with InlineGrid(stateless, 2, faults=faults) as grid:
        ids = grid.push_messages([request(1), request(2)])
        assert nodes_of(pull_all(grid, ids, pulls=3)) == [2]
        assert not grid.wait(ids, timeout=0.01)
        assert grid.wait(ids, timeout=5)
        assert nodes_of(grid.pull_messages(ids)) == [1]


def test_a_duplicated_reply_comes_twice() -> None:
    with InlineGrid(stateless, 2, faults=Faults((Fault("duplicate", ordinal=0),))) as grid:
        ids = grid.push_messages([request(1)])
        assert [r.metadata.reply_to_message_id for r in pull_all(grid, ids)] == ids * 2
        assert len(pull_all(grid, grid.push_messages([request(1)]))) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_reaches_every_float_and_nothing_else(dtype: type) -> None:
    arrays = ArrayRecord([np.ones((2, 3), dtype), np.arange(3)])
    raw = ArrayRecord({"w": Array("bfloat16", (2,), "fedft.raw", b"\x80\x3f\x80\x3f")})
    with InlineGrid(echo, 1, faults=Faults((Fault("nan"),))) as grid:
        (reply,) = grid.send_and_receive([request(1, arrays=arrays, raw=raw)])
    floats, ints = reply.content.array_records["arrays"].to_numpy_ndarrays()
    assert floats.shape == (2, 3)
    assert floats.dtype == dtype
    assert np.isnan(floats).all()
    assert ints.tolist() == [0, 1, 2]
    bits = np.frombuffer(reply.content.array_records["raw"]["w"].data, np.uint16)
    assert np.isnan((bits.astype(np.uint32) << 16).view(np.float32)).all()


def test_a_killed_worker_takes_its_whole_job_along_and_raise_one_message() -> None:
    faults = Faults((Fault("kill", node=2), Fault("raise", node=4)))
    with InlineGrid(echo, 5, faults=faults) as grid:
        jobs = [[request(1), request(2)], [request(3), request(4)]]
        replies = pull_all(grid, grid.push_jobs(jobs))
        assert [r.error.code if r.has_error() else 0 for r in replies] == [
            APP_CRASHED,
            APP_CRASHED,
            0,
            APP_RAISED,
        ]
        assert list(grid.states) == [3]


def test_reordering_is_drawn_from_its_seed() -> None:
    def order(seed: int | None) -> list[int]:
        with InlineGrid(stateless, 12, faults=Faults(reorder=seed)) as grid:
            jobs = [[request(n), request(n + 1)] for n in range(1, 12, 2)]
            return nodes_of(pull_all(grid, grid.push_jobs(jobs)))

    assert order(None) == list(range(1, 13))
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(1, 13))


# --- references ---


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("clients", "module:attribute"),
        (":app", "module:attribute"),
        ("no.such.module:app", "No module named 'no'"),
        ("json:no_such_thing", "no_such_thing"),
        ("sys:path", "cannot be called"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(reference: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(reference)


def test_a_grid_without_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one node"):
        InlineGrid(stateless, 0)
