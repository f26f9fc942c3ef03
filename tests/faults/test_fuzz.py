"""Row 44: whatever comes in, from a stream, a file or a disk, is taken as it is meant or refused.

Every target starts from something good and damages it. What is not refused by one of the named
errors must be sound: any other exception fails, and so does a target that takes or refuses
everything it is given. The long tier tries 100,000 cases and more:

    python -m pytest -m slow --timeout 3600 tests/faults/test_fuzz.py
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedft.clients import stream as client_stream
from fedft.clients.session import Session
from fedft.clients.work import Offer
from fedft.core.digest import state_digest
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    FedftError,
    IntegrityError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.link import framing
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Assembly, Ticket, describe
from fedft.core.link.secrets import Kit, new_key, write_private
from fedft.core.link.stream import Broken
from fedft.core.record.rundir import RunDir
from fedft.core.types import Adapter, Factors, ServerState, Site, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.dtypes import BF16, FRAMING, NPY
from fedft.server import checkpoints, identity
from fedft.server.checkpoints import Checkpoints
from fedft.server.grids.flower import adopt_identity
from fedft.server.grids.hub import Hub
from fedft.server.grids.outbox import Outbox, Pending
from fedft.server.grids.stream import Terms, Timing
from fedft.server.validation import REPLY_REFUSED, Limits, validate

SITE = Site("ann", 5)
Loop = asyncio.AbstractEventLoop

NAMES = {"base_model": "m", "tokenizer": "t", "data_schema": "d"}


def adapter(value: float) -> Adapter:
    factors = Factors(torch.full((2, 5), value), torch.full((4, 2), value), 2.0)
    return Adapter({"q": factors}, {"base_model.model.classifier.weight": torch.zeros(3, 4)})


PLAN = TrainPlan(adapter(1.0), round=1, site=SITE.name)
SHAPES = {name: tuple(tensor.shape) for name, tensor in PLAN.sent().items()}
EXPECTED = {"arrays": SHAPES}
ANSWER = codec.reply_content(PLAN.sent(), 5, {"loss": 1.0})
HEADER = describe(ANSWER)
BODY = b"".join(framing.chunks(ANSWER))


# ── damage ────────────────────────────────────────────────────────────────────────────────────

Edit = tuple[str, int, bytes]
EDITS = st.just([]) | st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "remove", "cut", "repeat"]),
        st.integers(0, 2**14),
        st.binary(max_size=9),
    ),
    max_size=4,
)


def damaged(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The bytes after some edits, each at a place and with bytes of its own."""
    for kind, place, piece in edits:
        at = place % (len(data) + 1)
        head, tail = data[:at], data[at:]
        data = {
            "replace": head + piece + tail[len(piece) :],
            "insert": head + piece + tail,
            "remove": head + tail[len(piece) :],
            "cut": head,
            "repeat": data + tail[:64],
        }[kind]
    return data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../../x", "\x00", "a" * 5000, "ann", "\u202eevil"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


# ── what is damaged ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Target:
    """Something that takes what others made.

    Attributes:
        cases: what to give it.
        take: gives it; False where it was refused by an error that is meant for that.
    """

    cases: st.SearchStrategy[Any]
    take: Callable[[Any], bool]


def sound(update: Any) -> bool:
    assert {name: tuple(t.shape) for name, t in update.tensors.items()} == SHAPES
    assert all(bool(torch.isfinite(t).all()) for t in update.tensors.values())
    assert 1 <= update.examples <= SITE.examples
    return True


