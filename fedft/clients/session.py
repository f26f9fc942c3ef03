"""A site's side of its stream: stay connected, take work, give back results, each exactly once.

Work is done in one thread of its own, so that the stream stays alive while a model trains. A
result is kept until the server has judged it, over as many connections as that takes; work that
comes again is not done again.
"""

import asyncio
import logging
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import RecordDict

from fedft.clients.proxies import proxy_note
from fedft.clients.stream import UNUSABLE, Finished, Job, Paused, Stream
from fedft.clients.work import Connection, Failure, Offer, Timing, Worker
from fedft.core.errors import (
    EnvironmentFailure,
    Interrupted,
    SecurityRefusal,
)
from fedft.core.link import codes
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import (
    Ticket,
)
from fedft.core.link.secrets import Credentials
from fedft.core.link.stream import Broken, Pipe
from fedft.core.link.trust import tls_trouble

logger = logging.getLogger(__name__)


_KEPT_RESULTS = 2
_MOST_WORK = 8
"""Pieces of work that are held at a time: each holds an adapter, or a result."""
_MEANT = 4
"""Times in a row that a server hangs up on a certificate before that is taken for its answer."""


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
        self._jobs: OrderedDict[Ticket, Job] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedft-work")
        self._random = random.Random()
        self._stream: Stream | None = None
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
            stream, reason = Stream(self), "the stream ended"
            try:
                await self._unless_stopped(stream.serve())
            except Finished as finished:
                return str(finished)
            except (Broken, Paused) as lost:
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
                raise Interrupted("stopped; the client can join again with the same command")
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
                f"{self.connection.target} and this client do not trust each other: {trouble.reason}",
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
            self._jobs[ticket] = job = Job(ticket, given=(plan, content))
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

    async def _do(self, job: Job) -> None:
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

    def connected(self, stream: "Stream") -> None:
        """A stream is open for work."""
        self._stream = stream
        stream.pulse()
        self.offer_results(again=True)

    @property
    def instance(self) -> str:
        """Drawn when this session was made."""
        return self._instance
