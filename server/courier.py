"""How the rounds talk to sites: messages go out, replies come back, each once."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict

from fedft.core.errors import Interrupted

LOOK_UP_S = 0.5
"""Seconds after which a wait for replies looks whether the run was asked to stop."""


class Courier(Protocol):
    """What the rounds ask of a grid. Node id = index of the site + 1.

    See :class:`~server.grids.base.SimulationGrid` for what each call promises.
    """

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        """Send cohorts of messages; returns the ids of all of them, in order."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """The replies that are there, each once."""
        ...

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Block until there may be a reply; False when the time, in seconds, is over."""
        ...

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Give up on messages; their replies are dropped."""
        ...

    def refuse(self, message_id: str, reason: str) -> None:
        """Say that the reply to a message, which was pulled, was of no use."""
        ...


def messages(
    kind: str, round_: int, contents: Sequence[RecordDict], nodes: Sequence[int]
) -> list[Message]:
    """One message to each of some nodes."""
    return [
        Message(content, node, kind, group_id=str(round_))
        for content, node in zip(contents, nodes, strict=True)
    ]


def ask_to_evaluate(
    grid: Courier, round_: int, contents: Sequence[RecordDict], nodes: Sequence[int]
) -> list[str]:
    """An evaluation for each of some nodes, each on its own; the ids of the messages."""
    alone = messages(MessageType.EVALUATE, round_, contents, nodes)
    return grid.push_jobs([[message] for message in alone])


def replies(
    grid: Courier, ids: Iterable[str], patience_s: float | None, stop: Callable[[], bool]
) -> Iterator[Message]:
    """Replies as they arrive, each once, until all are in or nobody waits any longer.

    What has not arrived when this ends, in whatever way, is cancelled.

    Args:
        grid: that the messages were given to.
        ids: of the messages.
        patience_s: how long to wait, in seconds from now; None is as long as it takes.
        stop: is asked several times a second whether to stop.

    Raises:
        Interrupted: ``stop`` said so.
    """
    waiting = set(ids)
    closes = time.monotonic() + (patience_s if patience_s is not None else float("inf"))
    try:
        while waiting and time.monotonic() < closes:
            if stop():
                raise Interrupted("stopped; the last completed round is committed")
            for reply in grid.pull_messages(waiting):
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    yield reply
            look_up = min(closes, time.monotonic() + LOOK_UP_S)
            arrived = not waiting or grid.wait(waiting, max(0.0, look_up - time.monotonic()))
            if not arrived and time.monotonic() < look_up:
                break  # nothing is under way that could still answer
    finally:
        grid.cancel(waiting)
