"""One site's stream, from hello to goodbye, on the event loop of the gRPC grid.

What a client may send is bounded by what it was asked: a header is compared with the plan's shapes
before any of its bytes are taken, and a site that was not asked for anything can send nothing.
"""

import asyncio
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import grpc.aio
from flwr.app import Error, Message, RecordDict

from fedft.core.errors import UpdateRejected
from fedft.core.link import codes
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import PROTOCOL, Assembly, Expected, Ticket, describe
from fedft.core.link.stream import Broken, Pipe, first_to_end
from fedft.core.types import Site
from fedft.core.wire.compress import FP32, Compressor
from fedft.server.grids.allowance import Allowance
from fedft.server.grids.flower import APP_RAISED
from fedft.server.grids.outbox import Outbox, Pending, Verdict
from fedft.server.identity import Audit, Client
from fedft.server.validation import REPLY_REFUSED, SERVERS

logger = logging.getLogger(__name__)

MOST_EXAMPLES = 10**12
"""Examples that a site can claim to have. Their sum is a weight, and must stay a number."""

LONGEST = 2000
"""Characters of a sentence to a client."""

_BEATS, _BEATS_RATE = 50.0, 20.0
"""Heartbeats: so many at once, and so many a second from then on."""
_UNWANTED, _UNWANTED_RATE = 200.0, 100.0
"""Results that nobody asked for; likewise."""

_WIRE: dict[Verdict, Any] = {v: pb.Verdict.Value(v.name) for v in Verdict}
_DOING: dict[int, str] = {
    pb.LOADING: "loading the model",
    pb.WAITING: "waiting",
    pb.TRAINING: "training round {}",
    pb.EVALUATING: "evaluating round {}",
}


@dataclass(frozen=True)
class Timing:
    """Patience of the server, in seconds.

    Attributes:
        heartbeat: between heartbeats.
        silence: without a word after which a stream is cut.
        handshake: until a new stream says hello.
        loading: until a client has loaded its model and data.
        stall: for which a client may take nothing that is sent to it.
        absence: after which work is given up whose site is away.
        watch: between looks at the register.
        rate: bytes a second below which an upload is cut, after ``stall``.
    """

    heartbeat: float = 10.0
    silence: float = 35.0
    handshake: float = 15.0
    loading: float = 900.0
    stall: float = 30.0
    absence: float = 60.0
    watch: float = 0.25
    rate: float = 16_384.0


@dataclass(frozen=True)
class Terms:
    """What every client is told, and what is asked of it.

    Attributes:
        run: id of the run.
        task: JSON of its :class:`~fedft.core.spec.TaskSpec`.
        hashes: of base model, tokenizer and data schema; a client's must be the same.
        objection: says why a site cannot take part, for example for want of memory; None if it can.
        expected: the arrays that the reply to a message may have.
        compressor: in which replies to plans to train are sent; all others come in plain floats.
        history: site → last committed round that counts a result of it, in a run that goes on.
    """

    run: str
    task: str
    hashes: Mapping[str, str]
    expected: Callable[[Message], Expected]
    compressor: Compressor = FP32
    objection: Callable[[Site], str | None] = lambda site: None
    history: Mapping[str, int] = field(default_factory=dict[str, int])


class Refused(Exception):
    """A client is turned away.

    ``retry``: the same attempt may succeed later; ``mismatch``: its version, model or data are not
    the run's; ``who``: its name, where it is not known by its stream.
    """

    def __init__(
        self, reason: str, *, retry: bool = False, mismatch: bool = False, who: str = ""
    ) -> None:
        super().__init__(reason)
        self.who = who
        self.message = pb.Refusal(reason=reason[:LONGEST], retry=retry, mismatch=mismatch)


class Left(Exception):
    """A client said goodbye; there is nothing to tell it."""


