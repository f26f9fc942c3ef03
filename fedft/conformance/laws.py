"""What a law is, and how a member is held to a list of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")


class Broken(AssertionError):
    """A law does not hold; the message says of what, and by how much."""


@dataclass(frozen=True)
class Law(Generic[T]):
    """One law of a kind of member.

    Attributes:
        says: what must hold, as a sentence without a full stop.
        check: takes the member; raises where it does not hold.
        of: which members it is about; all by default.
    """

    says: str
    check: Callable[[T], None]
    of: Callable[[T], bool] = lambda _: True


Outcome = Literal["held", "broken", "not asked"]


@dataclass(frozen=True)
class Finding:
    """What came of holding a member to a law.

    Attributes:
        kind: such as ``strategies``.
        name: of the member.
        law: what it says.
        outcome: ``not asked`` where the law is not about such a member.
        why: what was seen, where it is broken; else empty.
    """

    kind: str
    name: str
    law: str
    outcome: Outcome
    why: str = ""


def held(kind: str, name: str, member: T, laws: Sequence[Law[T]]) -> Iterator[Finding]:
    """A finding for each law. Whatever a member raises breaks the law that it raised it under.

    Args:
        kind: of the member.
        name: it is called by.
        member: under test.
        laws: of its kind.
    """
    for law in laws:
        try:
            if not law.of(member):
                yield Finding(kind, name, law.says, "not asked")
                continue
            law.check(member)
        except Broken as broken:
            yield Finding(kind, name, law.says, "broken", str(broken))
        except Exception as error:
            yield Finding(kind, name, law.says, "broken", first_line(error))
        else:
            yield Finding(kind, name, law.says, "held")


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`Broken` unless something holds.

    Args:
        holds: it does.
        otherwise: what was seen where it does not.
    """
    if not holds:
        raise Broken(otherwise)


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
