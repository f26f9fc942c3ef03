"""A site's side: every result exactly once, whatever the connection does; nothing but data is taken."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedft.clients.join import KeptParts, _occupied
from fedft.clients.session import Session
from fedft.clients.work import Connection, Failure, Offer, Timing
from fedft.clients.worker import Resident, Site
from fedft.core import models
from fedft.core.errors import (
    EnvironmentFailure,
    Interrupted,
    MismatchError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.framing import Ticket, chunks, data_schema, describe
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.wire import codec

SHAPES = {"arrays": {"a": (32, 16)}}
HASHES = pb.Hashes(base_model="m", tokenizer="t", data_schema="d")


class Line:
    """One connection, seen from a server that says what a test wants."""

    def __init__(self, requests: Iterator[pb.FromSite]) -> None:
        self._requests = requests
        self.out: queue.Queue[pb.FromServer | None] = queue.Queue()
        self._in: queue.Queue[pb.FromSite | None] = queue.Queue()
        self.doing: list[tuple[Any, int]] = []
        """What the heartbeats said."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(grpc.RpcError, Exception):
            for message in self._requests:
                if message.WhichOneof("body") != "heartbeat":
                    self._in.put(message)
                else:
                    self.doing.append((message.heartbeat.activity, message.heartbeat.round))
        self._in.put(None)

    def say(self, **body: Any) -> None:
        self.out.put(pb.FromServer(**body))

    def hear(self, kind: str, seconds: float = 5.0) -> Any:
        message = self._in.get(timeout=seconds)
        assert message is not None and message.WhichOneof("body") == kind, message
        return getattr(message, kind)

    def quiet(self, seconds: float = 0.3) -> bool:
        with contextlib.suppress(queue.Empty):
            return self._in.get(timeout=seconds) is None
        return True

    def cut(self) -> None:
        self.out.put(None)

    def welcome(self) -> "Line":
        self.hear("hello")
        self.say(task=pb.Task(run="run", spec="{}", hashes=HASHES))
        self.hear("offer")
        self.say(welcome=pb.Welcome())
        return self

    def work(self, round_: int = 1, content: RecordDict | None = None) -> pb.Ticket:
        content = content or RecordDict({"arrays": arrays()})
        ticket = pb.Ticket(run="run", round=round_, site="ann", kind="train", base=f"base-{round_}")
        self.say(work=pb.Work(ticket=ticket, plan="{}", content=describe(content)))
        for data in chunks(content):
            self.say(chunk=pb.Chunk(data=data))
        return ticket

    def judge(self, ticket: pb.Ticket, verdict: "pb.Verdict") -> None:
        self.say(ack=pb.Ack(ticket=ticket, verdict=verdict))

    def collect(self, ticket: pb.Ticket, verdict: "pb.Verdict" = pb.ACCEPTED) -> bytes:
        """Take a result that is announced, and judge it."""
        result = self.hear("result")
        assert result.ticket == ticket
        self.judge(ticket, pb.SEND)
        size = sum(a.size for r in result.content.records for a in r.arrays)
        data = b""
        while len(data) < size:
            data += self.hear("chunk").data
        self.judge(ticket, verdict)
        return data


class Host(link_pb2_grpc.FederationServicer):
    """A server on loopback whose lines a test holds in its hand."""

    def __init__(self) -> None:
        self.lines: queue.Queue[Line] = queue.Queue()
        self._all: list[Line] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        link_pb2_grpc.add_FederationServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Session(self, request_iterator: Any, context: Any) -> Iterator[pb.FromServer]:
        line = Line(request_iterator)
        self._all.append(line)
        self.lines.put(line)
        yield from iter(line.out.get, None)

    def line(self, seconds: float = 5.0) -> Line:
        return self.lines.get(timeout=seconds)

    def close(self) -> None:
        for line in self._all:
            line.cut()  # a handler that waits for ever keeps the process from ending
        self._server.stop(grace=None).wait(5)


class Counter:
    """A worker that adds one, counts what it does, and can be held up."""

    def __init__(self) -> None:
        self.done: list[Ticket] = []
        self.verdicts: list[tuple[int, bool]] = []
        self.loads = 0
        self.go = threading.Event()
        self.go.set()

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        self.loads += 1
        return Offer(5, None, None, hashes)

    def expected(self, plan: str, header: pb.Content) -> Any:
        return SHAPES

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        assert self.go.wait(10)
        self.done.append(ticket)
        record = content.array_records["arrays"]
        plus = {name: Array(array.numpy() + 1) for name, array in record.items()}
        return RecordDict({"arrays": ArrayRecord(plus), "metrics": MetricRecord({"n": 1})})

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        self.verdicts.append((ticket.round, counted))