def taken_result(case: tuple[list[Edit], list[Edit]]) -> bool:
    """A result on the wire: its header, then its bytes, then its numbers."""
    header, body = damaged(HEADER.SerializeToString(), case[0]), damaged(BODY, case[1])
    try:
        assembly = Assembly(pb.Content.FromString(header), EXPECTED)
        assert assembly.declared <= len(BODY) + len(SHAPES) * FRAMING[NPY]
        assembly.feed(body)
        if not assembly.complete:
            return False
        return sound(validate(assembly.content(), PLAN, SITE, Limits(update_norm=1e6)))
    except (DecodeError, UpdateRejected):
        return False


ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "float16", "bfloat16", "float64", "int8", "object", "<f4"]),
    st.sampled_from([(2, 5), (4, 2), (1, 5), (5,), (), (2**40, 2**40), (3, 4), (-1,)]),
    st.sampled_from(["numpy.ndarray", BF16, "torch.pickle", ""]),
    st.builds(
        damaged, st.sampled_from([a.data for a in ANSWER.array_records["arrays"].values()]), EDITS
    ),
)
COUNTS = st.one_of(st.integers(-(2**62), 2**62), st.floats(), st.just(5))


def taken_reply(case: tuple[dict[str, Array], Any, Any, str]) -> bool:
    """A reply as any grid hands it over."""
    arrays, examples, loss, name = case
    content = codec.reply_content(PLAN.sent(), 5, {})
    content["arrays"] = ArrayRecord({**content.array_records["arrays"], **arrays})
    content[name] = MetricRecord({"num-examples": examples, "loss": loss})
    try:
        return sound(validate(content, PLAN, SITE, Limits()))
    except UpdateRejected:
        return False


