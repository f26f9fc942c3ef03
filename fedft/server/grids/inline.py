"""A grid in this process, without threads: for tests, debugging and tiny runs.

Jobs run lazily, one each time replies are pulled, so that deadlines and streaming behave as with
the grids that have workers. It can also misbehave on purpose, see :class:`Faults`.
"""

import copy
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedft.core import seeds
from fedft.server.grids.base import Job, JobGrid
from fedft.server.grids.flower import APP_CRASHED, APP_RAISED, assemble
from fedft.server.grids.serve import (
    Answer,
    App,
    RunConfig,
    answer,
    context_of,
    error_reply,
    resolve,
)


@dataclass(frozen=True)
class Fault:
    """One way to misbehave, and the messages it strikes: those that match every given field.

    Attributes:
        kind: ``drop``: the client is never reached, and no reply comes.
            ``delay``: the reply comes ``seconds`` later.
            ``duplicate``: the reply comes twice, at once.
            ``nan``: every floating-point array of the reply is NaN throughout.
            ``raise``: the client raises; an error reply.
            ``kill``: the worker dies, and again when its job is retried; an error reply for
            every message of the job.
        node: the node it is sent to; None for any.
        round: the round it belongs to, its ``group_id``; None for any.
        ordinal: how many messages this node was pushed before; None for any.
        message_type: such as ``train``; None for any.
        seconds: of ``delay``.
    """

    kind: Literal["drop", "delay", "duplicate", "nan", "raise", "kill"]
    node: int | None = None
    round: int | None = None
    ordinal: int | None = None
    message_type: str | None = None
    seconds: float = 0.0

    def strikes(self, message: Message, ordinal: int) -> bool:
        """Whether it is meant for this message."""
        about = message.metadata
        return (
            self.node in (None, about.dst_node_id)
            and (self.round is None or str(self.round) == about.group_id)
            and self.ordinal in (None, ordinal)
            and self.message_type in (None, about.message_type)
        )


@dataclass(frozen=True)
class Faults:
    """How a grid misbehaves.

    Attributes:
        faults: all that match a message apply.
        reorder: a seed; jobs are then served, and replies come, in an order drawn from it.
    """

    faults: tuple[Fault, ...] = ()
    reorder: int | None = None


@dataclass(frozen=True, eq=False)
class _Late:
    due: float  # on the monotonic clock, seconds
    message: Message
    answer: Answer
    times: int


