"""The worker of a real client: what a server asks is checked here before anything is done."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict

from fedft.clients.agreed import Agreement
from fedft.clients.app import CLIENT_ERROR, TRAINER_ERROR, app
from fedft.clients.checking import looked, report
from fedft.clients.given import task_of
from fedft.clients.kept import KeptParts
from fedft.clients.ledger import Ledger, Release, release_of
from fedft.clients.ledger import default_folder as default_ledgers
from fedft.clients.own import Own
from fedft.clients.policy import EvalFields, Policy, TrainFields, plan_of
from fedft.clients.resident import Workbench, prepared, workbench
from fedft.clients.work import Failure, Offer
from fedft.core import models
from fedft.core.data.rowkeys import row_keys
from fedft.core.drawn import within
from fedft.core.errors import (
    ConfigError,
    FedftError,
    MismatchError,
    SecurityRefusal,
    UpdateRejected,
)
from fedft.core.link import link_pb2 as pb
from fedft.core.link.codes import NUMBERS, coded, under, word_of
from fedft.core.link.framing import Expected, Ticket, data_schema
from fedft.core.link.shapes import beside, of_adapter, of_records, of_work
from fedft.core.spec import Precision, TaskSpec
from fedft.core.tasks import task_of as kind_of
from fedft.core.trainers import beyond_training
from fedft.core.wire.schema import ARRAYS, numbers

logger = logging.getLogger(__name__)

_MOST_RANK = 1 << 20


_WORDS: Mapping[int, str] = {CLIENT_ERROR: "data", TRAINER_ERROR: "training"}
"""Code of an error reply → what the server is told."""

BITS: Mapping[str, int] = {"fp32": 32, "bf16": 16, "tf32": 19}
"""Bits of a number, by which a reply says the precision that its client chose."""


AGREED = "task.json"
"""File of a site's folder that says which task it has joined."""


@dataclass(frozen=True)
class Site:
    """What a workstation brings, in its owner's words.

    Attributes:
        data: file or folder with its examples; they stay here.
        rank: LoRA rank to train; None takes the run's.
        memory_mib: memory to grant, in MiB; None does not limit it.
        device: of torch.
        threads: of torch; None leaves its default.
        model: the base model to load, a folder or an id of a hub, whatever the server names; its
            hash must be the run's.
        trust_remote_code: let the base model bring code of its own.
        ledger: folder of this user's privacy ledgers; None takes one under the user's state folder.
        precision: arithmetic of the frozen base here; None takes the run's.
        own: how the file is read.
        policy: what to take part in.
        send_details: let the text of errors leave, which can quote the data.
    """

    data: Path
    rank: int | None = None
    memory_mib: float | None = None
    device: str = "cpu"
    threads: int | None = None
    model: str | None = None
    trust_remote_code: bool = False
    ledger: Path | None = None
    precision: Precision | None = None
    own: Own = field(default_factory=Own)
    policy: Policy = field(default_factory=Policy)
    send_details: bool = False

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