class Running:
    """A session in a thread."""

    def __init__(self, port: int, worker: Any, timing: Timing) -> None:
        self.said: list[str] = []
        self.stop = threading.Event()
        self.outcome: futures.Future[str] = futures.Future()
        connection = Connection(f"127.0.0.1:{port}", "ann", None)
        session = Session(connection, worker, self.said.append, self.stop.is_set, timing)
        self.session = session
        self.thread = threading.Thread(target=self._run, args=(session,), daemon=True)
        self.thread.start()

    def _run(self, session: Session) -> None:
        try:
            self.outcome.set_result(session.run())
        except BaseException as error:
            self.outcome.set_exception(error)

    def result(self, seconds: float = 10.0) -> str:
        return self.outcome.result(timeout=seconds)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def run(host: Host) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(worker: Any, port: int | None = None, **timing: Any) -> Running:
        values = {"first_delay": 0.05, "longest_delay": 0.2, "heartbeat": 0.2, "silence": 3.0}
        made.append(Running(port or host.port, worker, Timing(**{**values, **timing})))
        return made[-1]

    yield start
    for one in made:
        one.stop.set()
        one.thread.join(10)


def arrays(value: float = 1.0) -> ArrayRecord:
    return ArrayRecord({"a": Array(np.full((32, 16), value, np.float32))})


