"""How many connections a server takes, so that strangers never use up what its run needs.

Anybody who reaches the port can open connections and say nothing; gRPC hangs up on them after
fifteen seconds, and they come again. Two bounds hold meanwhile. gRPC takes no more connections than
leave descriptors for the run directory. And of the connections that no client has shown itself on,
an address can have some and all addresses together a part: beyond that the oldest is closed, so
that whoever does show itself finds a place, also where it shares the address of those who do not.
"""

import contextlib
import ipaddress
import os
import resource
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

MOST = 2048
"""Connections of a server, however many descriptors it may have: each costs memory."""

AN_ADDRESS = 256
"""Connections of one address on which nobody has shown himself."""

RESERVED = 256
"""Descriptors kept for the run directory and everything else; a quarter where there are few."""

WANTED = 8192
"""Descriptors that a server asks the system for."""

Peer = tuple[str, int]
"""Address and port of the other end."""


def raise_limit() -> int:
    """Ask for as many descriptors as a server can use; how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft not in (resource.RLIM_INFINITY,) and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return WANTED if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True)
class Room:
    """Room for connections.

    Attributes:
        most: in all.
        strangers: on which no client has shown itself.
        an_address: of those, from one address.
    """

    most: int
    strangers: int
    an_address: int

    @classmethod
    def within(cls, limit: int, used: int) -> "Room":
        """What fits below a limit of descriptors, ``used`` of which are taken."""
        free = limit - used - min(RESERVED, limit // 4)
        most = max(8, min(MOST, free))
        return cls(most, most * 3 // 4, min(AN_ADDRESS, most // 2))

    def surplus(self, strangers: Collection[Peer], clients: int) -> list[Peer]:
        """Which connections are to be closed.

        Args:
            strangers: oldest first.
            clients: how many connections there are besides.
        """
        addresses = Counter(address for address, _ in strangers)
        all_ = len(strangers)
        most = max(0, min(self.strangers, self.most - clients))
        found: list[Peer] = []
        for address, port in strangers:
            crowded = addresses[address] > self.an_address
            if crowded or (all_ > most and addresses[address] >= max(addresses.values())):
                found.append((address, port))
                addresses[address] -= 1
                all_ -= 1
        return found


@dataclass
class Door:
    """Looks at who is connected, and closes what is too much.

    Args:
        port: that is listened on.
        room: how much is too much.
    """

    port: int
    room: Room
    _seen: dict[Peer, None] = field(default_factory=dict[Peer, None], init=False)

    def look(self, known: Collection[str]) -> int:
        """Close what is too much.

        Args:
            known: peers, as gRPC writes them, of the connections that clients showed themselves on.

        Returns:
            How many connections were closed.
        """
        if len(descriptors()) <= self.room.an_address:
            return 0
        found = self._connections()
        known_peers = {peer_of(peer) for peer in known}
        strangers = [peer for peer in found if peer not in known_peers]
        there = set(strangers)
        self._seen = {p: None for p in (*self._seen, *strangers) if p in there}
        surplus = self.room.surplus(self._seen, len(found) - len(strangers))
        for peer in surplus:
            with contextlib.suppress(OSError), _duplicate(found[peer]) as one:
                if self._peer(one) == peer:  # the number was not given to another meanwhile
                    one.shutdown(socket.SHUT_RDWR)  # gRPC sees its end, and closes it
        return len(surplus)

    def _connections(self) -> Mapping[Peer, int]:
        """The connections to our port, by the other end: their descriptors."""
        found: dict[Peer, int] = {}
        for descriptor in descriptors():
            with contextlib.suppress(OSError), _duplicate(descriptor) as one:
                if (peer := self._peer(one)) is not None:
                    found[peer] = descriptor
        return found

    def _peer(self, one: socket.socket) -> Peer | None:
        """The other end of a connection to our port; None for what is none."""
        try:
            ours = one.type == socket.SOCK_STREAM and one.getsockname()[1:2] == (self.port,)
            return _plain(*one.getpeername()[:2]) if ours else None
        except (OSError, ValueError, IndexError, TypeError):
            return None  # it listens, or is of another kind


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    """Another handle on a socket, one at a time: it is that one which is looked at and closed.

    Raises:
        OSError: it is no socket, or is gone.
    """
    copy = os.dup(descriptor)
    try:
        one = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with one:
        yield one


def descriptors() -> list[int]:
    """All open descriptors of this process; empty where the system does not tell."""
    for folder in (Path("/proc/self/fd"), Path("/dev/fd")):
        with contextlib.suppress(OSError, ValueError):
            return [int(entry.name) for entry in folder.iterdir()]
    return []


def peer_of(text: str) -> Peer | None:
    """The other end as gRPC writes it: ``ipv4:10.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
    _, _, rest = unquote(text).partition(":")
    host, _, port = rest.rpartition(":")
    try:
        return _plain(host.strip("[]"), int(port))
    except ValueError:
        return None


def _plain(host: str, port: int) -> Peer:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address), port