@dataclass
class Resident:
    """The loaded model and data of a site, and the client app that works on them.

    Args:
        name: of the site.
        site: what it brings.
        kept: its own parts.
        tell: takes lines for whoever watches.
        agreed: the task that it has joined.
        check: tell what would be trained, and offer nothing.
    """

    name: str
    site: Site
    kept: KeptParts
    tell: Callable[[str], None] = lambda text: None
    agreed: Agreement = field(default_factory=Agreement)
    check: bool = False
    _run: str = field(default="", init=False)
    _task: str = field(default="", init=False)
    _ledger: Ledger | None = field(default=None, init=False)
    _told_infinite: bool = field(default=False, init=False)
    _bench: Workbench | None = field(default=None, init=False)

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        """See :class:`fedft.clients.work.Worker`.

        What the server asks for is held against the policy first, then the model, then the data:
        nothing of the one is looked at where the other does not pass.

        Raises:
            SecurityRefusal: the policy does not allow it, or the model would run code of its own.
            MismatchError: model or data are not the run's.
        """
        if self.site.threads is not None:
            torch.set_num_threads(self.site.threads)
        try:
            return self._loaded(run, task, hashes)
        except FedftError:
            raise
        except Exception as error:  # whatever a task leads to that no rule has foreseen
            logger.debug("the task could not be loaded", exc_info=True)
            failed = MismatchError(
                f"this task cannot be done here: {type(error).__name__}: {error}",
                fix="Show this line to whoever runs the server, if there is nothing of yours in it.",
            )
            raise coded(failed, word_of(error)) from error

    def _loaded(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        own = self.own_task(run, task_of(task))
        with under("model"):
            found = self.model(own, hashes)
        self._run, self._task = run, own.model_dump_json()
        with under("data"):
            data = prepared(self._task)
            self._open_ledger(own)
        if kind_of(own.model.task).formats and not self.check:
            for note in data.notes:
                self.tell(note)
        if self.check:
            for line in report(run, own, data, self.site.policy):
                self.tell(line)
            raise looked()
        with under("task"):
            self.site.policy.check_size(_adapter_size(own))
            self._bench = bench = workbench(self._task)
        rows, _ = bench.rows(0)
        own_hashes = {**found, "data_schema": data_schema(own, bench.data.classes)}
        return Offer(len(rows), self.site.rank, self.site.memory_mib, own_hashes)

    def looked(self, run: str, task: TaskSpec) -> str:
        """Tell what would be trained, without a server: the task is the one that was joined."""
        own = self.own_task(run, task)
        self.site.policy.check_weights(
            {w.name: models.file_sha256(w) for w in models.resolve(own.model).glob("*.safetensors")}
        )
        data = prepared(own.model_dump_json())
        self._open_ledger(own)
        for line in report(run, own, data, self.site.policy):
            self.tell(line)
        return looked().what

    def model(self, own: TaskSpec, hashes: Mapping[str, str]) -> dict[str, str]:
        """Find the base model, and make sure that it is the one of the run and of the policy.

        Returns:
            Its hashes, which are those of the run.

        Raises:
            FedftError: it is not here, is another one, or is not allowed.
        """
        try:
            folder = models.resolve(own.model)
            weights = sorted(folder.glob("*.safetensors"))
            self.site.policy.check_weights({w.name: models.file_sha256(w) for w in weights})
            found = models.fingerprint(folder)
        except (OSError, ValueError) as error:
            raise MismatchError(
                f"the model {own.model.source[:200]!r} cannot be read: {error}",
                fix="Name another folder with --model.",
            ) from error
        _compare({name: found[name] for name in ("base_model", "tokenizer")}, hashes)
        return found

    def expected(self, plan: str, header: pb.Content) -> Expected:
        """See :class:`fedft.clients.work.Worker`."""
        assert self._bench is not None
        shapes = self._bench.engine.base.shapes
        try:
            fields = json.loads(plan)
            rank = int(fields["rank"])
            with under("plan"):
                records = of_records(shapes, fields, "receives")
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as e:
            raise UpdateRejected("schema", "a plan is JSON and says its rank") from e
        return of_work(shapes, rank, header, records)

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        """See :class:`fedft.clients.work.Worker`. Whatever goes wrong, the server gets one word of it."""
        try:
            with within(self.site.policy.most_seconds):
                return self._answer(ticket, plan, content)
        except FedftError as error:
            return _failure(word_of(error), str(error))
        except Exception as error:  # a bug here must not leave the server waiting
            logger.exception("work on %s failed", ticket)
            return _failure(word_of(error), f"{type(error).__name__}: {error}")

    def _answer(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        fields = self._own_plan(ticket, plan)
        release = self._release(ticket, plan)
        self._check(ticket, fields, release)
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
            word = _WORDS.get(reply.error.code, "failed")
            return _failure(word, reply.error.reason or "")
        answer = reply.content if self.site.policy.metrics else _without_scores(reply.content)
        with under("ledger"):
            self._spend(release)
        self.kept.store(ticket, context.state)
        if self.site.precision is not None and ticket.kind == "train":
            answer.metric_records["metrics"]["precision_bits"] = BITS[self.site.precision]
        return answer

    def _own_plan(self, ticket: Ticket, plan: str) -> TrainFields | EvalFields:
        """The plan, which is for this client and of the run that it has joined.

        Raises:
            MismatchError: it is not.
        """
        fields = plan_of(ticket.kind, plan)
        for what, asked, own in (
            ("run", ticket.run, self._run),
            ("client", ticket.site, self.name),
            ("client", fields.site, self.name),
            ("round", str(fields.round), str(ticket.round)),
        ):
            if asked != own:
                raise coded(
                    MismatchError(f"a plan for the {what} {asked[:80]!r} reached {own!r}"), "plan"
                )
        return fields

    def _check(
        self, ticket: Ticket, fields: TrainFields | EvalFields, release: Release | None
    ) -> None:
        """Hold a plan against the policy, before any of it is done."""
        assert self._bench is not None and self._ledger is not None
        policy = self.site.policy
        if isinstance(fields, TrainFields):
            rows, _ = self._bench.rows(0)
            before = self._ledger.trainings(ticket.run)
            policy.check_training(fields.training.local(), fields.rank, len(rows), before)
            self._check_trainer(fields)
            self._check_beside(fields)
        elif release is not None:
            policy.check_scores("comparisons of blocks" if fields.probe else "scores on its rows")
        policy.check_release(release, self._ledger, ticket.run)

    def _check_trainer(self, fields: TrainFields) -> None:
        """Refuse what a trainer of one's own would leave undone: noise that only the plan says."""
        assert self._bench is not None
        name = self._bench.task.trainer
        what = None if name is None else beyond_training(fields.training.local(), fields.terms)
        if what is not None:
            raise coded(
                SecurityRefusal(
                    f"the plan asks for {what}, which the trainer {name} would not do",
                    fix="Ask whoever runs the server.",
                ),
                "plan",
            )

    def _check_beside(self, fields: TrainFields) -> None:
        """Refuse records beside the adapter that are too large with it."""
        assert self._bench is not None
        shapes = self._bench.engine.base.shapes
        if more := beside(shapes, fields.model_dump()):
            adapter = numbers({ARRAYS: of_adapter(shapes, fields.rank)})
            self.site.policy.check_size(adapter, more)

    def _open_ledger(self, task: TaskSpec) -> None:
        folder = self.site.ledger or default_ledgers()
        self._ledger = ledger = Ledger(folder, row_keys(task.data, task.model.task))
        self.tell(f"privacy ledger of these data: {ledger.path}")
        before = ledger.account()
        self._told_infinite = before.unprotected > 0
        if before.results:
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
        policy, ledger = self.site.policy, self._ledger
        # Once more, as another client of this user may have answered while this one was at work.
        ledger.spend(release, lambda: policy.check_release(release, ledger, release.run))
        account = ledger.account()
        # ∞ once, not at every result; by what was told here, as the first may be another client's.
        if release.mechanism != "none" or not self._told_infinite:
            self.tell(f"privacy spent: {account.text()}")
        self._told_infinite = account.unprotected > 0

    def judged(self, ticket: Ticket, *, counted: bool) -> None:
        """See :class:`fedft.clients.work.Worker`."""
        self.kept.judged(ticket, counted=counted)

    def own_task(self, run: str, given: TaskSpec) -> TaskSpec:
        """The server's task, with everything replaced that is this machine's own business.

        Raises:
            SecurityRefusal: the policy does not allow it, or it is another one than before.
        """
        self.site.policy.check_task(given)
        source = self.site.policy.check_source(given.model, self.site.model)
        if given.model.trust_remote_code and not self.site.trust_remote_code:
            raise coded(
                SecurityRefusal(
                    f"the run's model {given.model.source!r} wants to run code of its own here",
                    fix="Read that code; to allow it, join with --trust-remote-code.",
                ),
                "code",
            )
        self.agreed.check(run, given, keep=not self.check)
        if given.trainer is not None and self.site.memory_mib is not None:
            raise coded(
                MismatchError(
                    f"what the trainer {given.trainer} takes is not known, and --memory grants a part",
                    fix="Join without --memory.",
                ),
                "limits",
            )
        if hint := self.site.own.suggestion(given):
            self.tell(hint)
        return given.model_copy(
            update={
                "data": self.site.own.data(given.data, str(self.site.data.absolute())),
                "model": given.model.model_copy(update={"source": source}),
                "relabel": dict(self.site.own.relabel),
                "most_rows": self.site.own.most_rows,
                "site": self.name,
                "device": self.site.device,
                "precision": self.site.precision or given.precision,
                "lean": self.site.memory_mib is not None and given.lora.form == "lora",
                "manifest": None,
                "fingerprint": "",
                "attack": None,
            }
        )


def _adapter_size(task: TaskSpec) -> int:
    """Parameters of the adapter, from shapes alone."""
    schema = models.schema(task.model, task.lora, len(task.classes))
    return numbers({ARRAYS: of_adapter(schema, task.lora.rank)})


def _failure(word: str, details: str) -> Failure:
    return Failure(NUMBERS[word], word, details)


def _without_scores(content: RecordDict) -> RecordDict:
    """A reply to a plan to train, without what it says of losses, gradients and time."""
    metrics = content.metric_records["metrics"]
    content["metrics"] = MetricRecord(
        {name: value for name, value in metrics.items() if name in ("num-examples", "steps")}
    )
    return content


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
