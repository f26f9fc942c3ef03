"""A grid of real clients: each holds one stream to this server, and comes back when it breaks.

The loop of rounds speaks to an :class:`~fedft.server.grids.outbox.Outbox`; an event loop of its own hands
out what is posted there, over gRPC, and judges what returns (:mod:`fedft.server.grids.streams`).
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, cast

from flwr.app import Message, MessageType

from fedft.core.errors import SecurityRefusal
from fedft.core.link.framing import Digests, Ticket
from fedft.core.wire.compress import FP32
from fedft.server.authority import Issuer
from fedft.server.grids.base import Job, JobGrid
from fedft.server.grids.hub import Hub
from fedft.server.grids.outbox import Outbox, Pending
from fedft.server.grids.serve import Answer, describe, error_reply
from fedft.server.grids.stream import Terms, Timing
from fedft.server.identity import Address, Audit, Registry
from fedft.server.validation import PLAN_FAILED


class GrpcGrid(JobGrid):
    """Real clients behind Flower's Grid. Node id = number in the register.

    Messages must be such as :mod:`fedft.core.wire.codec` makes: a plan and arrays travel, nothing else.

    Args:
        terms: what clients are told and held to.
        address: where to listen; port 0 lets the system choose, see :attr:`port`.
        registry: who may come.
        authority: of the certificates; None without TLS.
        audit: is told who came, went or was turned away.
        timing: patience.
        tell: takes a line for whoever watches, from another thread.

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
        authority: Issuer | None,
        audit: Audit,
        timing: Timing | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        if (authority is None) != address.insecure:
            raise SecurityRefusal("a server without TLS has to be asked for (insecure)")
        super().__init__(1)
        self._terms = terms
        self._registry = registry
        self._digests = Digests()
        self._outbox = Outbox(terms.run, terms.history)
        self._hub = Hub(
            *(terms, self._outbox, registry, authority, audit, timing or Timing(), tell)
        )
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
        return self._outbox.connected

    @property
    def doing(self) -> Mapping[str, str]:
        """Site → what it says it does; of those that are connected and say it."""
        return self._hub.doing()

    @property
    def turned_away(self) -> Mapping[str, str]:
        """Name → why that client was refused last, or left before it had joined."""
        return self._hub.turned_away

    def away_s(self, site: str) -> float:
        """Seconds since a site was last connected, or since this server started."""
        return self._hub.away_s(site)

    def wait_connected(self, enough: Callable[[frozenset[str]], bool], timeout: float) -> bool:
        """Block until enough sites are there, or for ``timeout`` seconds."""
        return self._outbox.wait(timeout, lambda: enough(self._outbox.connected))

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        self._check_usable()
        wanted = frozenset(message_ids)
        if not wanted.isdisjoint(self._ready):
            return True
        return self._outbox.wait(timeout, lambda: self._outbox.answered(wanted))

    def get_node_ids(self) -> range:
        clients = self._registry.clients().values()
        return range(1, 1 + max((client.node for client in clients), default=0))

    def refuse(self, message_id: str, reason: str) -> None:
        if (ticket := self._outbox.refuse(message_id)) is not None and not self._closed:
            self._loop.call_soon_threadsafe(self._hub.tell_refused, ticket, reason)

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
        work: list[Pending] = []
        for message in job.messages:
            try:
                work.append(self._pending(message))
            except Exception as error:  # a fact about this client: the others go on
                self._deliver(message, Answer(error_reply(message, PLAN_FAILED, describe(error))))
        self._outbox.post(work)
        self._loop.call_soon_threadsafe(self._hub.hand_out, work)

    def _pending(self, message: Message) -> Pending:
        content, about = message.content, message.metadata
        plan = cast(str, content.config_records["config"]["plan"])
        ticket = Ticket(
            run=self._terms.run,
            round=int(about.group_id),
            site=self._names[about.dst_node_id],
            kind=about.message_type,
            base=self._digests.of(content, plan),
        )
        trains = about.message_type == MessageType.TRAIN
        compressor = self._terms.compressor if trains else FP32
        return Pending(ticket, message, plan, self._terms.expected(message), compressor)

    def _collect(self) -> None:
        for message, reply in self._outbox.fetch():
            self._deliver(message, Answer(reply))

    def _abandon(self, ids: frozenset[str]) -> None:
        gone = self._outbox.withdraw(ids)
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
