"""What the server takes from clients, and what it does not: each guard, and what happens without it.

The clients here are scripted: they say whatever a test wants, well-behaved or not.
"""

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core.errors import EnvironmentFailure, SecurityRefusal, UpdateRejected
from fedft.core.link import framing, link_pb2_grpc
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import PROTOCOL, Assembly, chunks, describe
from fedft.core.link.secrets import key_pem, new_key
from fedft.core.types import Site
from fedft.core.wire.dtypes import BF16, FRAMING, NPY
from fedft.server.grids import hub as hub_module
from fedft.server.grids.grpc import GrpcGrid
from fedft.server.grids.outbox import Outbox, Pending, Verdict
from fedft.server.grids.stream import Stream, Terms, Timing
from fedft.server.identity import Address, Audit, Authority, Registry, serial_of
from fedft.server.validation import PLAN_FAILED, REPLY_REFUSED

SHAPES = {"a": (64, 128), "b": (128, 64)}
HASHES = {"base_model": "m", "tokenizer": "t", "data_schema": "d"}
BRISK = Timing(heartbeat=0.2, silence=2.0, handshake=1.0, stall=1.0, absence=1.0, watch=0.05)
VERSIONS = {"fedft": version("fedft")}


class Script:
    """A client that does what it is told, over gRPC's synchronous API."""

    def __init__(self, port: int, site: str, instance: str = "one", *, beats: bool = True) -> None:
        self.site, self.instance = site, instance
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._out: queue.Queue[pb.FromSite | None] = queue.Queue()
        self._in: queue.Queue[pb.FromServer | None] = queue.Queue()
        self._call = link_pb2_grpc.FederationStub(self._channel).Session(iter(self._out.get, None))
        self._over = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        if beats:
            threading.Thread(target=self._beat, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for message in self._call:
                if message.WhichOneof("body") != "heartbeat":
                    self._in.put(message)
        self._in.put(None)

    def _beat(self) -> None:
        while not self._over.wait(0.2):
            self.say(heartbeat=pb.Heartbeat())

    def say(self, **body: Any) -> None:
        self._out.put(pb.FromSite(**body))

    def hear(self, kind: str, seconds: float = 5.0) -> Any:
        """The next message, which must be of a kind; None is the end of the stream."""
        message = self._in.get(timeout=seconds)
        found = None if message is None else message.WhichOneof("body")
        assert found == kind, f"heard {message}, expected {kind}"
        return getattr(message, kind)

    def ended(self, seconds: float = 5.0) -> bool:
        return self._in.get(timeout=seconds) is None

    def hello(self, **changes: Any) -> None:
        fields = {"protocol": PROTOCOL, "versions": VERSIONS, "instance": self.instance}
        self.say(hello=pb.Hello(**{**fields, "site": self.site, **changes}))

    def offer(self, **changes: Any) -> None:
        fields = {"examples": 5, "hashes": pb.Hashes(**HASHES)}
        self.say(offer=pb.Offer(**{**fields, **changes}))

    def join(self) -> "Script":
        self.hello()
        self.hear("task")
        self.offer()
        self.hear("welcome")
        return self

    def work(self) -> tuple[pb.Work, RecordDict]:
        work = self.hear("work")
        expected = {
            r.name: {a.name: tuple(a.shape) for a in r.arrays} for r in work.content.records
        }
        assembly = Assembly(work.content, expected)
        while not assembly.complete:
            assembly.feed(self.hear("chunk").data)
        return work, assembly.content()

    def announce(self, ticket: pb.Ticket, content: RecordDict) -> pb.Ack:
        self.say(result=pb.Result(ticket=ticket, content=describe(content)))
        return self.hear("ack")

    def send(self, content: RecordDict) -> pb.Ack:
        for data in chunks(content):
            self.say(chunk=pb.Chunk(data=data))
        return self.hear("ack")

    def close(self) -> None:
        self._over.set()
        self._out.put(None)
        self._call.cancel()
        self._channel.close()


class Place:
    """A grid on loopback, and the scripted clients of one test, who speak without TLS."""

    def __init__(self, folder: Path, terms: Terms, timing: Timing, *, tls: bool = False) -> None:
        self.folder = folder
        self.registry = Registry(folder / "identity")
        self.authority = Authority(folder / "identity") if tls else None
        self.told: list[str] = []
        self.grid = GrpcGrid(
            *(terms, Address(insecure=not tls), self.registry, self.authority),
            *(Audit(folder), timing, self.told.append),
        )
        self.scripts: list[Script] = []

    def invite(self, *names: str) -> None:
        for name in names:
            self.registry.invite(name, None, Address(insecure=True))  # type: ignore[arg-type]

    def script(self, site: str, instance: str = "one", **options: Any) -> Script:
        if site not in self.registry.clients():
            self.invite(site)
        self.scripts.append(Script(self.grid.port, site, instance, **options))
        return self.scripts[-1]

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.folder / "audit.jsonl").read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    with contextlib.ExitStack() as stack:

        def make(
            *,
            timing: Timing = BRISK,
            shapes: Mapping[str, tuple[int, ...]] = SHAPES,
            history: Mapping[str, int] | None = None,
            objection: Callable[[Site], str | None] = lambda site: None,
            tls: bool = False,
        ) -> Place:
            terms = Terms(
                *("run", "{}", HASHES),
                expected=lambda message: {"arrays": shapes},
                objection=objection,
                history=history or {},
            )
            folder = tmp_path / f"place-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            made = Place(folder, terms, timing, tls=tls)
            stack.callback(lambda: [*(s.close() for s in made.scripts), made.grid.close()])
            return made

        yield make


