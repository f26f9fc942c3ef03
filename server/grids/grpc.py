"""A grid of real clients: each holds one stream to this server, and comes back when it breaks.

Two threads meet at a :class:`Desk`. The loop of rounds posts errands there and takes answers away;
an event loop of its own hands the errands out over gRPC and judges what returns. An errand belongs
to a site, not to a connection: it waits at the desk for as long as its site is away, and goes out
again when the site is back. Answers are known by their ticket, so that a late, repeated or
outdated one is told so and counts for nothing.

What a client may send is bounded by what it was asked: a header is compared with the plan's shapes
before any of its bytes are taken, and a site that was not asked for anything can send nothing.
"""

import asyncio
import importlib.metadata
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio
from cryptography import x509
from flwr.app import Error, Message, RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedft.core.errors import EnvironmentFailure, FedftError, SecurityRefusal, UpdateRejected
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.framing import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    Assembly,
    Digests,
    Expected,
    Ticket,
    describe,
)
from fedft.core.link.stream import Broken, Pipe, first_to_end
from fedft.core.types import Site
from server.grids.base import Job, SimulationGrid
from server.grids.flower import NODE_UNAVAILABLE
from server.grids.serve import Answer, error_reply
from server.identity import Address, Audit, Authority, Client, Registry, serial_of
from server.validation import REPLY_REFUSED

logger = logging.getLogger(__name__)

SERVICE = "fedft.link.v1.Federation"
_REMEMBERED = 8  # settled tickets a site


@dataclass(frozen=True)
class Timing:
    """Patience of the server, in seconds.

    Attributes:
        heartbeat: between heartbeats.
        silence: without a word after which a stream is cut.
        handshake: until a new stream says hello.
        loading: until a client has loaded its model and data.
        stall: for which a client may take nothing that is sent to it.
        absence: after which an errand is given up whose site is away.
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
        history: site → last committed round that counts a result of it, in a run that goes on.
    """

    run: str
    task: str
    hashes: Mapping[str, str]
    expected: Callable[[Message], Expected]
    objection: Callable[[Site], str | None] = lambda site: None
    history: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, eq=False)
class Errand:
    """One message on its way to a site and back."""

    ticket: Ticket
    message: Message
    plan: str
    expected: Expected


