"""What a peer says is bounded before it is kept; who says nothing takes no place from others."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedft.core.errors import EnvironmentFailure, UpdateRejected
from fedft.core.link import framing, limits
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import MAX_MESSAGE_BYTES, describe
from fedft.core.wire.dtypes import BF16
from fedft.server import audit as audit_module
from fedft.server.audit import Audit
from fedft.server.grids.allowance import Allowance
from fedft.server.grids.door import Room, peer_of
from fedft.server.status import closed
from fedft.server.validation import CHECK_FAILED, PLAN_FAILED, REPLY_REFUSED
from tests.server.crowded import Host, crowded
from tests.server.test_grpc_grid import (
    CROWD,
    Place,
    answer,
    message,
    place,
    replies,
)

__all__ = ["place"]

# ── texts ─────────────────────────────────────────────────────────────────────────────────────


def test_every_text_of_the_protocol_has_a_limit() -> None:
    assert set(limits.texts()) == set(limits.LIMITS)


def test_no_limit_is_without_need_as_long_as_a_message() -> None:
    """What is kept, or told to somebody, is short; what is parsed at once may be long."""
    whole = {name for name, most in limits.LIMITS.items() if most > limits.CSR}
    assert whole == {"Task.spec", "Work.plan", "Chunk.data"}


def filled(name: str, length: int) -> Any:
    """A message of which one field has a text of a length."""
    kind, field, *part = name.split(".")
    text: Any = "x" * length
    if name in ("EnrolRequest.csr", "EnrolReply.certificate", "Chunk.data"):
        text = text.encode()
    if part:
        text = {text: "v"} if part == ["key"] else {"k": text}
    return getattr(pb, kind)(**{field: text})


@pytest.mark.parametrize(
    "name", sorted(set(limits.LIMITS) - {"Task.spec", "Work.plan", "Chunk.data"})
)
def test_a_text_is_taken_up_to_its_limit(name: str) -> None:
    most = limits.LIMITS[name]
    limits.bounded(filled(name, most))
    with pytest.raises(limits.TooLong, match=name):
        limits.bounded(filled(name, most + 1))


def test_lists_have_a_limit() -> None:
    with pytest.raises(limits.TooLong, match=r"Hello\.versions has 65 entries"):
        limits.bounded(pb.Hello(versions={str(i): "1" for i in range(65)}))


def test_what_no_field_holds_is_dropped() -> None:
    """A field of a later version, or one made up to be kept."""
    stuffed = pb.Heartbeat.FromString(
        pb.Heartbeat(round=3).SerializeToString() + b"\xfa\x01\x05" + b"x" * 5
    )
    assert stuffed.ByteSize() == 10
    message = pb.FromSite(heartbeat=stuffed)
    assert limits.bounded(message).heartbeat.ByteSize() == 2


def test_a_format_of_a_tensor_is_short() -> None:
    array = pb.ArrayHeader(name="a", dtype="float32", shape=[1], format="x" * 65, size=4)
    content = pb.Content(records=[pb.Arrays(name="arrays", arrays=[array])])
    with pytest.raises(UpdateRejected, match="serialisation"):
        framing.check(content, {"arrays": {"a": (1,)}})
    content.records[0].arrays[0].format = "x" * 64
    with pytest.raises(UpdateRejected, match="serialisation"):  # short, and none that is known
        framing.check(content, {"arrays": {"a": (1,)}})
    content.records[0].arrays[0].format = BF16
    content.records[0].arrays[0].dtype, content.records[0].arrays[0].size = "bfloat16", 2
    assert framing.check(content, {"arrays": {"a": (1,)}}) == 2


# ── the audit ─────────────────────────────────────────────────────────────────────────────────


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_a_client_has_a_few_lines_of_a_kind_and_the_rest_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(audit_module.time, "monotonic", lambda: now[0])
    audit = Audit(tmp_path)
    for i in range(500):
        audit("stale", "ann", f"round {i}")
    audit("stale", "bob", "round 1")
    audit("joined", "ann")
    assert [line["who"] for line in lines(tmp_path)] == ["ann"] * audit_module.LINES + [
        "bob",
        "ann",
    ]
    now[0] = 61.0
    audit("stale", "ann", "round 501")
    assert lines(tmp_path)[-1]["left_out"] == 500 - audit_module.LINES


def test_without_the_allowance_every_line_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "LINES", 10**9)
    audit = Audit(tmp_path)
    for i in range(500):
        audit("stale", "ann", f"round {i}")
    assert len(lines(tmp_path)) == 500


def test_the_audit_is_rotated_by_its_size_and_keeps_its_newest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "FILE_BYTES", 4000)
    audit = Audit(tmp_path)
    for i in range(200):
        audit("refused", f"client-{i}", "x" * 10_000)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["audit-1.jsonl", "audit-2.jsonl", "audit-3.jsonl", "audit.jsonl"]
    assert max(sizes.values()) <= 4000
    assert lines(tmp_path)[-1]["who"] == "client-199"
    older = [json.loads(x)["who"] for x in (tmp_path / "audit-1.jsonl").read_text().splitlines()]
    assert older[-1] == f"client-{199 - len(lines(tmp_path))}"


def test_what_the_audit_remembers_is_bounded(tmp_path: Path) -> None:
    audit = Audit(tmp_path)
    for i in range(2 * audit_module.REMEMBERED):
        audit("refused", f"{i}" * 5000, "y" * 5000, peer="z" * 5000)
    assert len(audit._recent) == len(audit._windows) == audit_module.REMEMBERED
    assert max(len(text) for key in audit._recent for text in key) <= 500
    assert max(map(len, (tmp_path / "audit.jsonl").read_text().splitlines())) < 2000


def test_a_full_disk_costs_no_client_its_place(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    audit = Audit(tmp_path)
    audit.quietly("joined", "ann")
    with pytest.raises(EnvironmentFailure):
        audit("joined", "bob")


# ── allowances, labels, rooms ─────────────────────────────────────────────────────────────────


def test_an_allowance_gives_its_burst_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fedft.server.grids.allowance.time.monotonic", lambda: now[0])
    allowance = Allowance(3, 2.0)
    assert [allowance.take() for _ in range(3)] == [0, 0, 0]
    assert allowance.take() == 0.5
    now[0] = 0.5
    assert allowance.take() == 0
    assert allowance.take() > 0
    now[0] = 1000
    assert [allowance.take() for _ in range(3)] == [0, 0, 0]
    assert allowance.take() > 0


def test_labels_are_a_few_plain_words() -> None:
    assert closed({"shape": 2.0, "nan": 1.0}) == {"shape": 2.0, "nan": 1.0}
    assert closed({"shape": 2.0, "x\n": 3.0, "x" * 99: 4.0}) == {"shape": 2.0, "other": 7.0}
    many = closed({f"word-{i}": 1.0 for i in range(500)})
    assert len(many) == 41 and many["other"] == 460


@pytest.mark.parametrize(
    ("limit", "used", "most"), [(1024, 60, 708), (256, 60, 132), (64, 60, 8), (8192, 60, 2048)]
)
def test_connections_leave_descriptors_for_the_run(limit: int, used: int, most: int) -> None:
    room = Room.within(limit, used)
    assert room.most == most
    assert room.strangers < most and room.an_address <= most // 2


def strangers(counts: dict[str, int]) -> list[tuple[str, int]]:
    return [(address, port) for address, count in counts.items() for port in range(count)]


def test_of_one_address_the_oldest_are_closed() -> None:
    room = Room(most=100, strangers=75, an_address=30)
    assert room.surplus(strangers({"a": 30, "b": 30}), 0) == []
    assert room.surplus(strangers({"a": 33, "b": 30}), 0) == [("a", 0), ("a", 1), ("a", 2)]


def test_of_many_addresses_those_with_the_most_make_room() -> None:
    room = Room(most=100, strangers=20, an_address=30)
    closed_ = room.surplus(strangers({"a": 3, "b": 20, "c": 5}), 0)
    assert len(closed_) == 8 and {address for address, _ in closed_} == {"b"}
    alike = room.surplus(strangers({str(i): 1 for i in range(30)}), 0)
    assert alike == [(str(i), 0) for i in range(10)]


def test_clients_count_against_the_room_of_strangers() -> None:
    room = Room(most=100, strangers=75, an_address=50)
    assert len(room.surplus(strangers({"a": 40}), 80)) == 20


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:10.0.0.1:5000", ("10.0.0.1", 5000)),
        ("ipv6:%5B::1%5D:5000", ("::1", 5000)),
        ("ipv6:[::ffff:10.0.0.1]:5000", ("10.0.0.1", 5000)),
        ("ipv6:[fe80::1%eth0]:5000", ("fe80::1", 5000)),
        ("unix:", None),
        ("", None),
    ],
)
def test_the_other_end_is_read_as_grpc_writes_it(text: str, peer: Any) -> None:
    assert peer_of(text) == peer


# ── over gRPC ─────────────────────────────────────────────────────────────────────────────────


def rss_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.grpc
class TestWhatAClientSays:
    """The server is in this process."""

    @pytest.mark.parametrize(
        "name", sorted(n for n in limits.LIMITS if n.split(".")[0] in ("Hello", "Hashes"))
    )
    def test_a_megabyte_in_a_field_of_the_opening_is_refused_by_name(
        self, name: str, place: Callable[..., Place]
    ) -> None:
        here = place()
        script = here.script("ann")
        kind, field, *_ = name.split(".")
        if kind == "Hashes":
            script.hello()
            script.hear("task")
            script.offer(hashes=filled(name, 10**6))
        else:
            script.hello(**{field: {"k": "x" * 10**6} if "." in name[6:] else "x" * 10**6})
        assert field in script.hear("refusal").reason
        assert len((here.folder / "audit.jsonl").read_bytes()) < 2000
        assert all(len(line) < 3000 for line in here.told)

    @pytest.mark.parametrize("times", [40, pytest.param(600, marks=pytest.mark.slow)])
    def test_megabytes_in_every_field_of_results_leave_no_trace(
        self, times: int, place: Callable[..., Place]
    ) -> None:
        here = place()
        good = here.script("bob").join()
        fields = ("run", "site", "kind", "base")
        before = None
        for i in range(times):
            script = here.script("ann", f"{i}").join()
            long = {fields[i % 4]: f"{i}" + "x" * (MAX_MESSAGE_BYTES - 2000)}
            script.say(result=pb.Result(ticket=pb.Ticket(**long)))
            assert "Ticket." in script.hear("refusal").reason
            assert script.ended()
            here.scripts.remove(script)
            script.close()
            before = before or (rss_mib() if i >= 20 else None)
        assert before is not None
        assert rss_mib() - before < 30
        assert (here.folder / "audit.jsonl").stat().st_size < 200_000
        ids = here.grid.push_messages([message(node=here.registry.client("bob").node)])
        work, _ = good.work()
        assert good.announce(work.ticket, answer()).verdict == pb.SEND
        good.send(answer())
        assert not replies(here.grid, ids, 10)[0].has_error()

    @pytest.mark.parametrize(
        "many", [1000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
    )
    def test_stale_results_are_told_so_and_cost_neither_memory_nor_disk(
        self, many: int, place: Callable[..., Place]
    ) -> None:
        here = place()
        script = here.script("ann").join()
        header = describe(answer())
        before = rss_mib()
        for i in range(many):
            ticket = pb.Ticket(run="run", round=i, site="ann", kind="train", base=f"{i:0128d}")
            script.say(result=pb.Result(ticket=ticket, content=header))
            if i % 50 == 49:
                heard = [script.hear("ack", 30).verdict for _ in range(50)]
                assert set(heard) == {pb.STALE}
        assert rss_mib() - before < 30
        assert len([x for x in here.audit() if x["event"] == "stale"]) <= 30 * (1 + many // 5000)

    def test_a_flood_of_heartbeats_is_dropped_and_nobody_waits_for_it(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        flood = here.script("ann").join()
        good = here.script("bob").join()
        for i in range(1, 3001):
            flood.say(heartbeat=pb.Heartbeat(activity=pb.TRAINING, round=i))
        ids = here.grid.push_messages([message(node=here.registry.client("bob").node)])
        work, _ = good.work()
        good.announce(work.ticket, answer())
        good.send(answer())
        assert not replies(here.grid, ids, 10)[0].has_error()
        assert "training round" in here.grid.doing["ann"]
        assert int(here.grid.doing["ann"].split()[-1]) < 2000  # the others were not taken

    @pytest.mark.parametrize("code", [REPLY_REFUSED, PLAN_FAILED, CHECK_FAILED])
    def test_no_client_gives_a_code_of_the_servers(
        self, code: int, place: Callable[..., Place]
    ) -> None:
        here = place()
        script = here.script("ann").join()
        ids = here.grid.push_messages([message()])
        work, _ = script.work()
        failure = pb.Failure(code=code, reason="chosen_label: x")
        script.say(result=pb.Result(ticket=work.ticket, failure=failure))
        [reply] = replies(here.grid, ids, 10)
        assert reply.error.code not in (REPLY_REFUSED, PLAN_FAILED, CHECK_FAILED)


@pytest.mark.grpc
class TestOneStream:
    def test_a_second_machine_is_refused_while_the_first_loads(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        first = here.script("ann", "one")
        first.hello()
        first.hear("task")
        second = here.script("ann", "two")
        second.hello()
        assert "another machine" in second.hear("refusal").reason
        first.offer()
        first.hear("welcome")

    def test_a_client_that_comes_again_ends_its_own_older_stream(
        self, place: Callable[..., Place]
    ) -> None:
        here = place()
        old = here.script("ann", "one")
        old.hello()
        old.hear("task")
        new = here.script("ann", "one").join()
        assert old.ended()
        ids = here.grid.push_messages([message()])
        new.work()
        here.grid.cancel(ids)

    def test_who_is_revoked_while_it_loads_is_cut(self, place: Callable[..., Place]) -> None:
        here = place()
        script = here.script("ann")
        script.hello()
        script.hear("task")
        here.registry.revoke("ann", "stolen")
        assert "stolen" in script.hear("refusal").reason

    def test_loading_is_a_lease_that_heartbeats_renew(self, place: Callable[..., Place]) -> None:
        here = place()  # a silence of two seconds
        quiet, alive = here.script("ann", beats=False), here.script("bob")
        for script in (quiet, alive):
            script.hello()
            script.hear("task")
        assert quiet.ended(10)
        alive.offer()
        alive.hear("welcome")


# ── descriptors ───────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def idle(port: int, many: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with contextlib.ExitStack() as stack:
        found: list[socket.socket] = []
        for _ in range(many):
            one = stack.enter_context(socket.socket())
            one.settimeout(5)
            with contextlib.suppress(OSError):
                one.connect(("127.0.0.1", port))
            found.append(one)
        yield found


@contextlib.contextmanager
def well_behaved(host: Host, names: Sequence[str]) -> Iterator[None]:
    sites = host.sites()
    command = [sys.executable, "-c", CROWD, f"127.0.0.1:{host.port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({name: sites[name] for name in names}).encode())
        process.stdin.close()
        try:
            yield
        finally:
            process.kill()


SIZES = [(256, 330), pytest.param(1024, 1100, marks=pytest.mark.slow)]
"""Descriptors of the server, and connections that say nothing."""


@pytest.mark.grpc
class TestConnections:
    @pytest.mark.parametrize(("limit", "many"), SIZES)
    def test_idle_ones_leave_room_for_the_run_and_for_clients(
        self, limit: int, many: int, tmp_path: Path
    ) -> None:
        with crowded(tmp_path / "run", limit=limit) as host, idle(host.port, many):
            assert host.ask("write") == {"error": None}
            with well_behaved(host, ["site-000"]):
                host.until("joined", lambda found: found["joined"] == 1)
                with idle(host.port, many // 2):  # and again, while it is there
                    assert host.ask("round") == {"answered": True}
                    found = host.ask("use")
            assert found["descriptors"] < limit - 40
            assert host.ask("write") == {"error": None}

    def test_without_the_bound_the_run_cannot_write(self, tmp_path: Path) -> None:
        with crowded(tmp_path / "run", limit=256, guarded=False) as host, idle(host.port, 330):
            found = host.until("write", lambda found: found["error"] is not None, 10)
            assert found["error"] == "Too many open files"

    @pytest.mark.parametrize("many", [120, pytest.param(700, marks=pytest.mark.slow)])
    def test_streams_on_which_nobody_says_hello_do_not_pile_up(
        self, many: int, tmp_path: Path
    ) -> None:
        with crowded(tmp_path / "run", clients=2) as host, contextlib.ExitStack() as stack:
            sites = host.sites()
            for _ in range(many):
                channel, stub = host.stub(sites["site-001"])
                stack.callback(channel.close)
                hanging = stub.Session(_silence(stack))
                stack.callback(hanging.cancel)
            with well_behaved(host, ["site-000"]):
                host.until("joined", lambda found: found["joined"] == 1)
                assert host.ask("round") == {"answered": True}
            found = host.ask("use")
            assert found["half_open"] <= 8  # of one certificate, four at a time
            assert found["descriptors"] < 1024 - 200

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_a_hundred_clients_and_three_hundred_rounds_take_no_more_and_more(
        self, tmp_path: Path
    ) -> None:
        used: list[dict[str, Any]] = []
        with (
            crowded(tmp_path / "run", limit=2048, clients=100) as host,
            well_behaved(host, [*host.sites()]),
        ):
            host.until("joined", lambda found: found["joined"] == 100, 120)
            for round_ in range(300):
                assert host.ask("all") == {"answered": 100}, round_
                used.append(host.ask("use"))
        assert max(u["mib"] for u in used[200:]) - max(u["mib"] for u in used[50:100]) < 20
        assert len({u["descriptors"] for u in used[50:]}) < 10


def _silence(stack: contextlib.ExitStack) -> Iterator[pb.FromSite]:
    import threading

    over = threading.Event()
    stack.callback(over.set)
    while not over.wait(0.5):
        pass
    yield from ()
