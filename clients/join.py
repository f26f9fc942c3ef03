"""A workstation's part: ``fedft join KIT --data FILE``.

The site has a folder of its own, which holds its key, its certificate and the parts of its adapter
that never leave it. What the server sends are numbers and a description of the task; the code that
runs is what is installed here, and the data are the file that was named here.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from pydantic import ValidationError

from clients.app import app
from clients.enrolment import Renewal, enrolled, pinned
from clients.ledger import Ledger, Release, release_of, usable
from clients.ledger import default_folder as default_ledgers
from clients.request import folder_of_key
from clients.session import UNUSABLE, Connection, Failure, Offer, Session, Timing
from clients.workbench import Workbench, workbench
from fedft.core import codec, models, system
from fedft.core.data import of_site
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    MismatchError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.files import Files, disk, place
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Expected, Ticket, data_schema
from fedft.core.link.secrets import (
    Kit,
    is_loopback,
    key_digest,
    load_certificate,
)
from fedft.core.link.shapes import of_work
from fedft.core.rowkeys import row_keys
from fedft.core.rundir import child
from fedft.core.spec import Precision, TaskSpec

_MOST_RANK = 1 << 20
BITS: Mapping[str, int] = {"fp32": 32, "bf16": 16, "tf32": 19}
"""Bits of a number, by which a reply says the precision that its client chose."""
_VERSIONS = 3
"""Rounds of which the kept parts stay on disk: the server may go back to an older checkpoint."""


@dataclass(frozen=True)
class Site:
    """What a workstation brings, in its owner's words.

    Attributes:
        data: file or folder with its examples; they stay here.
        rank: LoRA rank to train; None takes the run's.
        memory_mib: memory to grant, in MiB; None does not limit it.
        device: of torch.
        threads: of torch; None leaves its default.
        model: where the base model is here, if not where the run says; its hash must be the run's.
        skip_bad: leave malformed rows out, instead of stopping at the first.
        trust_remote_code: let the base model bring code of its own.
        ledger: folder of this user's privacy ledgers; None takes one under the user's state folder.
        precision: arithmetic of the frozen base here; None takes the run's.
    """

    data: Path
    rank: int | None = None
    memory_mib: float | None = None
    device: str = "cpu"
    threads: int | None = None
    model: str | None = None
    skip_bad: bool = False
    trust_remote_code: bool = False
    ledger: Path | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and not 1 <= self.rank <= _MOST_RANK:
            raise ConfigError(
                f"--rank {self.rank} is no rank: it counts from 1, and no model has {_MOST_RANK}",
                fix="Leave it away to train the run's rank.",
            )
        if self.memory_mib is not None and not 0 < self.memory_mib < math.inf:
            raise ConfigError(
                f"--memory {self.memory_mib:g} is no amount of memory: it is in MiB, above 0",
                fix="Leave it away to grant any amount.",
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(
                f"--threads {self.threads} is no number of threads: it counts from 1",
                fix="Leave it away to take as many as this machine has.",
            )


def checked_precision(text: str | None) -> Precision | None:
    """The precision that a command line asks for.

    Raises:
        ConfigError: there is none of that name.
    """
    if text is not None and text not in BITS:
        raise ConfigError(
            f"--precision {text[:40]} is none of {', '.join(BITS)}",
            fix="Leave it away to train in the run's.",
        )
    return cast(Precision | None, text)


def join(
    kit_path: Path,
    site: Site,
    *,
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    timing: Timing | None = None,
) -> str:
    """Take part in a run until it is over.

    Args:
        kit_path: as the server's owner sent it.
        site: what this machine brings.
        folder: of the site; None takes one under the user's data folder.
        tell: takes lines for whoever watches.
        stop: says whether to leave.
        timing: patience.

    Returns:
        The server's last word.

    Raises:
        SecurityRefusal: kit or key are not private, expired, used elsewhere or not of this server.
        MismatchError: version, model or data are not the run's.
    """
    if not site.data.exists():
        raise ConfigError(f"there are no data at {site.data}", fix="Check --data.")
    kit = Kit.read(kit_path)
    if kit.insecure and not is_loopback(kit.server.rpartition(":")[0]):
        raise SecurityRefusal(
            f"{kit_path} is for a server without TLS on another machine, {kit.server}",
            fix="Ask for a kit of a server with TLS.",
        )
    usable(site.ledger or default_ledgers())
    folder = folder or default_folder(kit)
    with _occupied(folder):
        credentials = None if kit.insecure else enrolled(kit, folder, tell)
        if (roster := pinned(kit, credentials)) is not None:
            tell(f"the kit pins the keys of {len(roster.keys)} clients")
        worker = Resident(kit.name, site, KeptParts(folder / "kept"), tell)
        session = Session(
            Connection(kit.server, kit.name, credentials),
            worker,
            tell=tell,
            stop=stop,
            timing=timing or Timing(),
            renewal=Renewal(kit, folder, tell),
        )
        return session.run()


def default_folder(kit: Kit) -> Path:
    """Where a site lives: one folder a kit, or a key that was drawn before."""
    if kit.certificate and not kit.key:
        certificate = load_certificate(kit.certificate.encode(), "the kit")
        return folder_of_key(kit.name, key_digest(certificate.public_key()))
    mark = hashlib.sha256((kit.certificate or kit.server).encode()).hexdigest()[:8]
    return child(system.data_home() / "fedft" / "sites", f"{kit.name}-{mark}")


@contextmanager
def _occupied(folder: Path) -> Iterator[None]:
    """Hold a site's folder for this process."""
    with disk(f"create {folder}"):
        system.private_folder(folder)
        lock = system.open_file(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        system.lock(lock, wait=False)
    except BlockingIOError:
        raise EnvironmentFailure(
            f"another `fedft join` is running for this site ({folder})", fix="Stop it first."
        ) from None
    else:
        yield
    finally:
        os.close(lock)


# ── the parts that stay ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class KeptParts:
    """A site's own parts on disk: one file a round, so that a round can be done again.

    A server that dies in round n asks for round n again, and the site must then start from what
    it had before: the newest version of an *earlier* round.

    Args:
        folder: made when it is needed.
    """

    folder: Path

    def before(self, ticket: Ticket) -> RecordDict:
        """The state to work on: of earlier rounds for training, up to the round's for judging."""
        last = ticket.round if ticket.kind == "evaluate" else ticket.round - 1
        rounds = [r for r in self._rounds(ticket.run) if r <= last]
        if not rounds:
            return RecordDict()
        from safetensors.torch import load_file

        tensors = load_file(self._file(ticket.run, rounds[-1]))
        return RecordDict({codec.KEPT: codec.arrays_from(tensors)})

    def store(self, ticket: Ticket, state: RecordDict) -> None:
        """Keep what a round of training left; on disk before its result is sent."""
        record = state.array_records.get(codec.KEPT)
        if ticket.kind != "train" or record is None:
            return
        from safetensors.torch import save

        path = self._file(ticket.run, ticket.round)
        with disk(f"create {path.parent}"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place(Files(), path, save(codec.tensors_from(record)))
        with disk(f"write {path}"):
            Files().sync_folder(path.parent)

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """Forget what a round left that did not count, and what is too old to be asked for."""
        if ticket.kind != "train":
            return
        if not counted:
            self._file(ticket.run, ticket.round).unlink(missing_ok=True)
        for round_ in self._rounds(ticket.run)[:-_VERSIONS]:
            self._file(ticket.run, round_).unlink(missing_ok=True)

    def _rounds(self, run: str) -> list[int]:
        return sorted(int(f.stem[6:]) for f in child(self.folder, run).glob("round-*.safetensors"))

    def _file(self, run: str, round_: int) -> Path:
        return child(self.folder, run) / f"round-{round_:08d}.safetensors"


# ── the work ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Resident:
    """The loaded model and data of a site, and the client app that works on them.

    Args:
        name: of the site.
        site: what it brings.
        kept: its own parts.
        tell: takes lines for whoever watches.
    """

    name: str
    site: Site
    kept: KeptParts
    tell: Callable[[str], None] = lambda text: None
    _task: str = field(default="", init=False)
    _ledger: Ledger | None = field(default=None, init=False)
    _bench: Workbench | None = field(default=None, init=False)

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        """See :class:`clients.session.Worker`.

        Raises:
            SecurityRefusal: the model would run code of its own.
            MismatchError: model or data are not the run's.
        """
        if self.site.threads is not None:
            torch.set_num_threads(self.site.threads)
        own = self._own_task(task)
        found = models.fingerprint(models.resolve(own.model))
        _compare({name: found[name] for name in ("base_model", "tokenizer")}, hashes)
        self._task = own.model_dump_json()
        self._bench = bench = workbench(self._task)
        self._open_ledger(own)
        rows, _ = bench.rows(0)
        own_hashes = {**found, "data_schema": data_schema(own, bench.data.classes)}
        return Offer(len(rows), self.site.rank, self.site.memory_mib, own_hashes)

    def expected(self, plan: str, header: pb.Content) -> Expected:
        """See :class:`clients.session.Worker`."""
        assert self._bench is not None
        try:
            rank = int(json.loads(plan)["rank"])
        except (ValueError, TypeError, KeyError) as error:
            raise UpdateRejected("schema", "a plan is JSON and says its rank") from error
        return of_work(self._bench.engine.base.shapes, rank, header)

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        """See :class:`clients.session.Worker`."""
        content["config"] = ConfigRecord({"plan": plan, "task": self._task})
        message = _message(ticket, content)
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config={"partition-id": 0, "num-partitions": 1},
            state=self.kept.before(ticket),
            run_config={},
        )
        reply = app(message, context)
        if reply.has_error():
            return Failure(reply.error.code, reply.error.reason or "")
        try:
            self._spend(self._release(ticket, plan))
        except EnvironmentFailure as error:
            self.tell(
                f"{error}\n  The result stays here: what it says about the data is not entered."
            )
            return Failure(UNUSABLE, "the client's privacy ledger cannot be written")
        self.kept.store(ticket, context.state)
        if self.site.precision is not None and ticket.kind == "train":
            reply.content.metric_records["metrics"]["precision_bits"] = BITS[self.site.precision]
        return reply.content

    def _open_ledger(self, task: TaskSpec) -> None:
        folder = self.site.ledger or default_ledgers()
        self._ledger = ledger = Ledger(folder, row_keys(task.data, task.model.task))
        self.tell(f"privacy ledger of these data: {ledger.path}")
        if (before := ledger.account()).results:
            self.tell(f"privacy spent before: {before.text()}")

    def _release(self, ticket: Ticket, plan: str) -> Release | None:
        """What an answer would say about the data; None where no example is looked at."""
        assert self._bench is not None
        fields = json.loads(plan)
        rows, held = self._bench.rows(0)
        if ticket.kind == "evaluate" and fields["probe"] is None:
            judged = self._bench.data.test if fields["split"] == "test" else held
            if not len(judged):
                return None
        return release_of(ticket.kind, fields, len(rows), run=ticket.run, round_=ticket.round)

    def _spend(self, release: Release | None) -> None:
        """Enter a result in the ledger, before it leaves."""
        if release is None:
            return
        assert self._ledger is not None
        self._ledger.spend(release)
        account = self._ledger.account()
        if release.mechanism != "none" or account.unprotected == 1:
            self.tell(f"privacy spent: {account.text()}")

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """See :class:`clients.session.Worker`."""
        self.kept.judged(ticket, counted=counted)

    def _own_task(self, task: str) -> TaskSpec:
        """The server's task, with everything replaced that is this machine's own business."""
        try:
            given = TaskSpec.model_validate_json(task)
        except ValidationError as error:
            raise MismatchError(
                "the server's task cannot be read by this version of fedft",
                fix="Install the same version on both sides.",
            ) from error
        if given.model.trust_remote_code and not self.site.trust_remote_code:
            raise SecurityRefusal(
                f"the run's model {given.model.source!r} wants to run code of its own here",
                fix="Read that code; to allow it, join with --trust-remote-code.",
            )
        data = of_site(given.data, str(self.site.data.absolute()))
        skip = self.site.skip_bad or data.skip_bad
        model = given.model
        if self.site.model is not None:
            model = model.model_copy(update={"source": self.site.model})
        return given.model_copy(
            update={
                "data": data.model_copy(update={"skip_bad": skip}),
                "model": model,
                "site": self.name,
                "device": self.site.device,
                "precision": self.site.precision or given.precision,
                "lean": self.site.memory_mib is not None and given.lora.form == "lora",
                "manifest": None,
                "fingerprint": "",
            }
        )


def _compare(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name, value in found.items():
        if value != wanted.get(name):
            raise MismatchError(
                f"the {name.replace('_', ' ')} here has the hash {value[:12]}, and the run's has "
                f"{wanted.get(name, '')[:12]}",
                fix="Install the model that the run uses, or name its folder with --model.",
            )


def _message(ticket: Ticket, content: RecordDict) -> Message:
    """The Flower message that the app would get in a simulation."""
    about = Metadata(
        run_id=1,
        message_id=ticket.base,
        src_node_id=0,
        dst_node_id=1,
        reply_to_message_id="",
        group_id=str(ticket.round),
        created_at=time.time(),
        ttl=1e9,
        message_type=ticket.kind,
    )
    # Flower leaves this way of making a message out of its types; its own grids use it.
    made: Any = Message(content, metadata=about)  # pyright: ignore[reportCallIssue]
    return made
