"""How long each text may be that the other end sends: one table, for every field of the protocol.

A message is at most a megabyte, but what is read from it may be kept for as long as a stream, or a
run, lasts. So every message is held to this table when it comes, before anything is read from it,
and what no field of this version holds is dropped. Headers of tensors are not in it: they are
compared, name by name, with what can come (:func:`fedft.core.link.framing.check`).
"""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fedft.core.link import link_pb2 as pb

Sent = TypeVar("Sent", bound=Message)

NAME: Final = 200
"""Of a run, a site or a version; characters."""
DIGEST: Final = 128
REASON: Final = 4000
"""Of a sentence to a person."""
CSR: Final = 16_384
"""Of a certificate request or a certificate; bytes."""
WHOLE: Final = 1024 * 1024
"""As long as a message can be: what is parsed and compared at once, and not kept as it came."""

ENTRIES: Final = 64
"""Most entries of a map, and of a list that is not one of tensors."""

LIMITS: Final[dict[str, int]] = {
    "EnrolRequest.csr": CSR,
    "EnrolReply.certificate": CSR,
    "EnrolReply.refusal": REASON,
    "Hello.versions.key": NAME,
    "Hello.versions.value": NAME,
    "Hello.instance": NAME,
    "Hello.site": NAME,
    "Task.run": NAME,
    "Task.spec": WHOLE,
    "Hashes.base_model": DIGEST,
    "Hashes.tokenizer": DIGEST,
    "Hashes.data_schema": DIGEST,
    "Refusal.reason": REASON,
    "Goodbye.reason": REASON,
    "Ticket.run": NAME,
    "Ticket.site": NAME,
    "Ticket.kind": NAME,
    "Ticket.base": DIGEST,
    "Work.plan": WHOLE,
    "Failure.reason": REASON,
    "Ack.reason": REASON,
    "Drain.reason": REASON,
    "Chunk.data": WHOLE,
}
"""``Message.field`` → characters, or bytes of a field of bytes."""

LISTS: Final[dict[str, int]] = {"Hello.versions": ENTRIES, "Cancel.tickets": 20_000}
"""``Message.field`` → most entries."""

UNREAD: Final = frozenset({"Content"})
"""Messages that are compared with what can come before any of it is taken."""


class TooLong(ValueError):
    """A field holds more than anything that belongs there; says which and how much."""


def bounded(message: Sent) -> Sent:
    """A message that came, without what this version has no name for.

    Raises:
        TooLong: a text or list in it is longer than its limit.
    """
    message.DiscardUnknownFields()
    _check(message)
    return message


def _check(message: Any) -> None:
    about: Descriptor = message.DESCRIPTOR
    if about.name in UNREAD:
        return
    field: FieldDescriptor
    for field, value in message.ListFields():
        name = f"{about.name}.{field.name}"
        if _is_list(field):
            _within(name, len(value), LISTS[name], "entries")
        if _is_map(field):
            for key, text in value.items():
                _within(f"{name}.key", len(key), LIMITS[f"{name}.key"])
                _within(f"{name}.value", len(text), LIMITS[f"{name}.value"])
        elif field.message_type is not None:
            for one in value if _is_list(field) else [value]:
                _check(one)
        elif name in LIMITS:
            _within(name, len(value), LIMITS[name])


def _within(name: str, length: int, limit: int, unit: str = "characters") -> None:
    if length > limit:
        raise TooLong(f"{name} has {length:,} {unit}; at most {limit:,} can come")


def _is_map(field: FieldDescriptor) -> bool:
    entry = field.message_type
    return entry is not None and entry.GetOptions().map_entry


def _is_list(field: FieldDescriptor) -> bool:
    return field.is_repeated


def texts() -> Iterator[str]:
    """Every field of the protocol that holds text or bytes, as :data:`LIMITS` calls it."""
    for about in pb.DESCRIPTOR.message_types_by_name.values():
        if about.name not in {*UNREAD, "Arrays", "ArrayHeader", "Metric"}:
            yield from _texts(about, about.name)


def _texts(about: Descriptor, prefix: str) -> Iterator[str]:
    for field in about.fields:
        if _is_map(field) and field.message_type is not None:
            yield from _texts(field.message_type, f"{prefix}.{field.name}")
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            yield f"{prefix}.{field.name}"