def arrays(shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    return ArrayRecord({k: Array(rng.random(s, dtype=np.float32)) for k, s in shapes.items()})


def message(node: int = 1, round_: int = 1, record: ArrayRecord | None = None) -> Message:
    config = ConfigRecord({"plan": json.dumps({"rank": 4, "node": node}), "task": "{}"})
    content = RecordDict({"arrays": record or arrays(), "config": config})
    return Message(content, node, "train", group_id=str(round_))


def answer(seed: int = 1) -> RecordDict:
    return RecordDict({"arrays": arrays(seed=seed), "metrics": MetricRecord({"num-examples": 5})})


def until(ready: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


def replies(grid: GrpcGrid, ids: list[str], seconds: float) -> list[Message]:
    """All replies that come within a time."""
    ends, found = time.monotonic() + seconds, []
    while time.monotonic() < ends:
        found += grid.pull_messages(ids)
        grid.wait(ids, 0.05)
    return found


@pytest.mark.grpc
class TestWork:
    def test_tensors_arrive_bit_by_bit_in_chunks_both_ways(
        self, place: Callable[..., Place]
    ) -> None:
        shapes = {"a": (512, 700), "b": (3,), "c": (700, 300)}
        here = place(shapes=shapes)
        client = here.script("ann").join()
        ids = here.grid.push_messages([message(record=arrays(shapes))])
        work, content = client.work()
        assert work.content.records[0].arrays[0].size > 2 * framing.CHUNK_BYTES
        for name, array in arrays(shapes).items():
            assert content.array_records["arrays"][name].data == array.data
        back = RecordDict({"arrays": arrays(shapes, seed=9)})
        assert client.announce(work.ticket, back).verdict == pb.SEND
        assert client.send(back).verdict == pb.ACCEPTED
        [reply] = replies(here.grid, ids, 0.5)
        for name, array in arrays(shapes, seed=9).items():
            assert reply.content.array_records["arrays"][name].data == array.data

    def test_the_same_result_three_times_counts_once(self, place: Callable[..., Place]) -> None:
        """Row 22."""
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        client.announce(work.ticket, answer())
        assert client.send(answer()).verdict == pb.ACCEPTED
        for _ in range(2):
            assert client.announce(work.ticket, answer(seed=5)).verdict == pb.DUPLICATE
        [reply] = replies(here.grid, ids, 0.5)
        assert reply.content.array_records["arrays"]["a"].data == arrays(seed=1)["a"].data

    def test_a_straggler_is_acknowledged_and_not_counted(self, place: Callable[..., Place]) -> None:
        """Row 21: its round has closed."""
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        here.grid.cancel(ids)
        client.hear("cancel")
        assert client.announce(work.ticket, answer()).verdict == pb.LATE
        assert replies(here.grid, ids, 0.3) == []
        assert "late" in {line["event"] for line in here.audit()}

    @pytest.mark.parametrize("change", [{"round": 7}, {"run": "x"}, {"base": "x"}, {"site": "bob"}])
    def test_a_result_of_something_else_is_stale(
        self, place: Callable[..., Place], change: dict[str, Any]
    ) -> None:
        """Row 23; also one in the name of another site, whose work stays open."""
        here = place()
        here.invite("ann", "bob")
        client, other = here.script("ann").join(), here.script("bob").join()
        ids = here.grid.push_messages([message(1), message(2)])
        work, _ = client.work()
        theirs, _ = other.work()
        ticket = pb.Ticket()
        ticket.CopyFrom(theirs.ticket if "site" in change else work.ticket)
        for key, value in change.items():
            setattr(ticket, key, value)
        assert client.announce(ticket, answer()).verdict == pb.STALE
        assert replies(here.grid, ids, 0.3) == []

    def test_without_the_tickets_the_same_result_counts_again(
        self, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Positive control of the three tests above."""
        opened: dict[Any, Any] = {}

        def forgetful(outbox: Outbox, ticket: Any) -> Any:
            pending = outbox._open.get(ticket) or next(iter(opened.values()), None)
            opened.setdefault("first", pending)
            return pending

        def always(outbox: Outbox, ticket: Any, answer: RecordDict, verdict: Verdict) -> Verdict:
            asked = opened["first"].message
            outbox._answers.append((asked, Message(answer, reply_to=asked)))
            return verdict

        here = place()
        client = here.script("ann").join()
        here.grid.push_messages([message()])
        work, _ = client.work()
        monkeypatch.setattr(Outbox, "pending", forgetful)
        monkeypatch.setattr(Outbox, "settle", always)
        for _ in range(2):
            client.announce(work.ticket, answer())
            assert client.send(answer()).verdict == pb.ACCEPTED
        assert len(here.grid._outbox.fetch()) == 2

    def test_work_waits_for_a_site_that_comes_back(self, place: Callable[..., Place]) -> None:
        """Rows 24 and 26: the same work, once more, to the new connection."""
        here = place()
        first = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        before, _ = first.work()
        first.close()
        until(lambda: not here.grid.connected)
        second = here.script("ann", "two").join()
        work, _ = second.work()
        assert work.ticket == before.ticket
        second.announce(work.ticket, answer())
        assert second.send(answer()).verdict == pb.ACCEPTED
        assert len(replies(here.grid, ids, 0.3)) == 1

    def test_a_site_that_stays_away_fails_by_name(self, place: Callable[..., Place]) -> None:
        """Row 18."""
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        client.work()
        client.close()
        [reply] = replies(here.grid, ids, 2.5)
        assert reply.has_error() and "ann was away" in (reply.error.reason or "")

    def test_a_result_that_was_committed_before_a_restart_is_known(
        self, place: Callable[..., Place]
    ) -> None:
        here = place(history={"ann": 4})
        client = here.script("ann").join()
        for round_, verdict in ((4, pb.DUPLICATE), (5, pb.STALE)):
            ticket = pb.Ticket(run="run", round=round_, site="ann", kind="train", base="x")
            assert client.announce(ticket, answer()).verdict == verdict

    def test_a_failure_comes_with_its_reason(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        failure = pb.Failure(code=101, reason="no disk")
        client.say(result=pb.Result(ticket=work.ticket, failure=failure))
        assert client.hear("ack").verdict == pb.ACCEPTED
        [reply] = replies(here.grid, ids, 0.3)
        assert (reply.error.code, reply.error.reason) == (101, "no disk")


@pytest.mark.grpc
class TestAgain:
    """A round that missed its quorum asks for the same work again; rows 19 and 71."""

    @staticmethod
    def asked_again(here: Place, client: Script) -> tuple[list[str], pb.Work]:
        """The same work a second time, after the first was called off at a deadline."""
        first = here.grid.push_messages([message()])
        before, _ = client.work()
        here.grid.cancel(first)
        client.hear("cancel")
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        assert work.ticket == before.ticket
        return ids, work

    def test_the_same_work_reaches_the_same_client_again(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        for _ in range(3):
            ids, work = self.asked_again(here, client)
            client.announce(work.ticket, answer())
            assert client.send(answer()).verdict == pb.ACCEPTED
            assert len(replies(here.grid, ids, 0.3)) == 1

    def test_where_a_piece_of_work_is_known_by_its_ticket_it_never_comes_again(
        self, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Positive control."""
        same = lambda one, other: one.ticket == other.ticket  # noqa: E731
        monkeypatch.setattr(Pending, "__eq__", same)
        monkeypatch.setattr(Pending, "__hash__", lambda one: hash(one.ticket))
        kept: list[Any] = []  # the tickets of a stream were never forgotten
        honest = Stream.put
        monkeypatch.setattr(
            Stream, "put", lambda stream, item: (kept.append(item), honest(stream, item))
        )
        here = place()
        client = here.script("ann").join()
        with pytest.raises(queue.Empty):
            self.asked_again(here, client)

    def test_a_failure_can_be_tried_again(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        for _ in range(3):
            ids = here.grid.push_messages([message()])
            work, _ = client.work()
            failure = pb.Failure(code=101, reason="no disk")
            client.say(result=pb.Result(ticket=work.ticket, failure=failure))
            assert client.hear("ack").verdict == pb.ACCEPTED
            [reply] = replies(here.grid, ids, 0.3)
            assert reply.error.code == 101

    def test_what_was_on_its_way_when_it_was_called_off_answers_the_second_time(
        self, place: Callable[..., Place]
    ) -> None:
        """A reply to the first message would be one that nobody waits for."""
        here = place()
        client = here.script("ann").join()
        first = here.grid.push_messages([message()])
        work, _ = client.work()
        assert client.announce(work.ticket, answer()).verdict == pb.SEND
        here.grid.cancel(first)
        client.hear("cancel")
        ids = here.grid.push_messages([message()])
        client.work()
        assert client.send(answer()).verdict == pb.ACCEPTED
        [reply] = replies(here.grid, ids, 0.3)
        assert reply.metadata.reply_to_message_id == ids[0]

    def test_a_result_that_was_no_good_is_taken_back(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        client.announce(work.ticket, answer())
        client.send(answer())
        assert len(replies(here.grid, ids, 0.3)) == 1
        here.grid.refuse(ids[0], "nan: a contains NaN")
        ack = client.hear("ack")
        assert (ack.ticket, ack.verdict) == (work.ticket, pb.REFUSED)
        assert "contains NaN" in ack.reason
        assert client.announce(work.ticket, answer()).verdict == pb.REFUSED
        here.grid.refuse("no such message", "nan")  # it may have been forgotten


@pytest.mark.grpc
class TestOneClientsMatter:
    """Whatever is wrong with one client, or with what we make of it, it is that client's alone."""

    def test_work_that_cannot_be_made_ready_fails_by_its_code(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        here.invite("ann", "bob")
        expected = here.grid._terms.expected

        def only_bob(asked: Message) -> Any:
            if asked.metadata.dst_node_id == 1:
                raise KeyError(4)
            return expected(asked)

        object.__setattr__(here.grid._terms, "expected", only_bob)
        here.script("ann").join()
        bob = here.script("bob").join()
        ids = here.grid.push_messages([message(1), message(2)])
        work, _ = bob.work()
        bob.announce(work.ticket, answer())
        bob.send(answer())
        found = {r.metadata.reply_to_message_id: r for r in replies(here.grid, ids, 0.4)}
        assert found[ids[0]].error.code == PLAN_FAILED
        assert "KeyError: 4" in (found[ids[0]].error.reason or "")
        assert not found[ids[1]].has_error()

    def test_an_offer_that_nobody_can_weigh_is_refused_and_named(
        self, place: Callable[..., Place]
    ) -> None:
        def weigh(site: Site) -> str | None:
            if site.rank == 4:
                raise KeyError(4)
            return None

        here = place(objection=weigh)
        here.script("bob").join()
        client = here.script("ann")
        client.hello()
        said = refusal(client, rank=4)
        assert "KeyError: 4" in said.reason and not said.retry
        assert here.told == [f"ann was refused: {said.reason}"]
        assert here.grid.turned_away == {"ann": said.reason}
        assert here.grid.connected == {"bob"}
        here.script("ann", "two").join()
        until(lambda: not here.grid.turned_away)

    @pytest.mark.parametrize(
        ("offer", "why"),
        [
            ({"memory_mib": float("nan")}, "nan MiB"),
            ({"memory_mib": float("inf")}, "inf MiB"),
            ({"memory_mib": -5.0}, "-5.0 MiB"),
            ({"examples": 2**63}, "impossible number"),
        ],
    )
    def test_numbers_that_are_none_are_refused(
        self, place: Callable[..., Place], offer: dict[str, Any], why: str
    ) -> None:
        client = place().script("ann")
        client.hello()
        assert why in refusal(client, **offer).reason

    def test_a_reason_is_told_once_however_often_a_client_comes(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        for _ in range(5):
            client = here.script("ann", beats=False)
            client.hello(versions={"fedft": "9.9.9"})
            client.hear("refusal")
        assert len(here.told) == 1 and "9.9.9" in here.told[0]
        for number in range(100):  # nor does it take more room, whoever comes
            stranger = here.script("ann", beats=False)
            stranger.hello(site=f"eve-{number}")
            stranger.hear("refusal")
            stranger.close()
        assert len(here.grid.turned_away) <= 32

    def test_a_client_that_leaves_before_it_has_joined_is_named(
        self, place: Callable[..., Place]
    ) -> None:
        """It refuses the run itself: its model is another one."""
        here = place()
        client = here.script("ann")
        client.hello()
        client.hear("task")
        client.say(goodbye=pb.Goodbye(reason="the base model here is another one"))
        until(lambda: bool(here.told))
        assert here.told == ["ann left before it had joined: the base model here is another one"]

    def test_what_clients_do_is_known(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann", beats=False)
        client.hello()
        client.hear("task")
        client.say(heartbeat=pb.Heartbeat(activity=pb.LOADING))
        until(lambda: here.grid.doing == {"ann": "loading the model"})
        client.offer()
        client.hear("welcome")
        client.say(heartbeat=pb.Heartbeat(activity=pb.TRAINING, round=3))
        until(lambda: here.grid.doing == {"ann": "training round 3"})
        client.say(heartbeat=pb.Heartbeat())  # an older client says nothing
        until(lambda: here.grid.doing == {})
        client.close()
        until(lambda: not here.grid.connected)
        assert here.grid.doing == {}


def header(**changes: Any) -> pb.Content:
    """The header of a good answer, with other values in its first array."""
    good = describe(answer())
    for key, value in changes.items():
        if key == "shape":
            del good.records[0].arrays[0].shape[:]
            good.records[0].arrays[0].shape.extend(value)
        else:
            setattr(good.records[0].arrays[0], key, value)
    return good


BAD = {
    "size": {"size": 4 * 2**40},
    "shape": {"shape": (1, 128)},
    "keys": {"name": "../../etc/passwd"},
    "dtype": {"dtype": "object"},
}


@pytest.mark.grpc
class TestHostile:
    @pytest.mark.parametrize("reason", sorted(BAD))
    def test_a_bad_header_costs_nothing_but_the_clients_place(
        self, place: Callable[..., Place], reason: str
    ) -> None:
        """Rows 33, 36, 37, 39, 42 and 43, before a byte is taken."""
        here = place()
        client = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = client.work()
        before = psutil.Process().memory_info().rss
        client.say(result=pb.Result(ticket=work.ticket, content=header(**BAD[reason])))
        ack = client.hear("ack")
        assert (ack.verdict, ack.reason.split(":")[0]) == (pb.REFUSED, reason)
        assert psutil.Process().memory_info().rss - before < 10 * 2**20
        [reply] = replies(here.grid, ids, 0.3)
        assert reply.error.code == REPLY_REFUSED
        assert (reply.error.reason or "").startswith(reason)

    def test_without_the_check_a_header_of_terabytes_is_let_in(
        self, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Positive control."""
        here = place()
        client = here.script("ann").join()
        here.grid.push_messages([message()])
        work, _ = client.work()
        monkeypatch.setattr(framing, "check", lambda *_: 4 * 2**40)
        client.say(result=pb.Result(ticket=work.ticket, content=header(**BAD["size"])))
        assert client.hear("ack").verdict == pb.SEND

    def test_more_bytes_than_declared_are_refused(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        here.grid.push_messages([message()])
        work, _ = client.work()
        assert client.announce(work.ticket, answer()).verdict == pb.SEND
        client.say(chunk=pb.Chunk(data=b"x" * 500_000))
        assert client.hear("ack").verdict == pb.REFUSED

    def test_bytes_that_nobody_asked_for_end_the_stream(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann").join()
        client.say(chunk=pb.Chunk(data=b"x"))
        assert "nobody asked" in client.hear("refusal").reason
        assert client.ended()

    def test_a_message_over_the_limit_ends_the_stream_and_no_other(
        self, place: Callable[..., Place]
    ) -> None:
        """Row 43."""
        here = place()
        big, good = here.script("ann").join(), here.script("bob").join()
        big.say(chunk=pb.Chunk(data=b"x" * (framing.MAX_MESSAGE_BYTES + 1)))
        assert big.ended()
        ids = here.grid.push_messages([message(2)])
        work, _ = good.work()
        good.announce(work.ticket, answer())
        good.send(answer())
        assert len(replies(here.grid, ids, 0.3)) == 1

    @pytest.mark.parametrize("rate", [16_384.0, 0.01])
    def test_an_upload_that_trickles_is_cut(self, place: Callable[..., Place], rate: float) -> None:
        """Row 43, slow-loris; with a rate of nothing, the positive control, it goes on."""
        shapes = {"a": (64, 128)}
        timing = Timing(heartbeat=0.2, silence=2.0, stall=0.3, rate=rate)
        here = place(timing=timing, shapes=shapes)
        client = here.script("ann").join()
        here.grid.push_messages([message(record=arrays(shapes))])
        work, _ = client.work()
        back = RecordDict({"arrays": arrays(shapes)})
        assert client.announce(work.ticket, back).verdict == pb.SEND
        cut = False
        for _ in range(20):
            client.say(chunk=pb.Chunk(data=b"x"))
            time.sleep(0.15)
            with contextlib.suppress(queue.Empty):
                heard = client._in.get_nowait()
                assert heard is not None and "too slow" in heard.refusal.reason
                cut = True
                break
        assert cut == (rate > 1)

    def test_silence_is_noticed(self, place: Callable[..., Place]) -> None:
        here = place()
        client = here.script("ann", beats=False).join()
        assert client.ended(5.0)
        until(lambda: not here.grid.connected)
        assert "nothing was heard for 2 s" in here.audit()[-1]["why"]

    def test_a_stream_that_never_says_hello_is_closed(self, place: Callable[..., Place]) -> None:
        here = place()
        assert here.script("ann", beats=False).ended(5.0)

    def test_bytes_that_are_no_message_leave_the_server_standing(
        self, place: Callable[..., Place]
    ) -> None:
        """Row 44 in small."""
        here = place()
        rng = np.random.default_rng(0)
        with grpc.insecure_channel(f"127.0.0.1:{here.grid.port}") as channel:
            raw = channel.stream_stream("/fedft.link.v1.Federation/Session")
            for _ in range(50):
                call = raw(iter([rng.bytes(int(rng.integers(1, 2000))) for _ in range(3)]))
                with contextlib.suppress(grpc.RpcError):
                    list(call)
        here.script("ann").join()


def refusal(script: Script, **offer: Any) -> pb.Refusal:
    script.hear("task")
    script.offer(**offer)
    return script.hear("refusal")


@pytest.mark.grpc
class TestJoining:
    def test_another_version_is_refused_with_both(self, place: Callable[..., Place]) -> None:
        """Row 47."""
        here = place()
        for changes in ({"versions": {"fedft": "9.9.9"}}, {"protocol": 99}):
            client = here.script("ann", beats=False)
            client.hello(**changes)
            said = client.hear("refusal")
            assert said.mismatch and VERSIONS["fedft"] in said.reason
            assert "9.9.9" in said.reason or "99" in said.reason

    @pytest.mark.parametrize("name", sorted(HASHES))
    def test_other_models_tokenizers_and_data_are_refused(
        self, place: Callable[..., Place], name: str
    ) -> None:
        """Rows 48 and 49."""
        client = place().script("ann")
        client.hello()
        said = refusal(client, hashes=pb.Hashes(**{**HASHES, name: "other"}))
        assert said.mismatch and name.replace("_", " ") in said.reason and "other" in said.reason

    def test_a_site_without_examples_is_told_at_once(self, place: Callable[..., Place]) -> None:
        """Row 29."""
        here = place()
        client = here.script("ann")
        client.hello()
        assert "no training examples" in refusal(client, examples=0).reason
        assert not here.grid.connected

    def test_an_objection_is_the_refusal(self, place: Callable[..., Place]) -> None:
        """Row 28."""
        here = place(objection=lambda site: f"needs 900 MiB, has {site.memory_mib:.0f}")
        client = here.script("ann")
        client.hello()
        assert refusal(client, memory_mib=100.0).reason == "needs 900 MiB, has 100"

    def test_strangers_and_the_revoked_are_turned_away(self, place: Callable[..., Place]) -> None:
        """Row 59."""
        here = place()
        here.invite("ann")
        stranger = here.script("ann")
        stranger.hello(site="eve")
        assert "not registered" in stranger.hear("refusal").reason
        client = here.script("ann").join()
        here.registry.revoke("ann", "laptop stolen")
        start = time.monotonic()
        assert "laptop stolen" in client.hear("refusal").reason
        assert time.monotonic() - start < 1.0
        until(lambda: not here.grid.connected)
        again = here.script("ann")
        again.hello()
        assert not again.hear("refusal").retry
        refused = [line for line in here.audit() if line["event"] == "refused"]
        assert {line["who"] for line in refused} >= {"ann"}
        assert any("laptop stolen" in line["why"] for line in refused)

    def test_a_second_machine_waits_until_the_first_is_gone(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        here.script("ann", "one").join()
        second = here.script("ann", "two")
        second.hello()
        assert second.hear("refusal").retry
        same = here.script("ann", "one").join()  # its own connection broke: the new one counts
        ids = here.grid.push_messages([message()])
        same.work()
        here.grid.cancel(ids)

    def test_a_port_that_is_taken_is_an_error(self, place: Callable[..., Place]) -> None:
        here = place()
        terms = Terms("run", "{}", HASHES, lambda message: {})
        address = Address(port=here.grid.port, insecure=True)
        with pytest.raises(EnvironmentFailure, match="port is taken"):
            GrpcGrid(terms, address, here.registry, None, Audit(here.folder))

    def test_health_is_served(self, place: Callable[..., Place]) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with grpc.insecure_channel(f"127.0.0.1:{place().grid.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", hub_module.SERVICE):
                reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING

    def test_no_tls_has_to_be_asked_for(self, tmp_path: Path) -> None:
        """Row 57."""
        terms = Terms("run", "{}", HASHES, lambda message: {})
        with pytest.raises(SecurityRefusal):
            GrpcGrid(terms, Address(), Registry(tmp_path), None, Audit(tmp_path))


CROWD = """
import asyncio, json, sys
from flwr.app import MetricRecord, RecordDict
from fedft.clients.work import Connection, Offer
from fedft.clients.session import Session
from fedft.core.link.secrets import Credentials

class Echo:
    def load(self, run, task, hashes):
        return Offer(5, None, None, hashes)
    def expected(self, plan, header):
        return {r.name: {a.name: tuple(a.shape) for a in r.arrays} for r in header.records}
    def work(self, ticket, plan, content):
        metrics = MetricRecord({"num-examples": 5})
        return RecordDict({"arrays": content.array_records["arrays"], "metrics": metrics})
    def judged(self, ticket, *, counted):
        pass

async def main(target, sites):
    own = {name: Credentials(*map(str.encode, pem)) if pem else None for name, pem in sites.items()}
    sessions = [Session(Connection(target, *site), Echo()) for site in own.items()]
    await asyncio.gather(*(session.attend() for session in sessions))

asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
"""
"""Well-behaved clients, many in one process."""


def enrolled(here: Place, name: str) -> list[str]:
    """A site that has joined before: its authority, certificate and key; nothing without TLS."""
    if here.authority is None:
        here.invite(name)
        return []
    address = Address(port=here.grid.port)
    kit = here.registry.invite(name, here.authority, address)
    key = new_key()
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
    pem = csr.public_bytes(serialization.Encoding.PEM)
    certificate = here.registry.enrol(serial, pem, here.authority)
    return [kit.ca, certificate.decode(), key_pem(key).decode()]


@contextlib.contextmanager
def crowd(here: Place, names: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    sites = {name: enrolled(here, name) for name in names}
    command = [sys.executable, "-c", CROWD, f"127.0.0.1:{here.grid.port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(sites).encode())
        process.stdin.close()
        try:
            assert here.grid.wait_connected(lambda there: set(names) <= there, 60)
            yield process
        finally:
            process.kill()


@pytest.mark.grpc
class TestManyAndFast:
    PLAIN = {f"t{i}": (32, 96) for i in range(24)}  # 0.29 MB

    def test_a_round_trip_of_a_small_adapter_takes_milliseconds(
        self, place: Callable[..., Place]
    ) -> None:
        here = place(shapes=self.PLAIN, timing=Timing())
        record, taken = arrays(self.PLAIN), []
        with crowd(here, ["ann"]) as process:
            for round_ in range(1, 61):
                start = time.perf_counter()
                asked = [message(1, round_, record)]
                [reply] = here.grid.send_and_receive(asked, timeout=20)
                taken.append(time.perf_counter() - start)
                assert not reply.has_error()
            here.grid.drain(finished=True, reason="over")
            assert process.wait(10) == 0
        assert statistics.median(taken) < 0.05

    def test_a_hundred_clients_at_once_are_served_in_bounded_memory(
        self, place: Callable[..., Place]
    ) -> None:
        """Row 27: none is refused; memory is that of the replies, whatever the number of rounds."""
        here = place(shapes=self.PLAIN, timing=Timing(), tls=True)
        names = [f"site-{i:03d}" for i in range(100)]
        record = arrays(self.PLAIN)
        replies_bytes = 100 * sum(len(array.data) for array in record.values())
        own, peaks = psutil.Process(), []
        with crowd(here, names):
            before = own.memory_info().rss
            for round_ in range(1, 7):
                asked = [message(node, round_, record) for node in range(1, 101)]
                found = here.grid.send_and_receive(asked, timeout=60)
                assert len(found) == 100 and not any(reply.has_error() for reply in found)
                peaks.append(own.memory_info().rss - before)
                del found
        print("MiB above the start", [p >> 20 for p in peaks])
        assert "refused" not in {line["event"] for line in here.audit()}
        # The replies of a round, twice over, and for each stream a few chunks on their way, which
        # Python, gRPC and TLS hold a copy of each, in both directions.
        assert max(peaks) < 2 * replies_bytes + len(names) * 8 * framing.CHUNK_BYTES
        assert max(peaks[3:]) - max(peaks[:3]) < replies_bytes  # it does not grow with the rounds


# ── framing, without a socket ─────────────────────────────────────────────────────────────────

NAMES = st.sampled_from(["a", "b", "../x", "", "a" * 600])
HEADERS = st.builds(
    pb.ArrayHeader,
    name=NAMES,
    dtype=st.sampled_from(["float32", "bfloat16", "object", "int8", "<f4"]),
    shape=st.lists(st.sampled_from([0, 1, 64, 128, 2**60]), max_size=4),
    format=st.sampled_from([NPY, BF16, "fedft.int8", "x", ""]),
    size=st.sampled_from([0, 1, 4 * 64 * 128, 4 * 64 * 128 + 128, 2**63]),
)
CONTENTS = st.builds(
    pb.Content,
    records=st.lists(
        st.builds(
            pb.Arrays,
            name=st.sampled_from(["arrays", "delta", ""]),
            arrays=st.lists(HEADERS, max_size=3),
        ),
        max_size=3,
    ),
)


@settings(max_examples=300, deadline=None)
@given(CONTENTS, st.lists(st.binary(max_size=200), max_size=5))
def test_whatever_is_declared_either_fits_or_is_rejected(
    header: pb.Content, pieces: list[bytes]
) -> None:
    """Row 44 for the header of a content: no other exception, and never more than the plan's bytes."""
    try:
        assembly = Assembly(header, {"arrays": SHAPES})
        assert assembly.declared <= sum(4 * 64 * 128 + FRAMING[NPY] for _ in SHAPES)
        for piece in pieces:
            assembly.feed(piece)
    except UpdateRejected as rejected:
        assert rejected.reason in {"schema", "keys", "dtype", "shape", "size", "metrics"}


def test_chunks_put_together_are_what_was_cut() -> None:
    shapes = {"a": (300, 1000), "b": (1,), "c": (0, 4), "d": (70, 1000)}
    content = RecordDict({"arrays": arrays(shapes), "metrics": MetricRecord({"n": 3, "loss": 0.5})})
    assembly = Assembly(describe(content), {"arrays": shapes})
    for data in chunks(content):
        assert len(data) <= framing.CHUNK_BYTES
        assembly.feed(data)
    back = assembly.content()
    assert {k: a.data for k, a in back["arrays"].items()} == {
        k: a.data for k, a in content["arrays"].items()
    }
    assert dict(back.metric_records["metrics"]) == {"n": 3, "loss": 0.5}


def test_the_digest_covers_everything_that_is_worked_on() -> None:
    digests = framing.Digests()
    one = digests.of(RecordDict({"arrays": arrays()}), "plan")
    assert one == framing.Digests().of(RecordDict({"arrays": arrays()}), "plan")
    others = [
        digests.of(RecordDict({"arrays": arrays()}), "another plan"),
        digests.of(RecordDict({"arrays": arrays(seed=1)}), "plan"),
        digests.of(RecordDict({"delta": arrays()}), "plan"),
        digests.of(RecordDict({"arrays": arrays({"a": (128, 64), "b": (128, 64)})}), "plan"),
    ]
    assert len({one, *others}) == 5
