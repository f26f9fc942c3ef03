"""What a session asks of a worker, and what it brings to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from flwr.app import RecordDict

from fedft.clients.proxies import channel_options
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import (
    MAX_MESSAGE_BYTES,
    Expected,
    Ticket,
)
from fedft.core.link.secrets import Credentials

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


@dataclass(frozen=True)
class Offer:
    """What a site brings.

    Attributes:
        examples: it can train on.
        rank: it can train; None takes the run's.
        memory_mib: it grants to training; None is unlimited.
        hashes: of base model, tokenizer and data schema, as found here.
    """

    examples: int
    rank: int | None
    memory_mib: float | None
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Failure:
    """Work that could not be done, and why.

    Attributes:
        code: of the reason.
        reason: one word of :mod:`fedft.core.link.codes`, which the server gets.
        details: for this client's own screen.
    """

    code: int
    reason: str
    details: str = ""


class Worker(Protocol):
    """What does the work. Called from one thread, one call at a time, but for ``expected``."""

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        """Get ready for a run; quick where the same run is loaded already."""
        ...

    def expected(self, plan: str, header: pb.Content) -> Expected:
        """The arrays that work with this plan may have."""
        ...

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        """Do it."""
        ...

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """The server took the result, or did not."""
        ...


@dataclass(frozen=True)
class Timing:
    """Patience of a client, in seconds.

    Attributes:
        heartbeat: between heartbeats.
        silence: without a word after which a connection is given up.
        first_delay, longest_delay: between attempts to connect; drawn between half and all of a
            delay that doubles each time.
        give_up: without a connection after which the client ends; None tries for ever.
    """

    heartbeat: float = 10.0
    silence: float = 35.0
    first_delay: float = 0.5
    longest_delay: float = 30.0
    give_up: float | None = None


@dataclass(frozen=True)
class Connection:
    """How a site reaches its server.

    Attributes:
        target: ``host:port``.
        name: of the site.
        credentials: None for a server without TLS, on loopback.
    """

    target: str
    name: str
    credentials: Credentials | None

    def channel(self) -> Any:
        """A new channel; it connects when it is first used."""
        options = [*_OPTIONS, *channel_options(self.target)]
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=options)
        own = self.credentials
        tls = grpc.ssl_channel_credentials(own.ca, own.key, own.certificate)
        return grpc.aio.secure_channel(self.target, tls, options=options)
