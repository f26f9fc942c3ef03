"""How the rounds talk to sites: messages go out, replies come back, each once."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict

from fedft.core.errors import Interrupted

LOOK_UP_S = 0.5
"""Seconds after which a wait for replies looks whether the run was asked to stop."""


class Courier(Protocol):
    """What the rounds ask of a grid. Node id = index of the site + 1.

    See :class:`~fedft.server.grids.base.JobGrid` for what each call promises.
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


@dataclass(frozen=True)
class Waiting:
    """Whom somebody waits for.

    Attributes:
        what: they are waited for, such as ``round 3``.
        verb: what they are to have done: ``answered``, or ``connected``.
        wanted: how many are to do it.
        missing: names of those who have not, as far as they are known.
        done: how many have.
        since: when the waiting began, on the monotonic clock.
        ends: when it is given up, likewise; infinity is never.
    """

    what: str
    verb: str
    wanted: int
    missing: tuple[str, ...]
    done: int
    since: float
    ends: float

    def line(self, doing: Callable[[str], str] = lambda name: "") -> str:
        """In one line, now.

        Args:
            doing: says of a client what it does; empty where that is not known.
        """
        now = time.monotonic()
        names = [f"{n} ({d})" if (d := doing(n)) else n for n in self.missing[:_NAMED]]
        if len(self.missing) > _NAMED:
            names.append(f"{len(self.missing) - _NAMED} more")
        for_whom = f"waiting for {', '.join(names)}, " if names else "waiting, "
        gives_up = "never gives up"
        if isfinite(self.ends):
            at = datetime.now(UTC) + timedelta(seconds=self.ends - now)
            gives_up = f"gives up at {at:%H:%M:%S} UTC"
        return (
            f"{self.what}: {self.done} of {self.wanted} {self.verb}; "
            f"{for_whom}{now - self.since:.0f} s; {gives_up}"
        )


_NAMED = 5  # clients in a line

Watch = Callable[[Waiting | None], None]
"""Is told whom the run waits for, several times a second; None when it waits no more."""


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
    grid: Courier,
    ids: Iterable[str],
    patience_s: float | None,
    stop: Callable[[], bool],
    watch: Callable[[Collection[str], float], None] = lambda missing, closes: None,
) -> Iterator[Message]:
    """Replies as they arrive, each once, until all are in or nobody waits any longer.

    What has not arrived when this ends, in whatever way, is cancelled.

    Args:
        grid: that the messages were given to.
        ids: of the messages.
        patience_s: how long to wait, in seconds from now; None is as long as it takes.
        stop: is asked several times a second whether to stop.
        watch: is told several times a second which ids have no reply yet, and when they are given
            up, on the monotonic clock; of none when the wait is over, however it ended.

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
            watch(waiting, closes)
            look_up = min(closes, time.monotonic() + LOOK_UP_S)
            arrived = not waiting or grid.wait(waiting, max(0.0, look_up - time.monotonic()))
            if not arrived and time.monotonic() < look_up:
                break  # nothing is under way that could still answer
    finally:
        watch((), closes)
        grid.cancel(waiting)
