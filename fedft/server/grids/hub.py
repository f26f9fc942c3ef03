"""All streams of the gRPC grid, on its event loop: who comes, who goes, and who is turned away.

Whatever goes wrong with one client ends its stream, and nobody else's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from flwr.app import Error
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedft.core.errors import EnvironmentFailure, FedftError, SecurityRefusal
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.framing import MAX_MESSAGE_BYTES, Ticket
from fedft.core.link.limits import TooLong, bounded
from fedft.core.link.stream import Broken, Overlong
from fedft.core.types import Site
from fedft.server.authority import Issuer
from fedft.server.grids.allowance import Allowance
from fedft.server.grids.door import Door, Room, descriptors, raise_limit
from fedft.server.grids.flower import NODE_UNAVAILABLE
from fedft.server.grids.outbox import Outbox, Pending, Verdict
from fedft.server.grids.stream import (
    LONGEST,
    Left,
    Refused,
    Stream,
    Terms,
    Timing,
    acknowledgement,
)
from fedft.server.identity import Address, Audit, Client, Registry, serial_of

logger = logging.getLogger(__name__)

SERVICE = "fedft.link.v1.Federation"
_TURNED_AWAY = 32
"""Names of whom the last refusal is remembered."""
_HALF_OPEN, _OWN_HALF_OPEN = 256, 4
"""Streams on which nobody has said hello yet: in all, and of one certificate."""
_TOLD, _TOLD_S = 20, 1.0
"""Lines about refusals that whoever watches is told at once, and seconds until the next after."""


class Hub(link_pb2_grpc.FederationServicer):
    """All streams. Everything here runs on the event loop, but for what is read by properties.

    Args:
        terms: what clients are told and held to.
        outbox: the work for them.
        registry: who may come.
        authority: of the certificates; None without TLS.
        audit: is told who came, went or was turned away.
        timing: patience.
        tell: takes a line for whoever watches.

    Attributes:
        over: what whoever comes late is told; None while the run goes on.
    """

    def __init__(
        self,
        terms: Terms,
        outbox: Outbox,
        registry: Registry,
        authority: Issuer | None,
        audit: Audit,
        timing: Timing,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.terms = terms
        self.outbox = outbox
        self.registry = registry
        self.audit = audit
        self.timing = timing
        self.over: pb.Drain | None = None
        self._authority = authority
        self._tell = tell
        self._streams: dict[str, Stream] = {}
        self._loading: dict[str, Stream] = {}  # sites that have said who they are, and no more yet
        self._left: dict[str, float] = {}  # site → when it went away, monotonic
        self._half_open: dict[Stream, str] = {}  # → name in its certificate; oldest first
        self._lines = Allowance(_TOLD, 1 / _TOLD_S)
        self._door: Door | None = None
        self._turned_away: Mapping[str, str] = {}  # replaced, never changed: any thread reads it
        self._begun = time.monotonic()
        self._watching: asyncio.Task[None] | None = None
        self._server: Any = None

    @property
    def turned_away(self) -> Mapping[str, str]:
        """Who was refused last, or left before it was let in, and why. For any thread."""
        return self._turned_away

    def doing(self) -> Mapping[str, str]:
        """Site → what it says it does; of those that are connected. For any thread."""
        streams = {**dict(self._loading), **dict(self._streams)}
        return {name: stream.doing for name, stream in streams.items() if stream.doing}

    async def start(self, address: Address) -> int:
        room = Room.within(raise_limit(), len(descriptors()))
        most = ("grpc.max_allowed_incoming_connections", room.most)
        server = grpc.aio.server(options=[*_OPTIONS, most])
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
        self._door = Door(port, room)
        self._watching = asyncio.create_task(self._watch())
        return port

    async def drain(self, finished: bool, reason: str, patience_s: float) -> None:
        word = pb.Drain(finished=finished, reason=reason[:LONGEST])
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

    def hand_out(self, work: Sequence[Pending]) -> None:
        for pending in work:
            stream = self._streams.get(pending.ticket.site)
            if stream is not None:
                stream.put(pending)
            else:
                self._left.setdefault(pending.ticket.site, time.monotonic())

    def tell_refused(self, ticket: Ticket, reason: str) -> None:
        """Tell a site that a result of it, which was taken, turned out to be of no use."""
        self.audit.quietly(Verdict.REFUSED.value, ticket.site, reason)
        if (stream := self._streams.get(ticket.site)) is not None:
            stream.put(acknowledgement(ticket, Verdict.REFUSED, reason))

    def call_off(self, tickets: Sequence[Ticket]) -> None:
        by_site: dict[str, list[pb.Ticket]] = {}
        for ticket in tickets:
            by_site.setdefault(ticket.site, []).append(ticket.message())
        for site, messages in by_site.items():
            if (stream := self._streams.get(site)) is not None:
                stream.put(pb.Cancel(tickets=messages))

    async def _watch(self) -> None:
        """Cut streams of clients that were revoked; give up work of clients that stay away."""
        try:
            while True:
                await asyncio.sleep(self.timing.watch)
                clients = self.registry.clients()
                self._close_surplus()
                for name, stream in [*self._streams.items(), *self._loading.items()]:
                    client = clients.get(name)
                    if client is None or client.revoked:
                        why = client.why if client else "not registered any more"
                        stream.cut(Refused(f"{name} was revoked: {why}"))
                for site in self.outbox.sites():
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
            self.outbox.failed(error)
            raise

    def _close_surplus(self) -> None:
        if self._door is not None:
            streams = [*self._streams.values(), *self._loading.values()]
            if closed := self._door.look([stream.peer for stream in streams]):
                why = f"{closed} connections on which nobody showed himself: too many at once"
                self.audit.quietly("refused", "?", why)

    def _give_up(self, site: str, reason: str) -> None:
        for pending in self.outbox.open_for(site):
            self.outbox.settle(pending.ticket, Error(NODE_UNAVAILABLE, reason), Verdict.LATE)

    # streams come and go

    def _opened(self, stream: Stream, name: str) -> None:
        """A stream came, on which nobody has said anything; too many of those, and the oldest go."""
        self._half_open[stream] = name
        own = [s for s, whose in self._half_open.items() if whose == name] if name else []
        for crowd, most in ((own, _OWN_HALF_OPEN), ([*self._half_open], _HALF_OPEN)):
            for old in crowd[: max(0, len(crowd) - most)]:
                old.cut(Refused("too many streams on which nobody says hello", retry=True))
                self._half_open.pop(old, None)

    def greeted(self, stream: Stream) -> None:
        self._half_open.pop(stream, None)
        self._loading[stream.site] = stream

    async def joined(self, site: Site, serial: str) -> None:
        await asyncio.to_thread(self.registry.joined, site, serial)

    def arrive(self, stream: Stream) -> None:
        self._streams[stream.site] = stream
        self._left.pop(stream.site, None)
        self._turned_away = {n: why for n, why in self._turned_away.items() if n != stream.site}
        self.outbox.presence(self._streams)
        for pending in self.outbox.open_for(stream.site):
            stream.put(pending)

    def depart(self, stream: Stream) -> None:
        self._half_open.pop(stream, None)
        if self._loading.get(stream.site) is stream:
            del self._loading[stream.site]
        if self._streams.get(stream.site) is stream:
            del self._streams[stream.site]
            self._left[stream.site] = time.monotonic()
            self.outbox.presence(self._streams)

    def _turn_away(self, who: str, reason: str, how: str) -> None:
        """Remember why a client does not take part; whoever watches is told once a reason."""
        if self._turned_away.get(who) == reason:
            return
        others = [(n, why) for n, why in self._turned_away.items() if n != who]
        self._turned_away = dict([*others, (who, reason)][-_TURNED_AWAY:])
        if self._lines.take() <= 0:  # a stranger can think of many reasons; the audit counts them
            self._tell(f"{who} {how}: {reason}")

    def away_s(self, site: str) -> float:
        return time.monotonic() - self._left.get(site, self._begun)

    def replaces(self, stream: Stream) -> None:
        for streams in (self._streams, self._loading):
            old = streams.get(stream.site)
            if old is None or old is stream:
                continue
            if old.instance != stream.instance and old.quiet_s < 2.5 * self.timing.heartbeat:
                raise Refused(
                    f"{stream.site} is connected from another machine or process", retry=True
                )
            old.cut(None)
            self.depart(old)

    # the two calls

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        serial, name = _certificate(context)
        try:
            if self._authority is None:
                raise SecurityRefusal("a server without TLS certifies nobody")
            try:
                request = bounded(request)
            except TooLong as error:
                raise SecurityRefusal(f"the certificate request is none: {error}") from error
            pem = await asyncio.to_thread(self.registry.enrol, serial, request.csr, self._authority)
        except FedftError as error:
            self.audit.quietly("refused", name, error.what, peer=context.peer())
            self._turn_away(name, error.what, "was refused")
            return pb.EnrolReply(refusal=str(error))
        self.audit.quietly("enrolled", name, peer=context.peer())
        return pb.EnrolReply(certificate=pem)

    async def Session(self, request_iterator: Any, context: Any) -> None:
        stream = Stream(self, context)
        self._opened(stream, "" if self._authority is None else _certificate(context)[1])
        try:
            await stream.serve()
        except Refused as refused:
            await self._refuse(stream, refused)
        except Overlong as much:
            await self._refuse(stream, Refused(str(much), mismatch=True))
        except (Left, Broken) as gone:
            if stream.dismissed and isinstance(gone, Left):
                await asyncio.to_thread(self.registry.dismissed, stream.site)
            self._note_gone(stream, str(gone))
        except (grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError) as broke:
            self._note_gone(stream, "the connection broke")
            if isinstance(broke, asyncio.CancelledError):
                raise
        except Exception as error:  # a fact about this client, known or not: the others go on
            logger.debug("the stream of %s failed", stream.site or "?", exc_info=error)
            reason = f"the server cannot deal with this client: {type(error).__name__}: {error}"
            # Before it was let in it would meet the same again.
            await self._refuse(stream, Refused(reason[:500], retry=stream.arrived, mismatch=True))
        finally:
            self.depart(stream)
            if not stream.ended.done():
                stream.ended.set_result(None)

    async def _refuse(self, stream: Stream, refused: Refused) -> None:
        who, reason = refused.who or stream.site or "?", str(refused)
        self.audit.quietly("refused", who, reason, peer=stream.peer)
        self._turn_away(who, reason, "was cut off" if stream.arrived else "was refused")
        await stream.tell(refusal=refused.message)

    def _note_gone(self, stream: Stream, reason: str) -> None:
        self.audit.quietly("left", stream.site or "?", reason, peer=stream.peer)
        if stream.site and not (stream.arrived or stream.dismissed):
            self._turn_away(stream.site, reason, "left before it had joined")

    def admit(self, context: Any, hello: pb.Hello) -> tuple[Client, str]:
        clients = self.registry.clients()
        serial = ""
        if self._authority is None:
            client = clients.get(hello.site)
            if client is None:
                raise Refused(f"{hello.site[:80]!r} is not registered here", who=hello.site[:80])
        else:
            serial, name = _certificate(context)
            client = clients.get(name)
            if client is None:
                raise Refused(f"{name!r} is not registered here", who=name)
            known = bool(serial) and serial in (client.serial, client.renewed)
            if not known and not client.revoked:
                raise Refused(
                    f"{name} was enrolled with another certificate than this one", who=name
                )
        if client.revoked:
            raise Refused(
                f"{client.name} was revoked on {client.revoked}: {client.why}", who=client.name
            )
        return client, serial


def _certificate(context: Any) -> tuple[str, str]:
    """Serial number and name of the certificate that the caller showed; TLS has verified it."""
    found = context.auth_context().get("x509_pem_cert", [])
    if not found:
        return "", "?"
    certificate = x509.load_pem_x509_certificate(found[0])
    names = context.auth_context().get("x509_common_name", [b"?"])
    return serial_of(certificate), names[0].decode(errors="replace")


def _tls(authority: Issuer, address: Address) -> grpc.ServerCredentials:
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