class Desk:
    """Errands that are open, and answers that were not fetched yet. Safe for all threads."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._changed = threading.Condition()
        self._open: dict[Ticket, Errand] = {}
        self._settled: dict[str, OrderedDict[Ticket, pb.Verdict]] = {}
        self._answers: deque[tuple[Message, Message]] = deque()
        self._connected: frozenset[str] = frozenset()
        self._failure: BaseException | None = None

    # the loop of rounds

    def post(self, errands: Iterable[Errand]) -> None:
        """Open errands."""
        with self._changed:
            for errand in errands:
                self._open[errand.ticket] = errand
                self._settled.get(errand.ticket.site, {}).pop(errand.ticket, None)

    def withdraw(self, ids: frozenset[str]) -> list[Ticket]:
        """Close errands that nobody waits for any more; answers to them are late from now on."""
        with self._changed:
            gone = [t for t, e in self._open.items() if e.message.metadata.message_id in ids]
            for ticket in gone:
                del self._open[ticket]
                self._settle(ticket, pb.LATE)
            return gone

    def fetch(self) -> list[tuple[Message, Message]]:
        """Messages and their replies, each once, in the order of arrival."""
        with self._changed:
            answers = list(self._answers)
            self._answers.clear()
            return answers

    def wait(self, timeout: float | None, ready: Callable[[], bool]) -> bool:
        """Block until something arrives or changes and ``ready`` says so.

        Raises:
            EnvironmentFailure: the thread that talks to the clients is gone.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not ready():
                if self._failure is not None:
                    raise EnvironmentFailure(
                        f"the gRPC server died: {self._failure}"
                    ) from self._failure
                left = None if ends is None else ends - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def answered(self, ids: frozenset[str]) -> bool:
        """Whether a reply to one of these messages can be fetched."""
        with self._changed:
            return any(message.metadata.message_id in ids for message, _ in self._answers)

    @property
    def connected(self) -> frozenset[str]:
        """Names of the sites that are ready for work."""
        return self._connected

    # the event loop

    def open_for(self, site: str) -> list[Errand]:
        """The errands that wait for a site, in the order they were posted."""
        with self._changed:
            return [e for t, e in self._open.items() if t.site == site]

    def sites(self) -> set[str]:
        """The sites that errands wait for."""
        with self._changed:
            return {ticket.site for ticket in self._open}

    def errand(self, ticket: Ticket) -> Errand | None:
        """The open errand of a ticket."""
        with self._changed:
            return self._open.get(ticket)

    def verdict(self, ticket: Ticket) -> "pb.Verdict":
        """What a result with this ticket is worth now."""
        with self._changed:
            if ticket in self._open:
                return pb.SEND
            settled = self._settled.get(ticket.site, {}).get(ticket)
            if settled is not None:
                return pb.DUPLICATE if settled == pb.ACCEPTED else settled
            past = self._terms.history.get(ticket.site)
            known = ticket.run == self._terms.run and ticket.kind == "train"
            return pb.DUPLICATE if known and ticket.round == past else pb.STALE

    def settle(self, ticket: Ticket, reply: Message, verdict: "pb.Verdict") -> "pb.Verdict":
        """Take an answer; the first one wins.

        Returns:
            ``verdict``, or what the answer is worth where the errand is not open any more.
        """
        with self._changed:
            errand = self._open.pop(ticket, None)
            if errand is None:
                return self.verdict(ticket)
            self._settle(ticket, verdict)
            self._answers.append((errand.message, reply))
            self._changed.notify_all()
            return verdict

    def presence(self, connected: Iterable[str]) -> None:
        """Say who is there."""
        with self._changed:
            self._connected = frozenset(connected)
            self._changed.notify_all()

    def failed(self, error: BaseException) -> None:
        """Say that no answer will ever come again."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _settle(self, ticket: Ticket, verdict: "pb.Verdict") -> None:
        settled = self._settled.setdefault(ticket.site, OrderedDict())
        settled[ticket] = verdict
        while len(settled) > _REMEMBERED:
            settled.popitem(last=False)


class GrpcGrid(SimulationGrid):
    """Real clients behind Flower's Grid. Node id = number in the register.

    Messages must be such as :mod:`fedft.core.codec` makes: a plan and arrays travel, nothing else.

    Args:
        terms: what clients are told and held to.
        address: where to listen; port 0 lets the system choose, see :attr:`port`.
        registry: who may come.
        authority: of the certificates; None without TLS.
        audit: is told who came, went or was turned away.
        timing: patience.

    Attributes:
        port: the port that is listened on.

    Raises:
        EnvironmentFailure: the address cannot be bound.
    """

    def __init__(
        self,
        terms: Terms,
        address: Address,
        registry: Registry,
        authority: Authority | None,
        audit: Audit,
        timing: Timing | None = None,
    ) -> None:
        if (authority is None) != address.insecure:
            raise SecurityRefusal("a server without TLS has to be asked for (insecure)")
        super().__init__(1)
        self._terms = terms
        self._registry = registry
        self._digests = Digests()
        self._desk = Desk(terms)
        self._hub = _Hub(terms, self._desk, registry, authority, audit, timing or Timing())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="fedft-grpc", daemon=True)
        self._thread.start()
        try:
            self.port = self._on_loop(self._hub.start(address))
        except Exception:
            self._stop_loop()
            raise

    @property
    def connected(self) -> frozenset[str]:
        """Names of the sites that are ready for work."""
        return self._desk.connected

    def away_s(self, site: str) -> float:
        """Seconds since a site was last connected, or since this server started."""
        return self._hub.away_s(site)

    def wait_connected(self, enough: Callable[[frozenset[str]], bool], timeout: float) -> bool:
        """Block until enough sites are there, or for ``timeout`` seconds."""
        return self._desk.wait(timeout, lambda: enough(self._desk.connected))

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        self._check_usable()
        wanted = frozenset(message_ids)
        if not wanted.isdisjoint(self._ready):
            return True
        return self._desk.wait(timeout, lambda: self._desk.answered(wanted))

    def get_node_ids(self) -> range:
        clients = self._registry.clients().values()
        return range(1, 1 + max((client.node for client in clients), default=0))

    def drain(self, *, finished: bool, reason: str, patience_s: float = 10.0) -> None:
        """Tell the clients that it is over, or that the server pauses, and let them go."""
        if not self._closed:
            self._on_loop(self._hub.drain(finished, reason, patience_s))

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        self._on_loop(self._hub.stop())
        self._stop_loop()

    def _announce(self, cohorts: Sequence[Sequence[Message]]) -> None:
        self._digests = Digests()
        self._names = {c.node: c.name for c in self._registry.clients().values()}

    def _enqueue(self, job: Job) -> None:
        errands = [self._errand(message) for message in job.messages]
        self._desk.post(errands)
        self._loop.call_soon_threadsafe(self._hub.hand_out, errands)

    def _errand(self, message: Message) -> Errand:
        content, about = message.content, message.metadata
        plan = cast(str, content.config_records["config"]["plan"])
        ticket = Ticket(
            run=self._terms.run,
            round=int(about.group_id),
            site=self._names[about.dst_node_id],
            kind=about.message_type,
            base=self._digests.of(content, plan),
        )
        return Errand(ticket, message, plan, self._terms.expected(message))

    def _collect(self) -> None:
        for message, reply in self._desk.fetch():
            self._deliver(message, Answer(reply))

    def _abandon(self, ids: frozenset[str]) -> None:
        gone = self._desk.withdraw(ids)
        if gone and not self._closed:
            self._loop.call_soon_threadsafe(self._hub.call_off, gone)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


# ── the event loop's side ─────────────────────────────────────────────────────────────────────


class _Refused(Exception):
    """A client is turned away.

    ``retry``: the same attempt may succeed later; ``mismatch``: its version, model or data are not
    the run's.
    """

    def __init__(self, reason: str, *, retry: bool = False, mismatch: bool = False) -> None:
        super().__init__(reason)
        self.message = pb.Refusal(reason=reason, retry=retry, mismatch=mismatch)


class _Left(Exception):
    """A client said goodbye; there is nothing to tell it."""


class _Hub(link_pb2_grpc.FederationServicer):
    """All streams. Everything here runs on the event loop."""

    def __init__(
        self,
        terms: Terms,
        desk: Desk,
        registry: Registry,
        authority: Authority | None,
        audit: Audit,
        timing: Timing,
    ) -> None:
        self.terms = terms
        self.desk = desk
        self.registry = registry
        self.audit = audit
        self.timing = timing
        self._authority = authority
        self._streams: dict[str, _Stream] = {}
        self._left: dict[str, float] = {}  # site → when it went away, monotonic
        self._begun = time.monotonic()
        self.over: pb.Drain | None = None
        self._watching: asyncio.Task[None] | None = None
        self._server: Any = None

    async def start(self, address: Address) -> int:
        server = grpc.aio.server(options=_OPTIONS)
        link_pb2_grpc.add_FederationServicer_to_server(self, server)
        healthy = vars(health)["aio"].HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        for name in ("", SERVICE):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            if self._authority is None:
                port = server.add_insecure_port(address.binding)
            else:
                port = server.add_secure_port(address.binding, _tls(self._authority, address))
        except RuntimeError as error:
            raise EnvironmentFailure(
                f"cannot listen on {address.binding}: the port is taken, or the address is not "
                "this machine's",
                fix="Choose another --port, or stop what uses it.",
            ) from error
        await server.start()
        self._server = server
        self._watching = asyncio.create_task(self._watch())
        return port

    async def drain(self, finished: bool, reason: str, patience_s: float) -> None:
        word = pb.Drain(finished=finished, reason=reason)
        # From now on nobody is let in: who comes late hears at the door that the run is over.
        self.over = word if finished else None
        streams = list(self._streams.values())
        for stream in streams:
            stream.put(word)
        if streams:
            await asyncio.wait([s.ended for s in streams], timeout=patience_s)

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._server is not None:
            await self._server.stop(grace=1.0)

    def hand_out(self, errands: Sequence[Errand]) -> None:
        for errand in errands:
            stream = self._streams.get(errand.ticket.site)
            if stream is not None:
                stream.put(errand)
            else:
                self._left.setdefault(errand.ticket.site, time.monotonic())

    def call_off(self, tickets: Sequence[Ticket]) -> None:
        by_site: dict[str, list[pb.Ticket]] = {}
        for ticket in tickets:
            by_site.setdefault(ticket.site, []).append(ticket.message())
        for site, messages in by_site.items():
            if (stream := self._streams.get(site)) is not None:
                stream.put(pb.Cancel(tickets=messages))

    async def _watch(self) -> None:
        """Cut streams of clients that were revoked; give up errands of clients that stay away."""
        try:
            while True:
                await asyncio.sleep(self.timing.watch)
                clients = self.registry.clients()
                for name, stream in list(self._streams.items()):
                    client = clients.get(name)
                    if client is None or client.revoked:
                        why = client.why if client else "not registered any more"
                        stream.cut(_Refused(f"{name} was revoked: {why}"))
                for site in self.desk.sites():
                    client = clients.get(site)
                    if client is None or client.revoked:
                        self._give_up(site, f"{site} was revoked")
                    elif (
                        time.monotonic() - self._left.get(site, float("inf")) > self.timing.absence
                    ):
                        self._give_up(site, f"{site} was away for {self.timing.absence:.0f} s")
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.desk.failed(error)
            raise

    def _give_up(self, site: str, reason: str) -> None:
        for errand in self.desk.open_for(site):
            reply = error_reply(errand.message, NODE_UNAVAILABLE, reason)
            self.desk.settle(errand.ticket, reply, pb.LATE)

    # streams come and go

    def arrive(self, stream: "_Stream") -> None:
        self._streams[stream.site] = stream
        self._left.pop(stream.site, None)
        self.desk.presence(self._streams)
        for errand in self.desk.open_for(stream.site):
            stream.put(errand)

    def depart(self, stream: "_Stream") -> None:
        if self._streams.get(stream.site) is stream:
            del self._streams[stream.site]
            self._left[stream.site] = time.monotonic()
            self.desk.presence(self._streams)

    def away_s(self, site: str) -> float:
        return time.monotonic() - self._left.get(site, self._begun)

    def replaces(self, name: str, instance: str) -> None:
        """Make room for a stream of a site that may have one.

        Raises:
            _Refused: the other one is alive, and of another process.
        """
        old = self._streams.get(name)
        if old is None:
            return
        if old.instance != instance and old.quiet_s < 2.5 * self.timing.heartbeat:
            raise _Refused(f"{name} is connected from another machine or process", retry=True)
        old.cut(None)
        self.depart(old)

    # the two calls

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        serial, name = _certificate(context)
        try:
            if self._authority is None:
                raise SecurityRefusal("a server without TLS certifies nobody")
            pem = await asyncio.to_thread(self.registry.enrol, serial, request.csr, self._authority)
        except FedftError as error:
            self.audit("refused", name, error.what, peer=context.peer())
            return pb.EnrolReply(refusal=str(error))
        self.audit("enrolled", name, peer=context.peer())
        return pb.EnrolReply(certificate=pem)

    async def Session(self, request_iterator: Any, context: Any) -> None:
        stream = _Stream(self, context)
        try:
            await stream.serve()
        except _Refused as refused:
            self.audit("refused", stream.site or "?", str(refused), peer=context.peer())
            await stream.tell(refusal=refused.message)
        except (_Left, Broken) as gone:
            if stream.dismissed and isinstance(gone, _Left):
                await asyncio.to_thread(self.registry.dismissed, stream.site)
            self.audit("left", stream.site or "?", str(gone), peer=context.peer())
        except (grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError) as broke:
            self.audit("left", stream.site or "?", "the connection broke", peer=context.peer())
            if isinstance(broke, asyncio.CancelledError):
                raise
        finally:
            self.depart(stream)
            if not stream.ended.done():
                stream.ended.set_result(None)

    def admit(self, context: Any, hello: pb.Hello) -> tuple[Client, str]:
        """The client that is speaking, and the serial number of the certificate it shows.

        Raises:
            _Refused: it may not.
        """
        clients = self.registry.clients()
        serial = ""
        if self._authority is None:
            client = clients.get(hello.site)
            if client is None:
                raise _Refused(f"{hello.site[:80]!r} is not registered here")
        else:
            serial, name = _certificate(context)
            client = clients.get(name)
            if client is None:
                raise _Refused(f"{name!r} is not registered here")
            known = bool(serial) and serial in (client.serial, client.renewed)
            if not known and not client.revoked:
                raise _Refused(f"{name} was enrolled with another certificate than this one")
        if client.revoked:
            raise _Refused(f"{client.name} was revoked on {client.revoked}: {client.why}")
        return client, serial


class _Stream:
    """One site's stream, from hello to goodbye."""

    def __init__(self, hub: _Hub, context: Any) -> None:
        self._hub = hub
        self._context = context
        self._timing = hub.timing
        self._pipe = Pipe(context, pb.FromServer, hub.timing.stall)
        self._queue: asyncio.Queue[Errand | pb.Cancel | pb.Drain] = asyncio.Queue()
        self._given: set[Ticket] = set()
        self._inbox: _Upload | None = None
        self._cut: asyncio.Future[_Refused | None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.site = ""
        self.instance = ""
        self.dismissed = False  # it was told that the run is over

    @property
    def quiet_s(self) -> float:
        """Seconds since the client last said anything."""
        return self._pipe.quiet_s

    def put(self, item: "Errand | pb.Cancel | pb.Drain") -> None:
        """Send something, in its turn; an errand once."""
        if isinstance(item, Errand):
            if item.ticket in self._given:
                return
            self._given.add(item.ticket)
        self._queue.put_nowait(item)

    def cut(self, refusal: _Refused | None) -> None:
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
            await self._handshake()
            await first_to_end(self._read_on(), self._send_on(), self._until_cut(), heart)
        finally:
            heart.cancel()

    async def _until_cut(self) -> None:
        if (refusal := await self._cut) is not None:
            raise refusal

    # opening

    async def _handshake(self) -> None:
        hello = (await self._pipe.read(self._timing.handshake)).hello
        client, serial = self._hub.admit(self._context, hello)
        self.site = client.name
        _check_versions(hello)
        self._hub.replaces(client.name, hello.instance)
        self.instance = hello.instance
        if self._hub.over is not None:
            await self._dismiss(self._hub.over)
        terms = self._hub.terms
        task = pb.Task(run=terms.run, spec=terms.task, hashes=pb.Hashes(**terms.hashes))
        await self._pipe.say(task=task)
        offer = await self._offer()
        site = self._accepted(offer)
        await asyncio.to_thread(self._hub.registry.joined, site, serial)
        self._hub.replaces(client.name, hello.instance)
        await self._pipe.say(welcome=pb.Welcome())
        self._hub.audit(
            "joined",
            site.name,
            peer=self._context.peer(),
            examples=site.examples,
            versions=", ".join(f"{k} {v}" for k, v in sorted(hello.versions.items())),
        )
        self._hub.arrive(self)

    async def _dismiss(self, word: pb.Drain) -> None:
        """Say that the run is over, and hear the goodbye."""
        self.dismissed = True
        await self._pipe.say(drain=word)
        message = await self._pipe.read(self._timing.handshake)
        raise _Left(message.goodbye.reason[:500])

    async def _offer(self) -> pb.Offer:
        """The client's offer, once it has loaded; heartbeats come before it."""
        ends = time.monotonic() + self._timing.loading
        while time.monotonic() < ends:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case "offer":
                    return message.offer
                case "heartbeat":
                    continue
                case "goodbye":
                    raise _Left(message.goodbye.reason[:500])
                case other:
                    raise _Refused(f"an offer was expected, not {other}")
        raise _Refused("the client did not load its model and data in time", retry=True)

    def _accepted(self, offer: pb.Offer) -> Site:
        if not offer.examples:
            raise _Refused(
                f"{self.site} has no training examples, so that it cannot take part", mismatch=True
            )
        for name, wanted in self._hub.terms.hashes.items():
            if getattr(offer.hashes, name) != wanted:
                raise _Refused(
                    f"the {name.replace('_', ' ')} of {self.site} is not the run's "
                    f"({getattr(offer.hashes, name)[:12]!r}, the run's is {wanted[:12]!r})",
                    mismatch=True,
                )
        site = Site(self.site, offer.examples, offer.rank or None, offer.memory_mib or None)
        if (objection := self._hub.terms.objection(site)) is not None:
            raise _Refused(objection, mismatch=True)
        return site

    # reading and writing

    async def _send_on(self) -> None:
        """Hand out what is queued, one thing after the other."""
        while True:
            item = await self._queue.get()
            match item:
                case pb.Cancel():
                    await self._pipe.say(cancel=item)
                case pb.Drain():
                    self.dismissed = item.finished
                    await self._pipe.say(drain=item)
                case _ if self._hub.desk.errand(item.ticket) is item:
                    await self._send(item)
                case _:
                    pass  # called off while it waited

    async def _send(self, errand: Errand) -> None:
        content = errand.message.content
        work = pb.Work(ticket=errand.ticket.message(), plan=errand.plan, content=describe(content))
        await self._pipe.say(work=work)
        await self._pipe.send(content)

    async def _read_on(self) -> None:
        while True:
            message = await self._pipe.read(self._timing.silence)
            match message.WhichOneof("body"):
                case "heartbeat":
                    pass
                case "result":
                    await self._result(message.result)
                case "chunk":
                    await self._chunk(message.chunk.data)
                case "goodbye":
                    raise _Left(message.goodbye.reason[:500])
                case other:
                    raise _Refused(f"{other} makes no sense in the middle of a stream")
            if self._inbox is not None and self._inbox.overdue(self._timing):
                raise _Refused("the upload of a result is too slow", retry=True)

    # results

    async def _result(self, result: pb.Result) -> None:
        """A result is announced: say whether it is wanted."""
        self._inbox = None
        ticket = Ticket.read(result.ticket)
        errand = self._hub.desk.errand(ticket) if ticket.site == self.site else None
        if errand is None:
            verdict = self._hub.desk.verdict(ticket) if ticket.site == self.site else pb.STALE
            await self._ack(ticket, verdict)
            return
        try:
            upload = _Upload(errand, _assembly(result, errand))
        except UpdateRejected as rejected:
            await self._refuse(errand, rejected)
            return
        if upload.assembly is None:
            await self._settle(errand, self._failed(errand, result.failure))
        elif upload.assembly.complete:
            await self._settle(errand, upload.assembly.content())
        else:
            self._inbox = upload
            await self._ack(ticket, pb.SEND)

    async def _chunk(self, data: bytes) -> None:
        upload = self._inbox
        if upload is None or upload.assembly is None:
            raise _Refused("bytes came that nobody asked for")
        try:
            upload.assembly.feed(data)
        except UpdateRejected as rejected:
            self._inbox = None
            await self._refuse(upload.errand, rejected)
            return
        if upload.assembly.complete:
            self._inbox = None
            await self._settle(upload.errand, upload.assembly.content())

    def _failed(self, errand: Errand, failure: pb.Failure) -> Message:
        return error_reply(errand.message, failure.code, failure.reason)

    async def _settle(self, errand: Errand, answer: "Message | RecordDict") -> None:
        reply = answer if isinstance(answer, Message) else Message(answer, reply_to=errand.message)
        verdict = self._hub.desk.settle(errand.ticket, reply, pb.ACCEPTED)
        await self._ack(errand.ticket, verdict)

    async def _refuse(self, errand: Errand, rejected: UpdateRejected) -> None:
        reason = f"{rejected.reason}: {rejected.what}"
        reply = Message(Error(REPLY_REFUSED, reason[:1000]), reply_to=errand.message)
        verdict = self._hub.desk.settle(errand.ticket, reply, pb.REFUSED)
        await self._ack(errand.ticket, verdict, reason)

    async def _ack(self, ticket: Ticket, verdict: "pb.Verdict", reason: str = "") -> None:
        if verdict not in (pb.SEND, pb.ACCEPTED):
            word = pb.Verdict.Name(verdict).lower()
            self._hub.audit(word, self.site, reason or f"{ticket.kind}, round {ticket.round}")
        ack = pb.Ack(ticket=ticket.message(), verdict=verdict, reason=reason)
        await self._pipe.say(ack=ack)


@dataclass(eq=False)
class _Upload:
    """A result on its way in; without an assembly where it is a failure."""

    errand: Errand
    assembly: Assembly | None
    since: float = field(default_factory=time.monotonic)

    def overdue(self, timing: Timing) -> bool:
        size = self.assembly.declared if self.assembly is not None else 0
        return time.monotonic() - self.since > timing.stall + size / timing.rate


def _assembly(result: pb.Result, errand: Errand) -> Assembly | None:
    match result.WhichOneof("outcome"):
        case "content":
            return Assembly(result.content, errand.expected)
        case "failure":
            return None
        case _:
            raise UpdateRejected("schema", "a result has a content or a failure")


def _check_versions(hello: pb.Hello) -> None:
    own, other = importlib.metadata.version("fedft"), hello.versions.get("fedft", "unknown")
    if hello.protocol != PROTOCOL or own.split(".")[:2] != other.split(".")[:2]:
        raise _Refused(
            f"the client has fedft {other[:20]} (protocol {hello.protocol}), the server {own} "
            f"(protocol {PROTOCOL}); install the same version on both",
            mismatch=True,
        )


def _certificate(context: Any) -> tuple[str, str]:
    """Serial number and name of the certificate that the caller showed; TLS has verified it."""
    found = context.auth_context().get("x509_pem_cert", [])
    if not found:
        return "", "?"
    certificate = x509.load_pem_x509_certificate(found[0])
    names = context.auth_context().get("x509_common_name", [b"?"])
    return serial_of(certificate), names[0].decode(errors="replace")


def _tls(authority: Authority, address: Address) -> grpc.ServerCredentials:
    own = authority.server(address)
    return grpc.ssl_server_credentials(
        [(own.key, own.certificate)], root_certificates=own.ca, require_client_auth=True
    )


_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a coin toss
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16_384),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 15_000),
]