class Host(Protocol):
    """What a stream asks of the server that it belongs to; see :class:`~fedft.server.grids.hub.Hub`."""

    terms: Terms
    timing: Timing
    outbox: Outbox
    audit: Audit
    over: "pb.Drain | None"

    def admit(self, context: Any, hello: pb.Hello) -> tuple[Client, str]:
        """The client that is speaking, and the serial number of the certificate it shows.

        Raises:
            Refused: it may not.
        """
        ...

    def replaces(self, stream: "Stream") -> None:
        """Make room for a stream of a site, which has one at most, ready or loading.

        Raises:
            Refused: the other one is alive, and of another process.
        """
        ...

    def greeted(self, stream: "Stream") -> None:
        """A site has said who it is, and loads its model and data."""
        ...

    async def joined(self, site: Site, serial: str) -> None:
        """A site was let in; it is entered in the register."""
        ...

    def arrive(self, stream: "Stream") -> None:
        """A site is ready for work."""
        ...


class Stream:
    """One site's stream, from hello to goodbye.

    Args:
        host: the server that it belongs to.
        context: of the call.

    Attributes:
        site: name of the site; empty before it has said who it is.
        instance: of the client's process.
        arrived: whether it was let in.
        dismissed: whether it was told that the run is over.
        ended: done when the stream is.
    """

    def __init__(self, host: Host, context: Any) -> None:
        self._host = host
        self._context = context
        self._timing = host.timing
        self._pipe = Pipe(context, pb.FromServer, host.timing.stall)
        self._queue: asyncio.Queue[Pending | pb.Cancel | pb.Drain | pb.Ack] = asyncio.Queue()
        self._given: WeakSet[Pending] = WeakSet()
        self._inbox: _Upload | None = None
        self._cut: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._heard: tuple[int, int] = (0, 0)  # activity, round
        self._beats = Allowance(_BEATS, _BEATS_RATE)
        self._unwanted = Allowance(_UNWANTED, _UNWANTED_RATE)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.site = ""
        self.instance = ""
        self.arrived = False
        self.dismissed = False

    @property
    def peer(self) -> str:
        """Address of the client."""
        return str(self._context.peer())

    @property
    def quiet_s(self) -> float:
        """Seconds since the client last said anything."""
        return self._pipe.quiet_s

    @property
    def doing(self) -> str:
        """What the client says it does; empty where it does not say."""
        activity, round_ = self._heard
        return _DOING.get(activity, "").format(round_)

    def put(self, item: "Pending | pb.Cancel | pb.Drain | pb.Ack") -> None:
        """Send something, in its turn.

        The same piece of work once: it is put here when it is posted, and when its site arrives.
        Work that is asked for again is another piece, whose ticket may be the same.
        """
        if isinstance(item, Pending):
            if item in self._given:
                return
            self._given.add(item)
        self._queue.put_nowait(item)

    def cut(self, refusal: Refused | None) -> None:
        """End the stream, with a word or without one."""
        if not self._cut.done():
            self._cut.set_result(refusal)

    async def tell(self, **body: Any) -> None:
        """A last word, if the client still listens."""
        try:
            async with asyncio.timeout(2.0):
                await self._pipe.say(**body)
        except (TimeoutError, Broken, grpc.aio.BaseError):
            logger.debug("%s did not hear the last word", self.site)

    async def serve(self) -> None:
        """The whole conversation."""
        heart = asyncio.create_task(self._pipe.beat(self._timing.heartbeat))
        try:
            await first_to_end(self._handshake(), self._until_cut())
            if self.arrived:
                await first_to_end(self._read_on(), self._send_on(), self._until_cut(), heart)
        finally:
            heart.cancel()

    async def _until_cut(self) -> None:
        if (refusal := await asyncio.shield(self._cut)) is not None:
            raise refusal

    # opening

    async def _handshake(self) -> None:
        hello = (await self._pipe.read(self._timing.handshake)).hello
        client, serial = self._host.admit(self._context, hello)
        self.site = client.name
        _check_versions(hello)
        self.instance = hello.instance
        self._host.replaces(self)
        if self._host.over is not None:
            await self._dismiss(self._host.over)
        self._host.greeted(self)
        terms = self._host.terms
        task = pb.Task(run=terms.run, spec=terms.task, hashes=pb.Hashes(**terms.hashes))
        await self._pipe.say(task=task)
        site = self._accepted(await self._offer())
        await self._host.joined(site, serial)
        self._host.replaces(self)
        await self._pipe.say(welcome=pb.Welcome())
        self._host.audit.quietly(
            "joined",
            site.name,
            peer=self.peer,
            examples=site.examples,
            versions=", ".join(f"{k} {v}" for k, v in sorted(hello.versions.items())),
        )
        self.arrived = True
        self._host.arrive(self)

    async def _beat(self, beat: pb.Heartbeat) -> None:
        """Take a heartbeat; those beyond their rate are dropped, and slow their sender down."""
        if (pause := self._beats.take()) > 0:
            await asyncio.sleep(pause)
        else:
            self._heard = beat.activity, beat.round

    async def _dismiss(self, word: pb.Drain) -> None:
        """Say that the run is over, and hear the goodbye."""
        self.dismissed = True
        await self._pipe.say(drain=word)
        message = await self._pipe.read(self._timing.handshake)
        raise Left(codes.told(message.goodbye.reason))

    async def _offer(self) -> pb.Offer:
        """The client's offer, once it has loaded; heartbeats come before it."""
        ends = time.monotonic() + self._timing.loading
        while time.monotonic() < ends:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case "offer":
                    return message.offer
                case "heartbeat":
                    await self._beat(message.heartbeat)
                case "goodbye":
                    raise Left(codes.told(message.goodbye.reason))
                case other:
                    raise Refused(f"an offer was expected, not {other}")
        raise Refused("the client did not load its model and data in time", retry=True)

    def _accepted(self, offer: pb.Offer) -> Site:
        """The site as it offers itself.

        Raises:
            Refused: the offer is none, or not of this run.
        """
        if not 0 < offer.examples <= MOST_EXAMPLES:
            many = "no training examples" if not offer.examples else "an impossible number of them"
            raise Refused(f"{self.site} has {many}, so that it cannot take part", mismatch=True)
        if not (math.isfinite(offer.memory_mib) and offer.memory_mib >= 0):
            raise Refused(
                f"{self.site} grants {offer.memory_mib} MiB, which is no amount of memory"
            )
        for name, wanted in self._host.terms.hashes.items():
            if getattr(offer.hashes, name) != wanted:
                raise Refused(
                    f"the {name.replace('_', ' ')} of {self.site} is not the run's "
                    f"({getattr(offer.hashes, name)[:12]!r}, the run's is {wanted[:12]!r})",
                    mismatch=True,
                )
        site = Site(self.site, offer.examples, offer.rank or None, offer.memory_mib or None)
        if (objection := self._host.terms.objection(site)) is not None:
            raise Refused(objection, mismatch=True)
        return site

    # reading and writing

    async def _send_on(self) -> None:
        """Hand out what is queued, one thing after the other."""
        while True:
            item = await self._queue.get()
            match item:
                case pb.Cancel():
                    await self._pipe.say(cancel=item)
                case pb.Ack():
                    await self._pipe.say(ack=item)
                case pb.Drain():
                    self.dismissed = item.finished
                    await self._pipe.say(drain=item)
                case _ if self._host.outbox.pending(item.ticket) is item:
                    await self._send(item)
                case _:
                    pass  # called off while it waited

    async def _send(self, pending: Pending) -> None:
        content, ticket = pending.message.content, pending.ticket.message()
        work = pb.Work(ticket=ticket, plan=pending.plan, content=describe(content))
        await self._pipe.say(work=work)
        await self._pipe.send(content)

    async def _read_on(self) -> None:
        while True:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case "heartbeat":
                    await self._beat(message.heartbeat)
                case "result":
                    await self._result(message.result)
                case "chunk":
                    await self._chunk(message.chunk.data)
                case "goodbye":
                    raise Left(codes.told(message.goodbye.reason))
                case other:
                    raise Refused(f"{other} makes no sense in the middle of a stream")
            if self._inbox is not None and self._inbox.overdue(self._timing):
                raise Refused("the upload of a result is too slow", retry=True)

    # results

    async def _result(self, result: pb.Result) -> None:
        """A result is announced: say whether it is wanted."""
        self._inbox = None
        ticket, outbox = Ticket.read(result.ticket), self._host.outbox
        pending = outbox.pending(ticket) if ticket.site == self.site else None
        if pending is None:
            await asyncio.sleep(self._unwanted.take())
            own = ticket.site == self.site
            await self._ack(ticket, outbox.verdict(ticket) if own else Verdict.STALE)
            return
        try:
            upload = _Upload(ticket, _assembly(result, pending))
            if upload.assembly is None:
                await self._settle(ticket, _error(result.failure))
            elif upload.assembly.complete:
                await self._settle(ticket, _content(upload.assembly))
            else:
                self._inbox = upload
                await self._ack(ticket, Verdict.SEND)
        except UpdateRejected as rejected:
            await self._refuse(ticket, rejected)

    async def _chunk(self, data: bytes) -> None:
        upload = self._inbox
        if upload is None or upload.assembly is None:
            raise Refused("bytes came that nobody asked for")
        try:
            upload.assembly.feed(data)
            if upload.assembly.complete:
                self._inbox = None
                await self._settle(upload.ticket, _content(upload.assembly))
        except UpdateRejected as rejected:
            self._inbox = None
            await self._refuse(upload.ticket, rejected)

    async def _settle(self, ticket: Ticket, answer: RecordDict | Error) -> None:
        await self._ack(ticket, self._host.outbox.settle(ticket, answer, Verdict.ACCEPTED))

    async def _refuse(self, ticket: Ticket, rejected: UpdateRejected) -> None:
        reason = f"{rejected.reason}: {rejected.what}"
        answer = Error(REPLY_REFUSED, reason[:1000])
        await self._ack(ticket, self._host.outbox.settle(ticket, answer, Verdict.REFUSED), reason)

    async def _ack(self, ticket: Ticket, verdict: Verdict, reason: str = "") -> None:
        if verdict not in (Verdict.SEND, Verdict.ACCEPTED):
            why = reason or f"{ticket.kind}, round {ticket.round}"
            self._host.audit.quietly(verdict.value, self.site, why)
        await self._pipe.say(ack=acknowledgement(ticket, verdict, reason))


