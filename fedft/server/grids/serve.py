"""The client side of a simulation grid: runs a Flower ClientApp for a job of messages.

Shared by all grids that simulate their clients, in this process or in another one. Any Flower
``ClientApp`` works. An app that can train several sites at once says so with an attribute
``train_many(messages, contexts) -> replies``; it then gets all train messages of a job in one
call, past the app's mods and lifespan.
"""

import importlib
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
    UserConfigValue,
)

from fedft.core.errors import ConfigError
from fedft.server.grids.flower import APP_RAISED

logger = logging.getLogger(__name__)

App = Callable[[Message, Context], Message]
"""What serves one message: a Flower ``ClientApp``, or any function of the same shape."""

RunConfig = Mapping[str, UserConfigValue]

_TRAIN = frozenset({"train", "train.default"})
_LONGEST_REASON = 1000  # characters; it travels with the reply and ends up in a log line


@dataclass(frozen=True, eq=False)
class Answer:
    """What one message led to.

    Attributes:
        reply: the client's reply, or an error reply.
        state: the node's whole new state; None where it did not change. A node whose reply is an
            error keeps the state it had.
    """

    reply: Message
    state: RecordDict | None = None


def resolve(reference: str) -> App:
    """The app behind a reference such as ``"fedft.clients.app:app"``.

    Raises:
        ConfigError: there is no such module or attribute, importing it failed, or it is no app.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigError(
            f"the client app {reference!r} is not of the form 'module:attribute'",
            fix="Name the module and the ClientApp in it, for example 'fedft.clients.app:app'.",
        )
    try:
        app = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise ConfigError(
            f"the client app {reference!r} cannot be loaded: {describe(error)}",
            fix="Check the spelling, and that the module can be imported from here.",
        ) from error
    if not callable(app):
        raise ConfigError(
            f"the client app {reference!r} is a {type(app).__name__}, which cannot be called",
            fix="Point to a flwr.clientapp.ClientApp.",
        )
    return cast(App, app)


def context_of(
    node: int, nodes: int, run_id: int, run_config: RunConfig, state: RecordDict | None
) -> Context:
    """The context of one simulated node. ``node`` counts from 1, its partition from 0."""
    return Context(
        run_id=run_id,
        node_id=node,
        node_config={"partition-id": node - 1, "num-partitions": nodes},
        state=RecordDict() if state is None else state,
        run_config=dict(run_config),
    )


def answer(app: App, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Answer]:
    """Serves a job and tells which states changed. One answer a message, in their order."""
    before = [_fingerprint(context.state) for context in contexts]
    replies = serve(app, messages, contexts)
    return [
        Answer(reply, None if reply.has_error() or _fingerprint(c.state) == old else c.state)
        for reply, c, old in zip(replies, contexts, before, strict=True)
    ]


def serve(app: App, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Runs the app for a job of messages. Never raises for what the app does.

    Args:
        app: the client app.
        messages: what the nodes of this job were sent, each node at most once.
        contexts: the context of each message's node; the app changes their states in place.

    Returns:
        One reply for each message, in their order: the app's, or an error reply with the reason.
    """
    pairs = list(zip(messages, contexts, strict=True))
    train_many = getattr(app, "train_many", None)
    replies: dict[str, Message] = {}
    if callable(train_many):
        together = [pair for pair in pairs if pair[0].metadata.message_type in _TRAIN]
        pairs = [pair for pair in pairs if pair[0].metadata.message_type not in _TRAIN]
        if together:
            replies |= _serve_together(train_many, together)
    for message, context in pairs:
        replies[message.metadata.message_id] = _serve_one(app, message, context)
    return [replies[message.metadata.message_id] for message in messages]


def error_reply(message: Message, code: int, reason: str) -> Message:
    """The reply of a client that could not do what it was asked."""
    return Message(Error(code, reason[:_LONGEST_REASON]), reply_to=message)


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _serve_one(app: App, message: Message, context: Context) -> Message:
    try:
        reply = app(message, context)
    except (Exception, SystemExit) as error:
        return _raised(message, error)
    return _checked(message, reply)


def _serve_together(
    train_many: Callable[[list[Message], list[Context]], object],
    pairs: Sequence[tuple[Message, Context]],
) -> dict[str, Message]:
    messages = [message for message, _ in pairs]
    try:
        result = train_many(messages, [context for _, context in pairs])
        # A generator runs here, so that what it raises is caught here.
        replies = list(cast(Sequence[object], result))
    except (Exception, SystemExit) as error:
        return {m.metadata.message_id: _raised(m, error) for m in messages}
    by_id = {r.metadata.reply_to_message_id: r for r in replies if isinstance(r, Message)}
    return {m.metadata.message_id: _checked(m, by_id.get(m.metadata.message_id)) for m in messages}


def _raised(message: Message, error: BaseException) -> Message:
    logger.debug("node %d raised", message.metadata.dst_node_id, exc_info=error)
    return error_reply(message, APP_RAISED, describe(error))


def _checked(message: Message, reply: object) -> Message:
    if not isinstance(reply, Message):
        reason = f"the client app returned {type(reply).__name__} instead of a reply"
        return error_reply(message, APP_RAISED, reason)
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        reason = "the client app's reply belongs to another message; make it with reply_to=message"
        return error_reply(message, APP_RAISED, reason)
    return reply


def _fingerprint(state: RecordDict) -> dict[str, object]:
    """The contents of a state, comparable, and sharing the bytes of its arrays.

    Equal fingerprints mean an unchanged state. Unchanged arrays are the same bytes objects, so
    that comparing costs nothing per byte.
    """
    return {name: (type(record), _values(record)) for name, record in state.items()}


def _values(record: ArrayRecord | ConfigRecord | MetricRecord) -> dict[str, object]:
    if isinstance(record, ArrayRecord):
        return {key: _array_values(array) for key, array in record.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


def _array_values(array: Array) -> tuple[object, ...]:
    return array.dtype, tuple(array.shape), array.stype, array.data