def until(ready: Callable[[], bool], seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


@pytest.mark.grpc
class TestExactlyOnce:
    def test_work_is_done_and_its_result_judged(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        worker = Counter()
        run(worker)
        line = host.line().welcome()
        data = line.collect(line.work())
        assert data == arrays(2.0)["a"].data
        until(lambda: worker.verdicts == [(1, True)])

    def test_a_result_outlives_the_connection_and_is_not_computed_again(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """Rows 24 and 26."""
        worker = Counter()
        run(worker)
        first = host.line().welcome()
        ticket = first.work()
        first.hear("result")
        first.cut()
        second = host.line().welcome()
        assert second.collect(ticket) == arrays(2.0)["a"].data
        assert len(worker.done) == 1

    def test_work_that_comes_again_while_it_is_done_is_not_done_twice(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        worker = Counter()
        worker.go.clear()
        run(worker)
        first = host.line().welcome()
        first.work()
        first.cut()
        second = host.line().welcome()
        ticket = second.work()
        worker.go.set()
        second.collect(ticket)
        assert second.quiet() and len(worker.done) == 1

    def test_a_server_that_lost_a_result_gets_it_again(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """Row 25: it was killed after it took the result and before it committed the round."""
        worker = Counter()
        run(worker)
        first = host.line().welcome()
        first.collect(first.work())
        first.cut()
        second = host.line().welcome()
        assert second.quiet()
        second.collect(second.work())
        assert len(worker.done) == 1
        second.collect(second.work(round_=2))  # positive control: other work is done
        assert len(worker.done) == 2

    def test_what_did_not_count_is_told_to_the_worker(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        worker = Counter()
        run(worker)
        line = host.line().welcome()
        ticket = line.work()
        line.hear("result")
        line.judge(ticket, pb.LATE)
        until(lambda: worker.verdicts == [(1, False)])
        line.collect(line.work(), pb.REFUSED)  # it was forgotten, so that it is done anew
        until(lambda: worker.verdicts == [(1, False), (1, False)])
        assert len(worker.done) == 2

    def test_work_that_is_called_off_while_it_waits_is_not_begun(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        worker = Counter()
        worker.go.clear()
        run(worker)
        line = host.line().welcome()
        first, second = line.work(1), line.work(2)
        line.say(cancel=pb.Cancel(tickets=[second]))
        time.sleep(0.2)
        worker.go.set()
        line.collect(first)
        assert line.quiet()
        assert [ticket.round for ticket in worker.done] == [1]

    def test_work_that_raises_is_a_failure_with_a_reason(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        class Broken(Counter):
            def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict:
                raise KeyError("training")

        run(Broken())
        line = host.line().welcome()
        ticket = line.work()
        result = line.hear("result")
        assert result.failure.reason == "failed"
        line.judge(ticket, pb.ACCEPTED)

    def test_work_that_is_asked_for_again_just_after_it_was_called_off_is_done(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """Called off while it waits, found unwanted, and asked for before that is noted."""
        worker = Counter()
        worker.go.clear()
        going = run(worker)
        line = host.line().welcome()
        first = line.work(1)
        second = line.work(2)
        until(lambda: len(going.session._jobs) == 2)
        session = going.session
        job = session._jobs[Ticket.read(second)]

        class Fickle:
            """Unwanted when the worker looks, and wanted when the answer is noted."""

            looks = 0

            def __get__(self, owner: Any, kind: Any = None) -> bool:
                self.looks += 1
                return self.looks > 1

            def __set__(self, owner: Any, value: bool) -> None: ...

        fickle = type("Fickle", (type(job),), {"wanted": Fickle()})
        job.__class__ = fickle
        worker.go.set()
        assert {line.hear("result").ticket.round for _ in (first, second)} == {1, 2}

    def test_a_result_that_is_taken_back_is_computed_anew(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """Row 71: it was NaN, say, which the server sees after it has taken it."""
        worker = Counter()
        going = run(worker)
        line = host.line().welcome()
        ticket = line.work()
        line.collect(ticket)
        line.say(ack=pb.Ack(ticket=ticket, verdict=pb.REFUSED, reason="nan: a contains NaN"))
        until(lambda: worker.verdicts == [(1, True), (1, False)])
        line.collect(line.work())
        assert len(worker.done) == 2
        assert "round 1: train refused (nan: a contains NaN); waiting for work" in going.said

    def test_no_server_can_pile_up_work(self, host: Host, run: Callable[..., Running]) -> None:
        """Each piece holds an adapter: beyond a few the line is cut, and what is held is done."""
        worker = Counter()
        worker.go.clear()
        going = run(worker)
        line = host.line().welcome()
        for round_ in range(1, 40):
            line.work(round_)
        again = host.line().welcome()
        assert len(going.session._jobs) == 8
        assert any("more work than it takes results of" in text for text in going.said)
        worker.go.set()
        until(lambda: len(worker.done) == 8)
        first = again.hear("result")
        again.judge(
            first.ticket, pb.SEND
        )  # positive control: there is room again for what is taken
        again.judge(first.ticket, pb.ACCEPTED)
        again.work(50)
        until(lambda: len(worker.done) == 9)

    def test_work_that_was_called_off_holds_nothing_and_takes_no_place(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """A client that is slow for many rounds is not cut off for what was called off meanwhile."""
        worker = Counter()
        worker.go.clear()
        going = run(worker)
        line = host.line().welcome()
        line.work(1)
        for round_ in range(2, 40):
            line.say(cancel=pb.Cancel(tickets=[line.work(round_)]))
        last = line.work(50)
        until(lambda: len(going.session._jobs) == 40)
        held = [job for job in going.session._jobs.values() if job.given is not None]
        assert len(held) == 2
        worker.go.set()
        assert line.hear("result").ticket.round == 1
        assert line.hear("result").ticket == last
        assert [ticket.round for ticket in worker.done] == [1, 50]

    def test_it_says_what_it_does(self, host: Host, run: Callable[..., Running]) -> None:
        worker = Counter()
        worker.go.clear()
        going = run(worker, heartbeat=0.05)
        line = host.line()
        line.hear("hello")
        line.say(task=pb.Task(run="run", spec="{}", hashes=HASHES))
        line.hear("offer")
        line.say(welcome=pb.Welcome())
        ticket = line.work(7)
        until(lambda: line.doing[-1:] == [(pb.TRAINING, 7)])
        worker.go.set()
        line.collect(ticket)
        until(lambda: line.doing[-1:] == [(pb.WAITING, 0)])
        in_order = [activity for activity, _ in dict.fromkeys(line.doing)]
        assert in_order == [pb.LOADING, pb.WAITING, pb.TRAINING]
        until(lambda: len(going.said) == 4)
        assert going.said == [
            "connected; loading the model and the data",
            "joined; waiting for work",
            "round 7: training",
            "round 7: train accepted; waiting for work",
        ]


@pytest.mark.grpc
class TestStaying:
    def test_it_tries_again_with_growing_and_jittered_delays(
        self, run: Callable[..., Running]
    ) -> None:
        """Row 26."""
        going = run(Counter(), port=1, first_delay=0.1, longest_delay=0.4, give_up=1.5)
        with pytest.raises(EnvironmentFailure, match="no connection") as failure:
            going.result()
        assert failure.value.exit_code == 3
        delays = [float(line.split("again in ")[1][:-2]) for line in going.said]
        assert len(delays) >= 4 and len(set(delays)) > 1
        assert all(0.05 <= d <= 0.4 for d in delays) and max(delays) > 0.15

    def test_a_pause_of_the_server_is_waited_out(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        worker = Counter()
        going = run(worker)
        host.line().welcome().say(drain=pb.Drain(finished=False, reason="upgrade"))
        second = host.line().welcome()
        assert any("the server pauses: upgrade" in line for line in going.said)
        second.say(drain=pb.Drain(finished=True, reason="the end"))
        assert going.result() == "the end"

    def test_silence_of_the_server_is_noticed(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        run(Counter(), silence=0.5)
        host.line().welcome()
        host.line(3.0)  # nothing was said, and it is here again

    @pytest.mark.parametrize(
        ("refusal", "error", "code"),
        [
            (pb.Refusal(reason="version", mismatch=True), MismatchError, 5),
            (pb.Refusal(reason="revoked"), SecurityRefusal, 7),
        ],
    )
    def test_a_refusal_ends_it_with_the_reason(
        self, host: Host, run: Callable[..., Running], refusal: Any, error: Any, code: int
    ) -> None:
        going = run(Counter())
        line = host.line()
        line.hear("hello")
        line.say(refusal=refusal)
        with pytest.raises(error, match=refusal.reason) as caught:
            going.result()
        assert caught.value.exit_code == code

    def test_not_now_is_no_refusal(self, host: Host, run: Callable[..., Running]) -> None:
        run(Counter())
        line = host.line()
        line.say(refusal=pb.Refusal(reason="connected from elsewhere", retry=True))
        host.line().welcome()

    def test_it_leaves_with_a_goodbye(self, host: Host, run: Callable[..., Running]) -> None:
        going = run(Counter())
        line = host.line().welcome()
        going.stop.set()
        assert "stopped" in line.hear("goodbye").reason
        with pytest.raises(Interrupted):
            going.result()

    def test_what_cannot_be_loaded_is_told_to_the_server(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        class Poor(Counter):
            def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
                raise MismatchError("data.jsonl:3 is no JSON")

        going = run(Poor())
        line = host.line()
        line.hear("hello")
        line.say(task=pb.Task(run="run", spec="{}", hashes=HASHES))
        assert line.hear("goodbye").reason == "data"  # and not what is on line 3
        with pytest.raises(MismatchError):
            going.result()

    def test_work_of_other_shapes_is_not_begun(
        self, host: Host, run: Callable[..., Running]
    ) -> None:
        """Row 43, from the server's side: a size that the model cannot have."""
        worker = Counter()
        going = run(worker)
        line = host.line().welcome()
        line.work(content=RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros((33, 16)))})}))
        host.line().welcome()
        assert worker.done == [] and any("unusable work: shape" in text for text in going.said)


# ── what stays at a site ──────────────────────────────────────────────────────────────────────


def ticket(round_: int, kind: str = "train", run: str = "run") -> Ticket:
    return Ticket(run, round_, "ann", kind, "base")


def state(value: float) -> RecordDict:
    return RecordDict({codec.KEPT: codec.arrays_from({"B": torch.full((2, 2), value)})})


def value(found: RecordDict) -> float | None:
    record = found.array_records.get(codec.KEPT)
    return None if record is None else float(codec.tensors_from(record)["B"][0, 0])


class TestKeptParts:
    def test_a_round_that_is_done_again_starts_where_it_started(self, tmp_path: Path) -> None:
        kept = KeptParts(tmp_path)
        assert value(kept.before(ticket(1))) is None
        for round_ in (1, 2):
            kept.store(ticket(round_), state(round_))
        assert value(kept.before(ticket(3))) == 2
        assert value(kept.before(ticket(2))) == 1  # and not what round 2 left the first time
        assert value(kept.before(ticket(2, "evaluate"))) == 2
        assert value(kept.before(ticket(3, run="another"))) is None

    def test_what_did_not_count_is_forgotten_and_old_rounds_are(self, tmp_path: Path) -> None:
        kept = KeptParts(tmp_path)
        for round_ in range(1, 7):
            kept.store(ticket(round_), state(round_))
            kept.judged(ticket(round_), counted=round_ != 6)
        assert value(kept.before(ticket(7))) == 5
        assert len(list(tmp_path.rglob("*.safetensors"))) <= 3

    def test_a_run_is_no_path(self, tmp_path: Path) -> None:
        """Row 42: the server names the run."""
        for run in ("../x", "/abs", ""):
            with pytest.raises(SecurityRefusal):
                KeptParts(tmp_path / "kept").store(ticket(1, run=run), state(1))

    def test_a_site_is_one_process(self, tmp_path: Path) -> None:
        with (
            _occupied(tmp_path),
            pytest.raises(EnvironmentFailure, match="another"),
            _occupied(tmp_path),
        ):
            pass
        with _occupied(tmp_path):  # positive control: it is free again
            pass


# ── what a server can ask of a site ───────────────────────────────────────────────────────────


@pytest.fixture
def task(tiny_model: Path) -> TaskSpec:
    return TaskSpec(
        model=ModelSpec(source=str(tiny_model)),
        lora=LoraSpec(rank=4, alpha=8),
        data=DataSpec(source="own"),
        classes=("animal", "plant", "tool"),
    )


def wanted(task: TaskSpec) -> dict[str, str]:
    found = models.fingerprint(models.resolve(task.model))
    return {**found, "data_schema": data_schema(task, task.classes)}


class TestResident:
    def test_it_offers_all_rows_of_its_own_file(
        self, task: TaskSpec, tiny_data: Path, tmp_path: Path
    ) -> None:
        own = tmp_path / "own.jsonl"
        lines = tiny_data.read_text().splitlines()[:7]
        own.write_text("\n".join(lines) + "\n")
        resident = Resident(
            "ann", Site(own, rank=2, model=task.model.source), KeptParts(tmp_path / "kept")
        )
        offer = resident.load("run", task.model_dump_json(), wanted(task))
        assert (offer.examples, offer.rank, dict(offer.hashes)) == (7, 2, wanted(task))

    @pytest.mark.parametrize("name", ["base_model", "tokenizer"])
    def test_another_model_is_noticed_before_it_is_loaded(
        self, task: TaskSpec, tiny_data: Path, tmp_path: Path, name: str
    ) -> None:
        """Rows 48 and 49, at the site."""
        resident = Resident("ann", Site(tiny_data, model=task.model.source), KeptParts(tmp_path))
        with pytest.raises(MismatchError, match=name.replace("_", " ")):
            resident.load("run", task.model_dump_json(), {**wanted(task), name: "other"})

    def test_a_label_that_the_run_does_not_know_is_told_with_its_line(
        self, task: TaskSpec, tmp_path: Path
    ) -> None:
        own = tmp_path / "own.jsonl"
        own.write_text('{"text": "leaf", "label": "plant"}\n{"text": "x", "label": "car"}\n')
        resident = Resident("ann", Site(own, model=task.model.source), KeptParts(tmp_path))
        with pytest.raises(MismatchError, match=r"own\.jsonl.*2"):
            resident.load("run", task.model_dump_json(), wanted(task))

    def test_a_server_cannot_make_a_site_run_code(
        self, task: TaskSpec, tiny_data: Path, tmp_path: Path
    ) -> None:
        """Row 63: there is no field for code, and a model's own code needs the owner's word."""
        resident = Resident("ann", Site(tiny_data, model=task.model.source), KeptParts(tmp_path))
        trusting = task.model_copy(
            update={"model": task.model.model_copy(update={"trust_remote_code": True})}
        )
        with pytest.raises(SecurityRefusal, match="code of its own") as refused:
            resident.load("run", trusting.model_dump_json(), wanted(task))
        assert refused.value.exit_code == 7
        for extra in ({"exec": "import os"}, {"data": {"source": "x", "loader": "y.py"}}):
            with pytest.raises(MismatchError, match="cannot be read"):
                resident.load("run", json.dumps(task.model_dump() | extra), wanted(task))
        resident.load("run", task.model_dump_json(), wanted(task))  # positive control

    def test_it_expects_the_shapes_of_its_own_model(
        self, task: TaskSpec, tiny_data: Path, tmp_path: Path
    ) -> None:
        resident = Resident("ann", Site(tiny_data, model=task.model.source), KeptParts(tmp_path))
        resident.load("run", task.model_dump_json(), wanted(task))
        expected = resident.expected('{"rank": 4}', pb.Content())["arrays"]
        assert {shape for name, shape in expected.items() if "lora_A" in name} == {(4, 32)}
        for plan in ("", "[]", "{}", '{"rank": "x"}', '{"rank": 100000000000}', '{"rank": 0}'):
            with pytest.raises(UpdateRejected):
                resident.expected(plan, pb.Content())
        delta = pb.Arrays(
            name="delta", arrays=[pb.ArrayHeader(name="x.lora_A.weight", shape=[9, 9])]
        )
        with pytest.raises(UpdateRejected, match="no layer"):
            resident.expected('{"rank": 4}', pb.Content(records=[delta]))