def acknowledgement(ticket: Ticket, verdict: Verdict, reason: str = "") -> pb.Ack:
    """A verdict, for the wire."""
    return pb.Ack(ticket=ticket.message(), verdict=_WIRE[verdict], reason=reason[:1000])


@dataclass(eq=False)
class _Upload:
    """A result on its way in; without an assembly where it is a failure."""

    ticket: Ticket
    assembly: Assembly | None
    since: float = field(default_factory=time.monotonic)

    def overdue(self, timing: Timing) -> bool:
        size = self.assembly.declared if self.assembly is not None else 0
        return time.monotonic() - self.since > timing.stall + size / timing.rate


def _error(failure: pb.Failure) -> Error:
    """What a client says went wrong. What only a server finds is not a client's to claim."""
    code = APP_RAISED if failure.code in SERVERS else failure.code
    return Error(code, codes.told(failure.reason))


def _assembly(result: pb.Result, pending: Pending) -> Assembly | None:
    match result.WhichOneof("outcome"):
        case "content":
            return Assembly(result.content, pending.expected, pending.compressor)
        case "failure":
            return None
        case _:
            raise UpdateRejected("schema", "a result has a content or a failure")


def _content(assembly: Assembly) -> RecordDict:
    """What was sent, put together.

    Raises:
        UpdateRejected: it makes no records.
    """
    try:
        return assembly.content()
    except Exception as error:  # whatever it is, it is about what this client sent
        raise UpdateRejected("format", f"what was sent makes no records: {error}") from error


def _check_versions(hello: pb.Hello) -> None:
    own, other = importlib.metadata.version("fedft"), hello.versions.get("fedft", "unknown")
    if hello.protocol != PROTOCOL or own.split(".")[:2] != other.split(".")[:2]:
        raise Refused(
            f"the client has fedft {other[:20]} (protocol {hello.protocol}), the server {own} "
            f"(protocol {PROTOCOL}); install the same version on both",
            mismatch=True,
        )
