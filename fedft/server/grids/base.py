"""What the grids that simulate their clients have in common.

A simulated node costs nothing until it is used: nodes are a range, and a state is kept only for
nodes that left one. A *job* is a cohort of messages that one worker serves together; a message
pushed alone is a job of one.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedft.core.errors import ConfigError
from fedft.server.grids.flower import NODE_UNAVAILABLE, Run, adopt_identity, empty_run, stamp
from fedft.server.grids.serve import Answer, RunConfig, error_reply


@dataclass(eq=False)
class Job:
    """A cohort of messages on its way through one worker.

    Attributes:
        messages: each to another node.
        losses: workers that died while serving it.
    """

    messages: tuple[Message, ...]
    losses: int = 0
    nodes: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = frozenset(m.metadata.dst_node_id for m in self.messages)

    @property
    def group(self) -> str:
        """The group, which is the round, of its messages."""
        return self.messages[0].metadata.group_id


@dataclass(frozen=True, eq=False)
class Delivery:
    """What came of a message, until it is pulled.

    Attributes:
        node: that served it.
        reply: what it answered.
        state: what it left behind; None where it left what it found.
        times: how often the reply came.
    """

    node: int
    reply: Message
    state: RecordDict | None
    times: int


class JobGrid(Grid, ABC):
    """A Flower Grid whose nodes are simulated.

    Node ids are 1 … ``nodes``. A node sees ``{"partition-id": id - 1, "num-partitions": nodes}``
    as its node config, ``run_config`` as its run config, and its own state from job to job.

    Not for use from several threads. Use it as a context manager, or call :meth:`close`.

    Args:
        nodes: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
    """

    def __init__(self, nodes: int, run_config: RunConfig | None = None) -> None:
        if nodes < 1:
            raise ConfigError(f"a grid needs at least one node, got {nodes}")
        self.nodes = nodes
        self.run_config: RunConfig = dict(run_config or {})
        self._run = empty_run(adopt_identity())
        self._pushed = 0
        self._open: set[str] = set()  # ids that were neither answered nor cancelled
        self._ready: dict[str, Delivery] = {}  # in order of completion
        self._states: dict[int, RecordDict] = {}
        self._ahead: dict[int, RecordDict] = {}  # left by what was delivered and not pulled yet
        self._touched: set[int] = set()
        # by message that was pulled since the last push: node, its new state, its old one, and
        # whether that was to be committed
        self._replaced: dict[str, tuple[int, RecordDict, RecordDict | None, bool]] = {}
        self._closed = False

    # --- what a kind of grid does in its own way ---

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Blocks until pulling may give a reply to one of these messages.

        Args:
            message_ids: what the caller waits for.
            timeout: in seconds; None waits as long as any of them is under way.

        Returns:
            False when the time is over, or when no reply can come any more.

        Raises:
            EnvironmentFailure: the machinery behind the grid is gone.
        """

    @abstractmethod
    def _enqueue(self, job: Job) -> None:
        """Takes a job over. Must not block on clients."""

    @abstractmethod
    def _collect(self) -> None:
        """Does what can be done without blocking, and delivers what is complete."""

    @abstractmethod
    def _abandon(self, ids: frozenset[str]) -> None:
        """Forgets queued work for these messages, which nobody waits for any more."""

    def close(self) -> None:
        """Ends all work and frees what the grid holds. May be called again."""
        self._closed = True
        self._open.clear()
        self._ready.clear()

    # --- jobs and messages ---

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        """Sends cohorts of messages; each cohort is served by one worker, together.

        Messages to one node are served in the order they were pushed in.

        Args:
            jobs: cohorts, in each of which a node occurs once.

        Returns:
            The ids of all messages, in order.

        Raises:
            ValueError: a node occurs twice in a cohort, or a message is already under way.
        """
        self._check_usable()
        self._replaced.clear()
        cohorts = [tuple(job) for job in jobs]
        self._check_cohorts(cohorts)
        ids: list[str] = []
        for cohort in cohorts:
            for message in cohort:
                self._pushed += 1
                stamp(message, f"{self._run.run_id}-{self._pushed}")
                ids.append(message.metadata.message_id)
        self._open.update(ids)
        known = [self._reachable(cohort) for cohort in cohorts]
        self._announce(known)
        for cohort in known:
            if cohort:
                self._enqueue(Job(cohort))
        return ids

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self.push_jobs([message] for message in messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready among those asked for, in order of completion, each once.

        Never blocks on clients; see :meth:`wait`. Ids that were cancelled, or answered before,
        give nothing.
        """
        self._check_usable()
        self._collect()
        wanted = set(message_ids)
        ready = [message_id for message_id in self._ready if message_id in wanted]
        return [reply for message_id in ready for reply in self._take(message_id)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Sends messages and waits for their replies.

        Args:
            messages: to any nodes.
            timeout: in seconds. What has not answered by then is cancelled.

        Returns:
            The replies in the order of the messages, whatever order they arrived in: a strategy
            that sums them as they come gets the same bits each time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        missing = dict.fromkeys(ids)
        replies: dict[str, Message] = {}
        while True:
            for reply in self.pull_messages(missing):
                replies[reply.metadata.reply_to_message_id] = reply
                missing.pop(reply.metadata.reply_to_message_id, None)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not missing or left == 0.0 or not self.wait(missing, left):
                break
        self.cancel(missing)
        return [replies[message_id] for message_id in ids if message_id in replies]

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Gives up on messages, for example at a deadline.

        Their replies are dropped, also late ones, and what they did to a node's state is not
        kept. Work that has not begun is not done.
        """
        ids = frozenset(message_ids)
        self._open -= ids
        for message_id in ids & self._ready.keys():
            self._forget_ahead(self._ready.pop(message_id))
        if ids:
            self._abandon(ids)

    def refuse(self, message_id: str, reason: str) -> None:
        """Says that the reply to a message, which was pulled, was of no use.

        What it left at its node does not count either: the node has the state from before again, as
        a real client has. To be said before anything else is pushed.
        """
        if message_id not in self._replaced:
            return
        node, state, before, touched = self._replaced.pop(message_id)
        if self._states.get(node) is state:
            self._keep_state(node, before or RecordDict())
            if not touched:
                self._touched.discard(node)

    def _deliver(self, message: Message, answer: Answer, times: int = 1) -> None:
        """Books the answer to a message, unless nobody waits for it any more."""
        message_id = message.metadata.message_id
        if message_id not in self._open:
            return
        self._open.remove(message_id)
        node = message.metadata.dst_node_id
        if answer.state is not None:
            self._ahead[node] = answer.state
        self._ready[message_id] = Delivery(node, answer.reply, answer.state, times)

    def _take(self, message_id: str) -> list[Message]:
        """A reply that is ready, and what its node left behind."""
        delivery = self._ready.pop(message_id)
        if (state := delivery.state) is not None:
            node = delivery.node
            before = self._states.get(node)
            self._replaced[message_id] = node, state, before, node in self._touched
            self._keep_state(node, state)
        self._forget_ahead(delivery)
        return [delivery.reply] * delivery.times

    def _forget_ahead(self, delivery: Delivery) -> None:
        if delivery.state is not None and self._ahead.get(delivery.node) is delivery.state:
            del self._ahead[delivery.node]

    def _state_of(self, node: int) -> RecordDict | None:
        """What a node works on: what its last job left, whether or not that was pulled."""
        return (self._ahead[node] or None) if node in self._ahead else self._states.get(node)

    def _reachable(self, cohort: Sequence[Message]) -> tuple[Message, ...]:
        """Those to nodes that there are; the others get error replies, as on a real network."""
        nodes = self.get_node_ids()
        for message in cohort:
            if message.metadata.dst_node_id not in nodes:
                self._deliver(message, Answer(_unknown_node(message, self.nodes)))
        return tuple(m for m in cohort if m.metadata.dst_node_id in nodes)

    def _announce(self, cohorts: Sequence[Sequence[Message]]) -> None:
        """Sees all cohorts of one push before any of them is enqueued."""

    def _check_cohorts(self, cohorts: Sequence[Sequence[Message]]) -> None:
        seen: set[int] = set()
        for cohort in cohorts:
            nodes = [message.metadata.dst_node_id for message in cohort]
            if len(set(nodes)) != len(nodes):
                raise ValueError(f"a cohort holds each node once; got nodes {sorted(nodes)}")
            for message in cohort:
                if id(message) in seen or message.metadata.message_id in self._open:
                    raise ValueError("a message is already under way; make a new one")
                seen.add(id(message))

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("the grid is closed")

    # --- states ---

    @property
    def states(self) -> Mapping[int, RecordDict]:
        """Node id → the state it left behind, by what was pulled. Only nodes that have one."""
        return self._states

    def touched_states(self) -> dict[int, RecordDict | None]:
        """The states that changed since they were last committed; None where one became empty."""
        return {node: self._states.get(node) for node in sorted(self._touched)}

    def states_committed(self, nodes: Iterable[int]) -> None:
        """Says that the present states of these nodes are on disk."""
        self._touched.difference_update(nodes)
        self._replaced.clear()

    def load_states(self, states: Mapping[int, RecordDict]) -> None:
        """Puts the states of a checkpoint in place of all present ones. They count as committed."""
        self._states = {node: state for node, state in states.items() if state}
        self._ahead.clear()
        self._touched.clear()
        self._replaced.clear()

    def _keep_state(self, node: int, state: RecordDict) -> None:
        self._touched.add(node)
        if state:
            self._states[node] = state
        else:
            self._states.pop(node, None)

    # --- the rest of Flower's interface ---

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> range:
        """All node ids, as a range: a million nodes cost no objects."""
        return range(1, self.nodes + 1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _unknown_node(message: Message, nodes: int) -> Message:
    reason = f"there is no node {message.metadata.dst_node_id}; this grid has nodes 1 to {nodes}"
    return error_reply(message, NODE_UNAVAILABLE, reason)
