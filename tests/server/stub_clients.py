"""Clients over real gRPC that do not train: the server's side of a whole run, in a second or two.

They hold to their plans as a client does: they decode them, and answer with tensors of the shapes
that were asked for. What they answer is what they were sent and a little noise.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedft.clients.policy import plan_of
from fedft.clients.session import Session
from fedft.clients.work import Connection, Failure, Offer
from fedft.clients.work import Timing as ClientTiming
from fedft.core import models, seeds, trial
from fedft.core.errors import FedftError
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Expected, Ticket
from fedft.core.link.shapes import of_records, of_work
from fedft.core.record.rundir import RunDir
from fedft.core.spec import TaskSpec
from fedft.core.wire import codec
from fedft.server import identity
from fedft.server.config import RunConfig
from fedft.server.grids.stream import Timing
from fedft.server.pruning import site_footprint
from fedft.server.serve import Hosting, serve
from fedft.trackers import Tracker

BRISK = Timing(heartbeat=0.5, silence=20.0, absence=10.0, watch=0.05)
QUICK = ClientTiming(heartbeat=0.5, silence=20.0, first_delay=0.05, longest_delay=0.2, give_up=30.0)


@dataclass
class Stub:
    """One client. ``answer`` may say something else than a good client would; None says that."""

    examples: int = 20
    rank: int | None = None
    memory_mib: float | None = None
    answer: Callable[[Ticket, RecordDict], RecordDict | Failure | None] = lambda ticket, good: None
    done: list[Ticket] = field(default_factory=list[Ticket])
    verdicts: list[tuple[int, bool]] = field(default_factory=list[tuple[int, bool]])

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        self.task = TaskSpec.model_validate_json(task)
        self.shapes = models.schema(self.task.model, self.task.lora, len(self.task.classes))
        return Offer(self.examples, self.rank, self.memory_mib, hashes)

    def expected(self, plan: str, header: pb.Content) -> Expected:
        fields = json.loads(plan)
        records = of_records(self.shapes, fields, "receives")
        return of_work(self.shapes, int(fields["rank"]), header, records)

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        self.done.append(ticket)
        plan_of(ticket.kind, plan)  # as strictly as a client reads it
        content["config"] = ConfigRecord({"plan": plan, "task": ""})
        good = self._trained(content) if ticket.kind == "train" else self._compared(content)
        return self.answer(ticket, good) or good

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        self.verdicts.append((ticket.round, counted))

    def _trained(self, content: RecordDict) -> RecordDict:
        fields = codec.message_fields(content)
        initial = models.initial_adapter(
            self.shapes, self.task.lora, fields["rank"], self.task.seed
        )
        plan = codec.train_plan(content, initial, self.task.seed)
        generator = seeds.torch_generator(0, "stub", plan.round, plan.site)
        sent = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in plan.sent().items()
        }
        records = {
            record: {name: torch.ones(shape) for name, shape in shapes.items()}
            for record, shapes in plan.schema("sends").items()
        }
        return codec.reply_content(sent, self.examples, {"loss": 1.0}, records=records)

    def _compared(self, content: RecordDict) -> RecordDict:
        L = self.shapes.blocks * (
            2 if codec.message_fields(content)["granularity"] != "block" else 1
        )
        tensors = {
            "similarity": torch.full((L * (L - 1) // 2,), 0.5),
            "importance": torch.linspace(0.1, 0.9, L),
        }
        return codec.reply_content(tensors, self.examples, {})


class Notes(Tracker):
    """A tracker that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[Any] = []

    def round(self, line: Any, replies: Any) -> None:
        self.records.append(line)

    def note(self, text: str) -> None:
        self.lines.append(text)


@contextlib.contextmanager
def attending(
    run_dir: Path,
    clients: Mapping[str, Any],
    said: dict[str, list[str]] | None = None,
    timing: ClientTiming = QUICK,
) -> Iterator[dict[str, Session]]:
    """Clients in a thread of their own, from when the server listens until the block ends."""
    sessions: dict[str, Session] = {}
    over = threading.Event()

    async def attend() -> None:
        address = run_dir / "identity" / "address.json"
        while not over.is_set() and not address.exists():
            await asyncio.sleep(0.01)
        if over.is_set():
            return
        target = identity.load_address(run_dir / "identity")
        registry = identity.Registry(run_dir / "identity")
        for name, worker in clients.items():
            if name not in registry.clients():
                registry.invite(name, None, target)  # type: ignore[arg-type]
            tell: Any = (said if said is not None else {}).setdefault(name, []).append
            connection = Connection(target.target, name, None)
            sessions[name] = Session(connection, worker, tell, over.is_set, timing)
        await asyncio.gather(*map(one, sessions.values()))

    async def one(session: Session) -> None:
        with contextlib.suppress(FedftError):
            await session.attend()

    thread = threading.Thread(target=lambda: asyncio.run(attend()), daemon=True)
    thread.start()
    try:
        yield sessions
    finally:
        over.set()
        thread.join(20)


def run_with(
    config: RunConfig,
    folder: Path,
    clients: Mapping[str, Any],
    *,
    said: dict[str, list[str]] | None = None,
    trackers: Any = (),
    **hosting: Any,
) -> RunDir:
    """A whole run of ``fedft serve`` with stub clients, over loopback and without TLS."""
    options = {"timing": BRISK, "linger_s": 5.0, "first": len(clients), "patience_s": 30.0}
    hosted = Hosting(**{**options, **hosting})
    with attending(folder, clients, said):
        return serve(
            config,
            folder,
            identity.Address(insecure=True),
            hosting=hosted,
            trackers=trackers,
        )


def least_mib(config: RunConfig, rank: int) -> float:
    """Memory that holds one block where blocks are left out, else all of them."""
    shapes = models.schema(config.model, config.lora, 3)
    geometry = models.geometry(config.model, models.resolve(config.model))
    blocks = 1 if config.pruning.selection != "none" else None
    return 1.001 * site_footprint(config, shapes, geometry, rank, limited=True).mib(blocks)


def answering(message: Message, *_: Any) -> Message:
    """A central evaluation that costs nothing: the same sums for every slice of the test set.

    What is asked before round 1, whether the task can be trained at all, is answered by yes.
    """
    if message.metadata.message_type == MessageType.QUERY:
        return Message(trial.answer(trial.Verdict("loop")), reply_to=message)
    sums = MetricRecord({"num-examples": 4, "loss-sum": 2.0, "correct": 3})
    return Message(RecordDict({"metrics": sums}), reply_to=message)