class InlineGrid(JobGrid):
    """Runs the client app in this process, one job at each pull.

    Clients get copies of what they are sent, as they would from a wire.

    Args:
        app: the client app, or a reference to it such as ``"fedft.clients.app:app"``.
        nodes: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
        faults: how to misbehave; None for not at all.

    Raises:
        ConfigError: the reference leads nowhere.
    """

    def __init__(
        self,
        app: App | str,
        nodes: int,
        run_config: RunConfig | None = None,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(nodes, run_config)
        self._app = resolve(app) if isinstance(app, str) else app
        self._faults = faults or Faults()
        seed = self._faults.reorder
        self._order = None if seed is None else seeds.numpy_generator(seed, "reorder")
        self._queue: deque[Job] = deque()
        self._late: list[_Late] = []
        self._messages_to: Counter[int] = Counter()
        self._struck: dict[str, dict[str, Fault]] = {}  # message id → kind → fault

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        self._check_usable()
        wanted = set(message_ids)
        if self._queue or not wanted.isdisjoint(self._ready):
            return True
        due = [late.due for late in self._late if late.message.metadata.message_id in wanted]
        if not due:
            return False
        left = min(due) - time.monotonic()
        in_time = timeout is None or left <= timeout
        time.sleep(max(0.0, left if timeout is None else min(left, timeout)))
        return in_time

    def close(self) -> None:
        super().close()
        self._queue.clear()
        self._late.clear()

    def _enqueue(self, job: Job) -> None:
        for message in job.messages:
            node = message.metadata.dst_node_id
            ordinal = self._messages_to[node]
            self._messages_to[node] += 1
            struck = {f.kind: f for f in self._faults.faults if f.strikes(message, ordinal)}
            if struck:
                self._struck[message.metadata.message_id] = struck
        self._queue.append(job)

    def _abandon(self, ids: frozenset[str]) -> None:
        keep = [
            [m for m in job.messages if m.metadata.message_id not in ids] for job in self._queue
        ]
        self._queue = deque(Job(tuple(messages)) for messages in keep if messages)
        self._late = [late for late in self._late if late.message.metadata.message_id not in ids]
        for message_id in ids:
            self._struck.pop(message_id, None)

    def _collect(self) -> None:
        now = time.monotonic()
        for late in sorted(self._late, key=lambda late: late.due):
            if late.due <= now:
                self._late.remove(late)
                self._deliver(late.message, late.answer, late.times)
        if self._queue:
            self._serve(self._next_job())

    def _next_job(self) -> Job:
        if self._order is not None:
            self._queue.rotate(-int(self._order.integers(len(self._queue))))
        return self._queue.popleft()

    def _serve(self, job: Job) -> None:
        faults = {
            m.metadata.message_id: self._struck.pop(m.metadata.message_id, {}) for m in job.messages
        }
        answers: dict[str, Answer] = {}
        if any("kill" in struck for struck in faults.values()):
            for message in job.messages:
                answers[message.metadata.message_id] = Answer(
                    error_reply(message, APP_CRASHED, "the worker died (injected)")
                )
        else:
            answers = self._run_clients(job.messages, faults)
        messages = list(job.messages)
        if self._order is not None:
            messages = [messages[int(i)] for i in self._order.permutation(len(messages))]
        for message in messages:
            given = answers.get(message.metadata.message_id)
            if given is not None:
                self._send_back(message, given, faults[message.metadata.message_id])

    def _run_clients(
        self, messages: Sequence[Message], faults: dict[str, dict[str, Fault]]
    ) -> dict[str, Answer]:
        """The answers of those that a fault does not keep from answering, by message id."""
        answers: dict[str, Answer] = {}
        well: list[Message] = []
        for message in messages:
            struck = faults[message.metadata.message_id]
            if "drop" in struck:
                continue
            if "raise" in struck:
                reply = error_reply(message, APP_RAISED, "RuntimeError: injected")
                answers[message.metadata.message_id] = Answer(reply)
            else:
                well.append(copy.deepcopy(message))
        contexts = [
            context_of(
                node,
                self.nodes,
                self.run.run_id,
                self.run_config,
                copy.deepcopy(self._state_of(node)),
            )
            for node in (message.metadata.dst_node_id for message in well)
        ]
        for message, given in zip(well, answer(self._app, well, contexts), strict=True):
            answers[message.metadata.message_id] = given
        return answers

    def _send_back(self, message: Message, given: Answer, struck: dict[str, Fault]) -> None:
        if "nan" in struck and given.reply.has_content():
            given = Answer(_with_nan(given.reply), given.state)
        times = 2 if "duplicate" in struck else 1
        if "delay" in struck:
            due = time.monotonic() + struck["delay"].seconds
            self._late.append(_Late(due, message, given, times))
        else:
            self._deliver(message, given, times)


def _with_nan(reply: Message) -> Message:
    content = RecordDict()
    for name, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            record = ArrayRecord({key: _nan_array(array) for key, array in record.items()})
        content[name] = record
    return assemble(reply.metadata, content)


def _nan_array(array: Array) -> Array:
    """The array with NaN in every place, where its dtype knows NaN.

    All bits set is a NaN in every IEEE format; the header of NumPy's own format stays.
    """
    if "float" not in array.dtype:
        return array
    header = 0
    if array.stype == "numpy.ndarray":
        header = len(array.data) - np.load(BytesIO(array.data), allow_pickle=False).nbytes
    data = array.data[:header] + b"\xff" * (len(array.data) - header)
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)
