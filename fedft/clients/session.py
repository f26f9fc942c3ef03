"""A site's side of its stream: stay connected, take work, give back results, each exactly once.

Work is done in one thread of its own, so that the stream stays alive while a model trains. A
result is kept until the server has judged it, over as many connections as that takes; work that
comes again is not done again.
"""

import asyncio
import importlib.metadata
import logging
import platform
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc
import grpc.aio
from flwr.app import RecordDict

from fedft.clients.proxies import channel_options, proxy_note
from fedft.core.errors import (
    EnvironmentFailure,
    FedftError,
    Interrupted,
    MismatchError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.link import codes, link_pb2_grpc
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    Assembly,
    Expected,
    Ticket,
    describe,
)
from fedft.core.link.secrets import Credentials
from fedft.core.link.stream import Broken, Pipe, first_to_end
from fedft.core.link.trust import tls_trouble

logger = logging.getLogger(__name__)

UNUSABLE = 102
"""Code of a failure for work that this client cannot do as it was sent."""

_KEPT_RESULTS = 2
_MOST_WORK = 8
"""Pieces of work that are held at a time: each holds an adapter, or a result."""
_LINGER_S = 0.5
_MEANT = 4
"""Times in a row that a server hangs up on a certificate before that is taken for its answer."""


@dataclass(frozen=True)
class Offer:
    """What a site brings.

    Attributes:
        examples: it can train on.
        rank: it can train; None takes the run's.
        memory_mib: it grants to training; None is unlimited.
        hashes: of base model, tokenizer and data schema, as found here.
    """

    examples: int
    rank: int | None
    memory_mib: float | None
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Failure:
    """Work that could not be done, and why.

    Attributes:
        code: of the reason.
        reason: one word of :mod:`fedft.core.link.codes`, which the server gets.
        details: for this client's own screen.
    """

    code: int
    reason: str
    details: str = ""


class Worker(Protocol):
    """What does the work. Called from one thread, one call at a time, but for ``expected``."""

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        """Get ready for a run; quick where the same run is loaded already."""
        ...

    def expected(self, plan: str, header: pb.Content) -> Expected:
        """The arrays that work with this plan may have."""
        ...

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        """Do it."""
        ...

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """The server took the result, or did not."""
        ...


@dataclass(frozen=True)
class Timing:
    """Patience of a client, in seconds.

    Attributes:
        heartbeat: between heartbeats.
        silence: without a word after which a connection is given up.
        first_delay, longest_delay: between attempts to connect; drawn between half and all of a
            delay that doubles each time.
        give_up: without a connection after which the client ends; None tries for ever.
    """

    heartbeat: float = 10.0
    silence: float = 35.0
    first_delay: float = 0.5
    longest_delay: float = 30.0
    give_up: float | None = None


@dataclass(frozen=True)
class Connection:
    """How a site reaches its server.

    Attributes:
        target: ``host:port``.
        name: of the site.
        credentials: None for a server without TLS, on loopback.
    """

    target: str
    name: str
    credentials: Credentials | None

    def channel(self) -> Any:
        """A new channel; it connects when it is first used."""
        options = [*_OPTIONS, *channel_options(self.target)]
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=options)
        own = self.credentials
        tls = grpc.ssl_channel_credentials(own.ca, own.key, own.certificate)
        return grpc.aio.secure_channel(self.target, tls, options=options)


@dataclass(eq=False)
class _Job:
    ticket: Ticket
    outcome: RecordDict | Failure | None = None  # None while it is being worked on
    announced: bool = False  # on the present connection
    judged: bool = False
    wanted: bool = True
    given: tuple[str, RecordDict] | None = None  # plan and content, until it is done or called off


class _Paused(Exception):
    """The server goes away for a while."""


class _Finished(Exception):
    """The run is over."""


