"""Servers that lie, on loopback, and a real ``join`` that meets them: all that it sends is kept."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from flwr.app import RecordDict

from fedft.clients.join import join
from fedft.clients.resident import prepared, workbench
from fedft.clients.work import Timing
from fedft.clients.worker import Site
from fedft.core.errors import FedftError
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.framing import chunks, describe
from fedft.core.link.secrets import Kit

BRISK = Timing(heartbeat=0.5, silence=20.0, first_delay=0.05, longest_delay=0.2, give_up=10.0)


class Gone(Exception):
    """The client has hung up."""


@dataclass(frozen=True)
class Asked:
    """One piece of work as a liar asks for it; ``run``, ``site`` and ``number`` stand on the ticket."""

    plan: str
    content: RecordDict
    kind: str = "train"
    run: str = "run"
    site: str = "ann"
    number: int = 1

    def messages(self, base: str) -> Iterator[pb.FromServer]:
        ticket = pb.Ticket(
            run=self.run, round=self.number, site=self.site, kind=self.kind, base=base
        )
        work = pb.Work(ticket=ticket, plan=self.plan, content=describe(self.content))
        yield pb.FromServer(work=work)
        for data in chunks(self.content):
            yield pb.FromServer(chunk=pb.Chunk(data=data))


@dataclass
class Evil(link_pb2_grpc.FederationServicer):
    """A server without scruples.

    Args:
        tasks: what it says on each connection; on further ones the last.
        hashes: that it wants.
        work: what it asks for, one after the other.
    """

    tasks: Sequence[pb.Task]
    work: Sequence[Asked] = ()
    heard: list[pb.FromSite] = field(default_factory=list[pb.FromSite])
    """All that came, heartbeats too."""
    results: list[pb.Result] = field(default_factory=list[pb.Result])
    connections: int = 0

    def __post_init__(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        link_pb2_grpc.add_FederationServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def close(self) -> None:
        self._server.stop(grace=None).wait(5)

    def Session(self, request_iterator: Any, context: Any) -> Iterator[pb.FromServer]:
        with contextlib.suppress(Gone, grpc.RpcError):
            yield from self._talk(request_iterator)

    def _talk(self, requests: Any) -> Iterator[pb.FromServer]:
        self._hear(requests, "hello")
        task = self.tasks[min(self.connections, len(self.tasks) - 1)]
        self.connections += 1
        yield pb.FromServer(task=task)
        if self._hear(requests, "offer", "goodbye").WhichOneof("body") == "goodbye":
            return
        yield pb.FromServer(welcome=pb.Welcome())
        if self.connections < len(self.tasks):
            return  # the line breaks, and the next task is another one
        for number, asked in enumerate(self.work):
            yield from asked.messages(f"base-{number}")
            result = self._hear(requests, "result").result
            self.results.append(result)
            if result.WhichOneof("outcome") == "content":
                yield pb.FromServer(ack=pb.Ack(ticket=result.ticket, verdict=pb.SEND))
                left = sum(a.size for r in result.content.records for a in r.arrays)
                while left:
                    left -= len(self._hear(requests, "chunk").chunk.data)
            yield pb.FromServer(ack=pb.Ack(ticket=result.ticket, verdict=pb.ACCEPTED))
        yield pb.FromServer(drain=pb.Drain(finished=True, reason="over"))
        self._hear(requests, "goodbye")

    def _hear(self, requests: Any, *kinds: str) -> pb.FromSite:
        while True:
            message = next(requests, None)
            if message is None:
                raise Gone
            self.heard.append(message)
            if message.WhichOneof("body") in kinds:
                return message

    # what it learned

    @property
    def offers(self) -> list[pb.Offer]:
        return [m.offer for m in self.heard if m.WhichOneof("body") == "offer"]

    @property
    def goodbyes(self) -> list[str]:
        return [m.goodbye.reason for m in self.heard if m.WhichOneof("body") == "goodbye"]

    @property
    def refusals(self) -> list[str]:
        return [r.failure.reason for r in self.results if r.WhichOneof("outcome") == "failure"]

    def learned(self, text: str) -> bool:
        """Whether a text is in anything that came."""
        return any(text.encode() in message.SerializeToString() for message in self.heard)


def meet(
    evil: Evil, site: Site, folder: Path, *, check: bool = False
) -> tuple[list[str], FedftError | None]:
    """A client joins.

    Returns:
        What it said on its own screen, and the error that it ended with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cached in (prepared, workbench):
        cached.cache_clear()  # a process joins once, and the file may be another one by now
    kit = Kit("ann", f"127.0.0.1:{evil.port}", "", "", "", "2099-01-01T00:00:00+00:00")
    kit.write(folder / "ann.kit")
    said: list[str] = []
    ended: list[FedftError | None] = []

    def client() -> None:
        try:
            kit, own = folder / "ann.kit", folder / "site"
            last = join(kit, site, folder=own, tell=said.append, timing=BRISK, check=check)
            said.append(last)
            ended.append(None)
        except FedftError as error:
            ended.append(error)

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    thread.join(60)
    evil.close()
    assert not thread.is_alive(), said
    return said, ended[0]
