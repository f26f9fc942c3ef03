"""One stream to the server: what is said over it, until it breaks."""

import asyncio
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from flwr.app import RecordDict

from fedft.clients.work import Connection, Failure, Offer, Timing, Worker
from fedft.core.errors import (
    FedftError,
    MismatchError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.link import codes, link_pb2_grpc
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import (
    PROTOCOL,
    Assembly,
    Ticket,
    describe,
)
from fedft.core.link.stream import Broken, Pipe, first_to_end

logger = logging.getLogger(__name__)

_LINGER_S = 0.5
UNUSABLE = 102
"""Code of a failure for work that this client cannot do as it was sent."""


@dataclass(eq=False)
class Job:
    """A piece of work, from its arrival to the server's verdict on its result."""

    ticket: Ticket
    outcome: RecordDict | Failure | None = None  # None while it is being worked on
    announced: bool = False  # on the present connection
    judged: bool = False
    wanted: bool = True
    given: tuple[str, RecordDict] | None = None  # plan and content, until it is done or called off


class Paused(Exception):
    """The server goes away for a while."""


class Finished(Exception):
    """The run is over."""


class Attending(Protocol):
    """What a stream asks of the session that it belongs to; see :class:`~fedft.clients.session.Session`."""

    connection: Connection
    worker: Worker
    timing: Timing
    send_details: bool

    @property
    def instance(self) -> str:
        """Drawn when the session was made."""
        ...

    @property
    def heartbeat(self) -> pb.Heartbeat:
        """Says what this client does."""
        ...

    @property
    def tell(self) -> Callable[[str], None]:
        """Takes a line for whoever watches."""
        ...

    def connected(self, stream: "Stream") -> None:
        """A stream is open for work."""
        ...

    async def offer(self, task: pb.Task, hashes: Mapping[str, str], pipe: Pipe) -> Offer:
        """What the worker brings to this task."""
        ...

    def take(self, ticket: Ticket, plan: str, content: RecordDict) -> None:
        """Start on work that came, or give back what came of it before."""
        ...

    def call_off(self, ticket: Ticket) -> None:
        """Do not start on this any more."""
        ...

    def outcome(self, ticket: Ticket) -> RecordDict | Failure | None:
        """What came of a piece of work."""
        ...

    def judged(self, ack: pb.Ack) -> None:
        """The server's verdict on a result."""
        ...


class Stream:
    """One connection."""

    def __init__(self, session: Attending) -> None:
        self._session = session
        self._timing = session.timing
        self._outbox: asyncio.Queue[Ticket | _Upload | pb.Heartbeat] = asyncio.Queue()
        self._inbox: _Download | None = None
        self._pipe: Pipe  # from serve() on
        self._refused = False
        self.welcomed = False

    def announce(self, ticket: Ticket) -> None:
        """Tell the server about a result, in its turn."""
        self._outbox.put_nowait(ticket)

    def pulse(self) -> None:
        """Tell the server what the site does now, without waiting for the next heartbeat."""
        self._outbox.put_nowait(self._session.heartbeat)

    async def goodbye(self, word: str, details: str = "") -> None:
        """A last word, if the server still listens; see :mod:`fedft.core.link.codes`."""
        reason = codes.reason(word, details, send_details=self._session.send_details)
        try:
            async with asyncio.timeout(2.0):
                await self._pipe.say(goodbye=pb.Goodbye(reason=reason))
                await self._pipe.part(_LINGER_S)
        except (TimeoutError, Broken, grpc.aio.BaseError):
            logger.debug("the server did not hear the goodbye")

    async def serve(self) -> None:
        """Connect, introduce the site, and work until the stream ends, which it does by raising."""
        async with self._session.connection.channel() as channel:
            call: Any = link_pb2_grpc.FederationStub(channel).Session()
            self._pipe = Pipe(call, pb.FromSite, self._timing.silence)
            heart: asyncio.Task[None] | None = None
            try:
                await self._pipe.say(hello=self._hello())
                task = (await self._expect("task")).task
                beats = self._pipe.beat(self._timing.heartbeat, lambda: self._session.heartbeat)
                heart = asyncio.create_task(beats)
                await self._pipe.say(offer=await self._offer(task))
                await self._expect("welcome")
                self.welcomed = True
                self._session.tell("joined; waiting for work")
                self._session.connected(self)
                await first_to_end(self._read_on(), self._send_on(), heart)
            except Broken as broken:
                if broken.code == grpc.StatusCode.UNIMPLEMENTED:
                    raise MismatchError(
                        "whatever listens there is not a fedft server of this version",
                        fix="Check the address in the kit.",
                    ) from broken
                raise
            except FedftError as error:
                if not self._refused:
                    await self.goodbye(codes.word_of(error), error.what)
                raise
            except (Finished, Paused):
                await self.goodbye("done")
                raise
            finally:
                if heart is not None:
                    heart.cancel()
                call.cancel()

    def _hello(self) -> pb.Hello:
        packages = ("fedft", "torch", "transformers", "peft")
        versions = {name: importlib.metadata.version(name) for name in packages}
        return pb.Hello(
            protocol=PROTOCOL,
            versions={**versions, "python": platform.python_version()},
            instance=self._session.instance,
            site=self._session.connection.name,
        )

    async def _offer(self, task: pb.Task) -> pb.Offer:
        hashes = {f: getattr(task.hashes, f) for f in ("base_model", "tokenizer", "data_schema")}
        offer = await self._session.offer(task, hashes, self._pipe)
        return pb.Offer(
            examples=offer.examples,
            rank=offer.rank or 0,
            memory_mib=offer.memory_mib or 0.0,
            hashes=pb.Hashes(**offer.hashes),
        )

    async def _expect(self, kind: str) -> pb.FromServer:
        while True:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case found if found == kind:
                    return message
                case "heartbeat":
                    continue
                case "refusal":
                    raise self._turned_away(message.refusal)
                case "drain":
                    raise _drained(message.drain)
                case other:
                    raise Broken(f"the server said {other} where {kind} was expected")

    async def _send_on(self) -> None:
        while True:
            item = await self._outbox.get()
            if isinstance(item, pb.Heartbeat):
                await self._pipe.say(heartbeat=item)
            elif isinstance(item, _Upload):
                await self._pipe.send(item.content)
            elif (outcome := self._session.outcome(item)) is not None:
                details = self._session.send_details
                await self._pipe.say(result=_result(item, outcome, send_details=details))

    async def _read_on(self) -> None:
        while True:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case "heartbeat":
                    pass
                case "work":
                    self._work(message.work)
                case "chunk":
                    self._chunk(message.chunk.data)
                case "ack":
                    self._ack(message.ack)
                case "cancel":
                    for ticket in message.cancel.tickets:
                        self._session.call_off(Ticket.read(ticket))
                case "refusal":
                    raise self._turned_away(message.refusal)
                case "drain":
                    raise _drained(message.drain)
                case other:
                    raise Broken(f"the server said {other} in the middle of a stream")

    def _work(self, work: pb.Work) -> None:
        """Work is announced; its tensors follow."""
        try:
            expected = self._session.worker.expected(work.plan, work.content)
            self._inbox = _Download(work, Assembly(work.content, expected))
        except UpdateRejected as rejected:
            # What follows cannot be told from anything else any more.
            raise Broken(f"unusable work: {rejected.reason}: {rejected.what}") from rejected
        self._take_if_complete()

    def _chunk(self, data: bytes) -> None:
        if self._inbox is None:
            raise Broken("bytes came that belong to nothing")
        try:
            self._inbox.assembly.feed(data)
        except UpdateRejected as rejected:
            raise Broken(f"unusable work: {rejected.what}") from rejected
        self._take_if_complete()

    def _take_if_complete(self) -> None:
        if self._inbox is not None and self._inbox.assembly.complete:
            work, content = self._inbox.work, self._inbox.assembly.content()
            self._inbox = None
            self._session.take(Ticket.read(work.ticket), work.plan, content)

    def _ack(self, ack: pb.Ack) -> None:
        if ack.verdict != pb.SEND:
            self._session.judged(ack)
            return
        outcome = self._session.outcome(Ticket.read(ack.ticket))
        if isinstance(outcome, RecordDict):
            self._outbox.put_nowait(_Upload(outcome))

    def _turned_away(self, refusal: pb.Refusal) -> Exception:
        if refusal.retry:
            return Broken(f"not now: {refusal.reason}")
        self._refused = True
        kind = MismatchError if refusal.mismatch else SecurityRefusal
        return kind(
            f"the server refused this client: {refusal.reason}",
            fix="Ask whoever runs the server; `fedft clients` there shows what it knows.",
        )


@dataclass(eq=False)
class _Download:
    work: pb.Work
    assembly: Assembly


@dataclass(frozen=True, eq=False)
class _Upload:
    content: RecordDict


def _result(
    ticket: Ticket, outcome: RecordDict | Failure, *, send_details: bool = False
) -> pb.Result:
    if isinstance(outcome, Failure):
        reason = codes.reason(outcome.reason, outcome.details, send_details=send_details)
        failure = pb.Failure(code=outcome.code, reason=reason)
        return pb.Result(ticket=ticket.message(), failure=failure)
    return pb.Result(ticket=ticket.message(), content=describe(outcome))


def _drained(drain: pb.Drain) -> Exception:
    return (
        Finished(drain.reason) if drain.finished else Paused(f"the server pauses: {drain.reason}")
    )