@dataclass
class Session:
    """A site's part in a run, from the first connection to the end of the run.

    Args:
        connection: how to reach the server.
        worker: does the work.
        tell: takes a line for whoever watches.
        stop: says whether to leave; asked several times a second.
        timing: patience.
        renewal: gives the credentials to connect with from now on; asked before an attempt where the
            present ones are due, see :attr:`~fedft.core.link.secrets.Credentials.due`. None keeps them.
        send_details: whether the text of errors may leave, beside its code.
    """

    connection: Connection
    worker: Worker
    tell: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False
    timing: Timing = field(default_factory=Timing)
    renewal: Callable[[], Credentials] | None = None
    send_details: bool = False

    def __post_init__(self) -> None:
        self._instance = uuid.uuid4().hex
        self._jobs: OrderedDict[Ticket, _Job] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedft-work")
        self._random = random.Random()
        self._stream: _Stream | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away = 0  # times in a row
        self._offer: tuple[tuple[str, ...], Offer] | None = None
        self._doing = pb.Heartbeat()

    def run(self) -> str:
        """Stay until the run is over.

        Returns:
            The server's last word.

        Raises:
            SecurityRefusal: the server refused this site, or is not the one of the kit.
            MismatchError: model, data or version are not the run's.
            EnvironmentFailure: there was no connection for ``timing.give_up`` seconds.
            Interrupted: ``stop`` said so.
        """
        try:
            return asyncio.run(self.attend())
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def attend(self) -> str:
        """What :meth:`run` does, on an event loop that is there already."""
        delay, alone_since = self.timing.first_delay, time.monotonic()
        while True:
            stream, reason = _Stream(self), "the stream ended"
            try:
                await self._unless_stopped(stream.serve())
            except _Finished as finished:
                return str(finished)
            except (Broken, _Paused) as lost:
                reason = str(lost)
            finally:
                self._stream = None
            if stream.welcomed:
                delay, alone_since = self.timing.first_delay, time.monotonic()
            else:
                await self._check_trust()
                note = proxy_note(self.connection.target)
                reason = f"{reason} ({note})" if note else reason
            waited = time.monotonic() - alone_since
            if self.timing.give_up is not None and waited > self.timing.give_up:
                raise EnvironmentFailure(
                    f"no connection to {self.connection.target} for {waited:.0f} s: {reason}",
                    fix="Check that the server runs and can be reached; then join again.",
                )
            pause = delay * self._random.uniform(0.5, 1.0)
            self.tell(f"{reason}; trying again in {pause:.1f} s")
            await self._unless_stopped(asyncio.sleep(pause))
            await self._unless_stopped(self._renew())
            delay = min(2 * delay, self.timing.longest_delay)

    async def _renew(self) -> None:
        own = self.connection.credentials
        if self.renewal is not None and own is not None and own.due:
            new = await asyncio.to_thread(self.renewal)
            self.connection = replace(self.connection, credentials=new)

    async def _unless_stopped(self, work: Any) -> None:
        """Await something, unless asked to stop; then say goodbye first."""
        task = asyncio.ensure_future(work)
        while not task.done():
            if self.stop():
                if self._stream is not None:
                    await self._stream.goodbye("stopped")
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise Interrupted("stopped; the site can join again with the same command")
            await asyncio.wait([task], timeout=0.2)
        task.result()

    async def _check_trust(self) -> None:
        """Tell a server that cannot be trusted, or does not trust this site, from one that is away.

        Raises:
            SecurityRefusal: trying again cannot help.
        """
        credentials = self.connection.credentials
        if credentials is None:
            return
        trouble = await asyncio.to_thread(tls_trouble, self.connection.target, credentials)
        self._turned_away = self._turned_away + 1 if trouble is not None else 0
        # A server that is just going down hangs up too; one that means it does so every time.
        if trouble is not None and (trouble.certain or self._turned_away >= _MEANT):
            raise SecurityRefusal(
                f"{self.connection.target} and this site do not trust each other: {trouble.reason}",
                fix="Check the address, the clocks of both machines, and that the kit is of this "
                "server and has not expired.",
            )

    # work, over all connections

    def take(self, ticket: Ticket, plan: str, content: RecordDict) -> None:
        """Start on work that came, or give back what came of it before."""
        job = self._jobs.get(ticket)
        if job is None:
            if sum(one.wanted and not one.judged for one in self._jobs.values()) >= _MOST_WORK:
                raise Broken("the server sends more work than it takes results of")
            self._jobs[ticket] = job = _Job(ticket, given=(plan, content))
            task = asyncio.create_task(self._do(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            if job.outcome is None:
                job.given = (plan, content)
            job.judged, job.wanted = False, True
            self.offer_results()

    def call_off(self, ticket: Ticket) -> None:
        """Do not start on this any more."""
        if (job := self._jobs.get(ticket)) is not None:
            job.wanted, job.given = False, None

    def outcome(self, ticket: Ticket) -> RecordDict | Failure | None:
        """What came of a piece of work."""
        job = self._jobs.get(ticket)
        return job.outcome if job is not None else None

    async def _do(self, job: _Job) -> None:
        loop, ticket = asyncio.get_running_loop(), job.ticket

        def work() -> RecordDict | Failure | None:
            given = job.given
            if not job.wanted or given is None:
                return None  # called off while it waited behind other work: nothing is lost
            loop.call_soon_threadsafe(self._begun, ticket)
            try:
                return self.worker.work(ticket, *given)
            except Exception as error:  # a bug here must not leave the server waiting
                logger.exception("work on %s failed", ticket)
                return Failure(UNUSABLE, codes.OTHER, f"{type(error).__name__}: {error}")

        while (outcome := await loop.run_in_executor(self._thread, work)) is None:
            if not job.wanted:
                self._jobs.pop(ticket, None)
                return
            # It was asked for again just after it was called off.
        job.outcome, job.given = outcome, None
        self.does(pb.WAITING)
        if isinstance(outcome, Failure):
            why = codes.told(codes.reason(outcome.reason, outcome.details, send_details=True))
            self.tell(f"round {ticket.round}: {ticket.kind} failed: {why}")
        self.offer_results()

    def _begun(self, ticket: Ticket) -> None:
        if ticket.kind == "train":
            self.does(pb.TRAINING, ticket.round)
            self.tell(f"round {ticket.round}: training")
        else:
            self.does(pb.EVALUATING, ticket.round)

    def does(self, activity: "pb.Activity", round_: int = 0) -> None:
        """What this site does from now on; the server hears it with the next heartbeat."""
        self._doing = pb.Heartbeat(activity=activity, round=round_)
        if self._stream is not None:
            self._stream.pulse()

    @property
    def heartbeat(self) -> pb.Heartbeat:
        """Says what this site does."""
        return self._doing

    def offer_results(self, *, again: bool = False) -> None:
        """Announce every result that is not judged yet; ``again`` on a new connection."""
        for job in self._jobs.values():
            if again:
                job.announced = False
            ready = job.outcome is not None and not job.judged and not job.announced
            if ready and self._stream is not None:
                job.announced = True
                self._stream.announce(job.ticket)

    def judged(self, ack: pb.Ack) -> None:
        """The server's verdict on a result."""
        ticket = Ticket.read(ack.ticket)
        job = self._jobs.get(ticket)
        if job is None or job.outcome is None:
            return
        counted = ack.verdict in (pb.ACCEPTED, pb.DUPLICATE)
        failed = isinstance(job.outcome, Failure)
        job.judged, job.announced = True, False
        word = pb.Verdict.Name(ack.verdict).lower()
        detail = f" ({ack.reason})" if ack.reason else ""
        if not failed:
            idle = all(other.outcome is not None for other in self._jobs.values())
            then = "; waiting for work" if idle else ""
            self.tell(f"round {ticket.round}: {ticket.kind} {word}{detail}{then}")
        if failed or not counted:
            self._jobs.pop(ticket)
        self._forget_old()
        # In the order of the acks and before any later work, without holding up the stream.
        self._thread.submit(self.worker.judged, ticket, counted=counted and not failed)

    def _forget_old(self) -> None:
        """Keep the newest results that were counted: a server that lost them asks again."""
        judged = [ticket for ticket, job in self._jobs.items() if job.judged]
        for ticket in judged[:-_KEPT_RESULTS]:
            del self._jobs[ticket]

    async def offer(self, task: pb.Task, hashes: Mapping[str, str], pipe: Pipe) -> Offer:
        """What the worker brings to this task; known at once when it was asked before.

        A reconnect must not wait for the training that is under way in the worker's thread.
        """
        key = (task.run, task.spec, *hashes.values())
        if self._offer is None or self._offer[0] != key:
            loop, load = asyncio.get_running_loop(), self.worker.load
            self.tell("connected; loading the model and the data")
            self.does(pb.LOADING)
            await pipe.say(heartbeat=self._doing)
            made = await loop.run_in_executor(self._thread, load, task.run, task.spec, hashes)
            self._offer = (key, made)
            self.does(pb.WAITING)
        return self._offer[1]

    def connected(self, stream: "_Stream") -> None:
        """A stream is open for work."""
        self._stream = stream
        stream.pulse()
        self.offer_results(again=True)

    @property
    def instance(self) -> str:
        """Drawn when this session was made."""
        return self._instance


class _Stream:
    """One connection."""

    def __init__(self, session: Session) -> None:
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
            except (_Finished, _Paused):
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
            f"the server refused this site: {refusal.reason}",
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
        _Finished(drain.reason) if drain.finished else _Paused(f"the server pauses: {drain.reason}")
    )


_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