REPLIES = st.tuples(
    st.dictionaries(st.sampled_from([*SHAPES, "../../x"]), ARRAYS, max_size=2),
    COUNTS,
    st.one_of(COUNTS, st.lists(st.floats(), max_size=2)),
    st.sampled_from(["metrics", "metrics", "metrics", "more"]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


def kits(folder: Path, loop: Loop) -> Target:
    authority = identity.Authority(folder / "identity")
    registry = identity.Registry(folder / "identity")
    registry.invite("ann", authority, identity.Address(port=1)).write(folder / "ann.kit")
    good = (folder / "ann.kit").read_bytes()
    path = folder / "damaged.kit"
    write_private(path, good)

    def take(case: tuple[dict[str, Any], list[Edit]]) -> bool:
        fields, edits = case
        path.write_bytes(damaged(json.dumps({**json.loads(good), **fields}).encode(), edits))
        try:
            kit = Kit.read(path)
        except (ConfigError, SecurityRefusal):
            return False
        assert kit.insecure or kit.name == "ann"
        return True

    names = st.sampled_from([*json.loads(good), "more"])
    fields = st.one_of(st.just({}), st.dictionaries(names, JSON, max_size=2))
    return Target(st.tuples(fields, EDITS), take)


def requests(folder: Path, loop: Loop) -> Target:
    """What a site sends to have its key certified."""
    authority = identity.Authority(folder / "authority")
    registry = identity.Registry(folder / "authority")
    kit = registry.invite("ann", authority, identity.Address(port=1))
    serial = identity.serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "ann")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    signed = builder.sign(new_key(), hashes.SHA256())
    pem, der = (
        signed.public_bytes(form)
        for form in (serialization.Encoding.PEM, serialization.Encoding.DER)
    )

    def take(case: tuple[bool, list[Edit]]) -> bool:
        whole, edits = case
        data = damaged(pem, edits) if whole else repacked(damaged(der, edits))
        try:
            made = registry.enrol(serial, data, authority)
        except SecurityRefusal:
            return False
        subject = x509.load_pem_x509_certificate(made).subject
        assert subject.rfc4514_string() == "CN=ann"
        return True

    return Target(st.tuples(st.booleans(), EDITS), take)


def repacked(der: bytes) -> bytes:
    """DER in PEM's clothes, so that damage reaches what is inside."""
    import base64

    text = base64.encodebytes(der)
    name = b"CERTIFICATE REQUEST"
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (name, text, name)


def stored(folder: Path, loop: Loop) -> Target:
    """Two checkpoints, of which the newer is damaged, with its seals put right or not."""
    work = folder / "checkpoints"
    written = Checkpoints(work)
    for round_ in (1, 2):
        state = ServerState(adapter(float(round_)), round_, slots={"m": torch.ones(3)})
        written.commit(state, {"ann": {"b": torch.full((2,), float(round_))}}, {"r": round_})
    good = {path: path.read_bytes() for path in work.iterdir()}
    newest, older = (work / f"round-{n:06d}.json" for n in (2, 1))
    body = json.loads(good[newest])["body"]
    mine = {b["sha256"] for b in (body["state"], *body["packs"])}
    theirs = {b["sha256"] for b in json.loads(good[older])["body"]["packs"]}
    blobs = sorted(path for path in good if path.stem in mine - theirs)
    digests = {
        n: state_digest(ServerState(adapter(float(n)), n, slots={"m": torch.ones(3)}))
        for n in (1, 2)
    }

    def put(case: tuple[str, int, list[Edit], dict[str, Any]]) -> None:
        kind, which, edits, fields = case
        if kind == "manifest":
            newest.write_bytes(damaged(good[newest], edits))
        elif kind == "sealed":
            newest.write_bytes(checkpoints._sealed({**body, **fields}))
        else:
            path = blobs[which % len(blobs)]
            path.write_bytes(damaged(good[path], edits))

    def resealed_blob(edits: list[Edit]) -> None:
        """A blob that is damaged, and a manifest that vouches for it."""
        import hashlib

        data = damaged(good[work / f"{body['state']['sha256']}.safetensors"], edits)
        digest = hashlib.sha256(data).hexdigest()
        (work / f"{digest}.safetensors").write_bytes(data)
        blob = {"sha256": digest, "size": len(data)}
        newest.write_bytes(checkpoints._sealed({**body, "state": blob}))

    def take(case: tuple[str, int, list[Edit], dict[str, Any]]) -> bool:
        put(case) if case[0] != "vouched" else resealed_blob(case[2])
        try:
            found = Checkpoints(work).load()
        except (IntegrityError, EnvironmentFailure):
            return False
        finally:
            for path in work.iterdir():
                if path not in good:
                    path.unlink()
            for path, data in good.items():
                path.write_bytes(data)
        assert found is not None and found.state.round in digests
        if case[0] in ("manifest", "blob"):  # a seal that was not put right tells of any damage
            assert state_digest(found.state) == digests[found.state.round]
        assert bool(found.notes) == (found.state.round == 1)
        return found.state.round == 2

    fields = st.dictionaries(st.sampled_from([*body, "more"]), JSON, min_size=1, max_size=2)
    kinds = st.sampled_from(["manifest", "blob", "sealed", "vouched"])
    return Target(st.tuples(kinds, st.integers(0, 3), EDITS, fields), take)


def records(folder: Path, loop: Loop) -> Target:
    """The record of a run after a crash or a bad disk."""
    with RunDir.create(folder / "run") as run:
        run.write_config("seed = 0\n")
        for round_ in range(1, 5):
            run.append_client({"round": round_, "site": "ann"})
            run.append_round({"round": round_, "loss": 0.5})
    path = run.path / "rounds.jsonl"
    good = path.read_bytes()

    def take(edits: list[Edit]) -> bool:
        path.write_bytes(damaged(good, edits))
        try:
            found = RunDir.open(run.path).rounds()
        except IntegrityError:
            return False
        assert all(type(line["round"]) is int for line in found)
        return True

    return Target(EDITS, take)


# ── streams ───────────────────────────────────────────────────────────────────────────────────

_EOF: Any = vars(grpc.aio)["EOF"]


class Script:
    """One end of a stream, and the channel it comes from: says what it was given, then hangs up."""

    def __init__(self, words: Sequence[Any]) -> None:
        self._words = iter(words)
        self.heard: list[Any] = []

    async def read(self) -> Any:
        await asyncio.sleep(0)
        return next(self._words, _EOF)

    async def write(self, message: Any) -> None:
        self.heard.append(message)

    async def done_writing(self) -> None: ...
    def cancel(self) -> None: ...
    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def __aenter__(self) -> "Script":
        return self

    async def __aexit__(self, *_: object) -> None: ...
    def unary_unary(self, *_: Any, **__: Any) -> None: ...
    def stream_stream(self, *_: Any, **__: Any) -> Any:
        return lambda: self


def spoken(kind: Any, menu: Sequence[Any], choices: Sequence[tuple[int, list[Edit]]]) -> list[Any]:
    """Messages from a menu, some of them damaged; a stream ends at bytes that are no message."""
    said: list[Any] = []
    for index, edits in choices:
        try:
            word = menu[index % len(menu)]
            said.append(kind.FromString(damaged(word.SerializeToString(), edits)))
        except DecodeError:
            break
    return said


CHOICES = st.lists(st.tuples(st.integers(0, 63), EDITS), max_size=8)
CONVERSATIONS = st.tuples(st.integers(0, 4), CHOICES)
"""How much of a good conversation comes first, and what comes then."""

TICKET = Ticket("run", 1, "ann", "train", "base")
OTHERS = [
    Ticket("x", 1, "ann", "train", "base"),
    Ticket("run", 9, "ann", "evaluate", "base"),
    Ticket("run", 1, "bob", "train", "base"),
]


class Book:
    """The register, without its disk."""

    def clients(self) -> dict[str, identity.Client]:
        return {
            n: identity.Client(n, i, kit="insecure", invited="")
            for i, n in enumerate(("ann", "bob"), 1)
        }

    def joined(self, *_: Any) -> None: ...
    def dismissed(self, *_: Any) -> None: ...


class NoSurprise:
    """An audit that hears nothing of exceptions that nobody foresaw: the hub would live with them."""

    def __call__(self, event: str, who: str, why: str = "", **facts: Any) -> None:
        assert "cannot deal with" not in why, why

    quietly = __call__


def servers(folder: Path, loop: Loop) -> Target:
    """The server's end of a stream."""
    sizes = [len(BODY), len(BODY) // 2, 1, 0]
    chunks = [pb.FromSite(chunk=pb.Chunk(data=BODY[:size])) for size in sizes]
    hello = pb.Hello(protocol=framing.PROTOCOL, versions={"fedft": version("fedft")}, site="ann")
    offer = pb.Offer(examples=5, hashes=pb.Hashes(**NAMES))
    results = [
        pb.FromSite(result=pb.Result(ticket=t.message(), content=HEADER)) for t in (TICKET, *OTHERS)
    ]
    failure = pb.Failure(code=101, reason="no disk")
    good = [pb.FromSite(hello=hello), pb.FromSite(offer=offer), results[0], chunks[0]]
    menu = [
        *good,
        *results,
        *chunks,
        pb.FromSite(result=pb.Result(ticket=TICKET.message(), failure=failure)),
        pb.FromSite(result=pb.Result(ticket=TICKET.message())),
        pb.FromSite(heartbeat=pb.Heartbeat()),
        pb.FromSite(goodbye=pb.Goodbye(reason="x" * 2000)),
        pb.FromSite(),
    ]
    content = RecordDict({"config": ConfigRecord({"plan": "{}", "task": ""})})
    adopt_identity()

    def take(case: tuple[int, Any]) -> bool:
        terms = Terms("run", "{}", NAMES, lambda message: EXPECTED)
        outbox = Outbox(terms.run, terms.history)
        message = Message(content, 1, "train", group_id="1")
        outbox.post([Pending(TICKET, message, "{}", EXPECTED)])
        book: Any = Book()
        audit: Any = NoSurprise()
        hub = Hub(terms, outbox, book, None, audit, Timing())
        script = Script([*good[: case[0]], *spoken(pb.FromSite, menu, case[1])])
        loop.run_until_complete(hub.Session(None, script))
        assert not hub._streams and not outbox.connected
        answers = outbox.fetch()
        assert len(answers) <= 1
        if not answers:
            return False
        [(_, reply)] = answers
        if reply.has_error():
            return reply.error.code != REPLY_REFUSED
        with contextlib.suppress(UpdateRejected):
            sound(validate(reply.content, PLAN, SITE, Limits()))
        return True

    return Target(CONVERSATIONS, take)


class Echo:
    """A worker that sends back what it gets."""

    def load(self, run: str, task: str, hashes: Any) -> Offer:
        return Offer(5, None, None, hashes)

    def expected(self, plan: str, header: pb.Content) -> framing.Expected:
        return EXPECTED

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict:
        assert sum(len(a.data) for a in content.array_records["arrays"].values()) <= 2 * len(BODY)
        return content

    def judged(self, ticket: Ticket, *, counted: bool) -> None: ...


def sites(folder: Path, loop: Loop) -> Target:
    """The site's end of a stream."""
    task = pb.Task(run="run", spec="{}", hashes=pb.Hashes(**NAMES))
    work = pb.FromServer(work=pb.Work(ticket=TICKET.message(), plan="{}", content=HEADER))
    chunks = [pb.FromServer(chunk=pb.Chunk(data=BODY[:size])) for size in (len(BODY), 7, 0)]
    good = [pb.FromServer(task=task), pb.FromServer(welcome=pb.Welcome()), work, chunks[0]]
    menu = [
        *good,
        *chunks,
        *(
            pb.FromServer(ack=pb.Ack(ticket=t.message(), verdict=verdict))
            for verdict in pb.Verdict.values()
            for t in (TICKET, OTHERS[0])
        ),
        pb.FromServer(cancel=pb.Cancel(tickets=[t.message() for t in (TICKET, *OTHERS)])),
        pb.FromServer(refusal=pb.Refusal(reason="\x1b[2J")),
        pb.FromServer(refusal=pb.Refusal(retry=True)),
        pb.FromServer(drain=pb.Drain(finished=True)),
        pb.FromServer(drain=pb.Drain()),
        pb.FromServer(heartbeat=pb.Heartbeat()),
        pb.FromServer(),
    ]
    ends = (Broken, client_stream.Finished, client_stream.Paused, FedftError)

    def take(case: tuple[int, Any]) -> bool:
        script = Script([*good[: case[0]], *spoken(pb.FromServer, menu, case[1])])
        connection: Any = type("Wire", (), {"name": "ann", "channel": lambda _: script})()
        session = Session(connection, Echo())
        stream = client_stream.Stream(session)
        try:
            with pytest.raises(ends):
                loop.run_until_complete(asyncio.wait_for(stream.serve(), 20))
        finally:
            session._thread.shutdown()
        return stream.welcomed

    return Target(CONVERSATIONS, take)


TARGETS: dict[str, Callable[[Path, Loop], Target]] = {
    "result": lambda *_: Target(st.tuples(EDITS, EDITS), taken_result),
    "reply": lambda *_: Target(REPLIES, taken_reply),
    "kit": kits,
    "request": requests,
    "checkpoint": stored,
    "record": records,
    "server": servers,
    "site": sites,
}
LONG = 13_000  # a target; 104,000 in all


# What cryptography will refuse one day it only warns of today.
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("cases", [150, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_in_is_sound_or_refused(name: str, cases: int, folder: Path, loop: Loop) -> None:
    target = TARGETS[name](folder / f"{name}-{cases}", loop)
    seen: list[bool] = []

    @settings(
        max_examples=cases,
        deadline=timedelta(seconds=20),
        derandomize=cases != LONG,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def attack(case: Any) -> None:
        seen.append(target.take(case))

    attack()
    print(f"{name}: {len(seen)} cases, {sum(seen)} taken")
    assert len(seen) >= cases
    assert set(seen) == {True, False}  # both the good and the damaged came by
