"""Real clients that misbehave, and the server as a command: what a test starts as processes.

A client here is :func:`fedft.clients.join.join` with one thing changed in its own process. Everything
else, certificates, streams and heartbeats, is what a workstation does.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedft.clients.join import join
from fedft.clients.session import Session
from fedft.clients.work import Failure, Offer, Timing
from fedft.clients.worker import Resident, Site
from fedft.core.errors import FedftError
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Ticket

Work = Callable[[Resident, Ticket, str, RecordDict], RecordDict | Failure]
HONEST: Work = Resident.work


def raises(self: Resident, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict:
    raise RuntimeError("no disk")


def dies(self: Resident, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a dead process does not go on")


def hangs(self: Resident, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict:
    time.sleep(1e6)
    raise AssertionError("it never answers")


def nan(self: Resident, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
    good = HONEST(self, ticket, plan, content)
    assert isinstance(good, RecordDict)
    arrays = good.array_records["arrays"]
    return RecordDict(
        {
            "arrays": ArrayRecord({k: Array(a.numpy() * np.nan) for k, a in arrays.items()}),
            "metrics": good.metric_records["metrics"],
        }
    )


def nan_once(
    self: Resident, ticket: Ticket, plan: str, content: RecordDict
) -> RecordDict | Failure:
    """A bit that flipped: what is computed anew is sound."""
    if self.kept.folder.with_name("flipped").exists():
        return HONEST(self, ticket, plan, content)
    self.kept.folder.with_name("flipped").touch()
    return nan(self, ticket, plan, content)


def late(self: Resident, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
    """In its first round too late for a deadline of three seconds, and sound."""
    time.sleep(5 if ticket.round == 1 else 0)
    return HONEST(self, ticket, plan, content)


def nobody(self: Resident, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
    """It has no rows to train on."""
    return Offer(0, None, None, hashes)


def misbehave(kind: str) -> None:
    """Change this process's client."""
    works: dict[str, Work] = {f.__name__: f for f in (raises, dies, hangs, nan, nan_once, late)}
    if kind in works:
        Resident.work = works[kind]  # type: ignore[method-assign]
    elif kind == "nobody":
        Resident.load = nobody  # type: ignore[method-assign]
    elif kind == "thrice":
        honest = Session.judged
        Session.judged = lambda self, ack: _again(honest, self, ack)  # type: ignore[method-assign]
    elif kind == "stale":
        _say_results(_of_another_round)
    else:
        assert kind == "good", kind


def _again(honest: Any, session: Session, ack: pb.Ack) -> None:
    """Announce a result that was accepted twice more."""
    honest(session, ack)
    if ack.verdict == pb.ACCEPTED and session._stream is not None:
        for _ in range(2):
            session._stream.announce(Ticket.read(ack.ticket))


def _of_another_round(say: Any, body: Mapping[str, Any]) -> list[Any]:
    result = pb.Result()
    result.CopyFrom(body["result"])
    result.ticket.round += 100
    return [say(result=result)]


def _say_results(how: Callable[[Any, Mapping[str, Any]], list[Any]]) -> None:
    """Announce results in another way."""
    from fedft.core.link.stream import Pipe

    honest = Pipe.say

    async def say(self: Pipe, **body: Any) -> None:
        if "result" not in body:
            await honest(self, **body)
            return
        for one in how(lambda **changed: honest(self, **changed), body):
            await one

    Pipe.say = say  # type: ignore[method-assign]


def client(
    kind: str,
    kit: Path,
    data: Path,
    folder: Path,
    timing: Timing,
    log: Path,
    options: Mapping[str, Any],
) -> None:
    """A client of a kind; it leaves on SIGTERM, and what it says is in ``log``."""
    misbehave(kind)
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())

    def tell(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    try:
        site = Site(data, threads=1, **options)
        tell(join(kit, site, folder=folder, tell=tell, stop=leaving.is_set, timing=timing))
    except FedftError as error:
        tell(str(error))
        os._exit(error.exit_code)  # without waiting for work that hangs
    os._exit(0)


def command(arguments: list[str], log: Path) -> None:
    """``fedft`` with these arguments; what it says on standard error is in ``log``."""
    from fedft.cli import main

    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        sys.argv = ["fedft", *arguments]
        main()
