"""Work for sites, from when it is asked for until its answer is fetched; no transport in here.

Two threads meet at an :class:`Outbox`. The loop of rounds posts work there and takes answers away;
the event loop of a transport hands the work out and settles what returns. Work belongs to a site,
not to a connection: it stays open for as long as its site is away, and goes out again when the site
is back. Answers are known by their ticket, so that a late, repeated or outdated one is told so and
counts for nothing.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from flwr.app import Error, Message, RecordDict

from fedft.core.errors import EnvironmentFailure
from fedft.core.link.framing import Expected, Ticket
from fedft.core.wire.compress import FP32, Compressor

_REMEMBERED = 8  # settled tickets a site


class Verdict(Enum):
    """What a result is worth."""

    SEND = "send"
    """It is wanted."""
    ACCEPTED = "accepted"
    """It was taken."""
    DUPLICATE = "duplicate"
    """It was taken before."""
    LATE = "late"
    """Its round closed without it."""
    STALE = "stale"
    """It belongs to another round, run or adapter."""
    REFUSED = "refused"
    """It is not what the plan asked for."""


@dataclass(frozen=True, eq=False)
class Pending:
    """One message on its way to a site and back. Asked for again, it is another one."""

    ticket: Ticket
    message: Message
    plan: str
    expected: Expected
    compressor: Compressor = FP32

    @property
    def id(self) -> str:
        """Of the message."""
        return self.message.metadata.message_id


@dataclass(frozen=True)
class _Settled:
    verdict: Verdict
    id: str  # of the message


class Outbox:
    """Work that is open, and answers that were not fetched yet. Safe for all threads.

    Args:
        run: id of the run.
        history: site → last committed round that counts a result of it, in a run that goes on.
    """

    def __init__(self, run: str, history: Mapping[str, int]) -> None:
        self._run = run
        self._history = history
        self._changed = threading.Condition()
        self._open: dict[Ticket, Pending] = {}
        self._settled: dict[str, OrderedDict[Ticket, _Settled]] = {}
        self._answers: deque[tuple[Message, Message]] = deque()
        self._connected: frozenset[str] = frozenset()
        self._failure: BaseException | None = None

    # the loop of rounds

    def post(self, work: Iterable[Pending]) -> None:
        """Open work. What was settled under the same ticket is forgotten: it is asked for again."""
        with self._changed:
            for pending in work:
                self._open[pending.ticket] = pending
                self._settled.get(pending.ticket.site, {}).pop(pending.ticket, None)

    def withdraw(self, ids: frozenset[str]) -> list[Ticket]:
        """Close work that nobody waits for any more; answers to it are late from now on."""
        with self._changed:
            gone = [pending for pending in self._open.values() if pending.id in ids]
            for pending in gone:
                del self._open[pending.ticket]
                self._settle(pending, Verdict.LATE)
            return [pending.ticket for pending in gone]

    def refuse(self, id_: str) -> Ticket | None:
        """Take back that an answer was accepted: it turned out to be of no use.

        Args:
            id_: of the message that was answered.

        Returns:
            Its ticket; None where it is not remembered, or was asked for again since.
        """
        with self._changed:
            for settled in self._settled.values():
                for ticket, was in settled.items():
                    if was.id == id_:
                        settled[ticket] = _Settled(Verdict.REFUSED, id_)
                        return ticket
            return None

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

    # the transport

    def open_for(self, site: str) -> list[Pending]:
        """The work that waits for a site, in the order it was posted."""
        with self._changed:
            return [pending for ticket, pending in self._open.items() if ticket.site == site]

    def sites(self) -> set[str]:
        """The sites that work waits for."""
        with self._changed:
            return {ticket.site for ticket in self._open}

    def pending(self, ticket: Ticket) -> Pending | None:
        """The open work of a ticket."""
        with self._changed:
            return self._open.get(ticket)

    def verdict(self, ticket: Ticket) -> Verdict:
        """What a result with this ticket is worth now."""
        with self._changed:
            if ticket in self._open:
                return Verdict.SEND
            settled = self._settled.get(ticket.site, {}).get(ticket)
            if settled is not None:
                accepted = settled.verdict is Verdict.ACCEPTED
                return Verdict.DUPLICATE if accepted else settled.verdict
            past = self._history.get(ticket.site)
            known = ticket.run == self._run and ticket.kind == "train"
            return Verdict.DUPLICATE if known and ticket.round == past else Verdict.STALE

    def settle(self, ticket: Ticket, answer: RecordDict | Error, verdict: Verdict) -> Verdict:
        """Take an answer; the first one wins.

        It is an answer to whoever waits now: work may have been called off and asked for again
        since it was begun.

        Returns:
            ``verdict``, or what the answer is worth where the ticket is not open any more.
        """
        with self._changed:
            pending = self._open.get(ticket)
            if pending is None:
                return self.verdict(ticket)
            reply = Message(answer, reply_to=pending.message)
            del self._open[ticket]
            self._settle(pending, verdict)
            self._answers.append((pending.message, reply))
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

    def _settle(self, pending: Pending, verdict: Verdict) -> None:
        settled = self._settled.setdefault(pending.ticket.site, OrderedDict())
        settled[pending.ticket] = _Settled(verdict, pending.id)
        while len(settled) > _REMEMBERED:
            settled.popitem(last=False)
