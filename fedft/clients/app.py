"""The Flower ``ClientApp`` of fedft: unpacks a message, calls the resident engine, packs the reply.

It answers three kinds of message. ``query`` says who this site is, or, where it brings a task,
whether that can be trained here; ``train`` runs the plan in the message; ``evaluate`` scores an adapter, on a slice of the central test set or on the site's own
held-out examples. Nothing in a message is executed: it names numbers and parts, nothing else.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedft.clients.attack import records_sent_by, sent_by
from fedft.clients.block_similarity import compare
from fedft.clients.engines.base import Trained
from fedft.clients.preflight import check
from fedft.clients.resident import Workbench, one_by_one, workbench
from fedft.clients.resident import trial as in_trial
from fedft.core import trial
from fedft.core.checkpoint import first_sentence, lacks_memory
from fedft.core.drawn import distinct
from fedft.core.errors import FedftError, MismatchError, UpdateRejected
from fedft.core.metrics import packed
from fedft.core.terms import entries, taken
from fedft.core.types import Adapter, Batch, EvalPlan, Importance, Part, Records, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.changes import LEFT, Packing
from fedft.core.wire.codec import GATHERED
from fedft.core.wire.compress import Key
from fedft.core.wire.schema import fault

logger = logging.getLogger(__name__)

CLIENT_ERROR = 101
"""Code of an error reply whose reason is a sentence for the server's log."""

TRAINER_ERROR = 102
"""The same, of a client whose own trainer failed."""


class SiteApp(ClientApp):
    """A ``ClientApp`` that can also train several sites in one pass."""

    def train_many(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Answer the ``train`` messages of a cohort that lives in this process.

        A site whose plan or data cannot be used gets an error reply of its own; the others train.
        """
        bench = workbench(codec.task_of(messages[0].content))
        replies: dict[int, Message] = {}
        ready: list[tuple[int, TrainPlan, Sequence[Batch]]] = []
        for position, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            try:
                plan = _plan(bench, message, context)
                own = bench.training_batches(_index(bench, context), plan.round, plan.training)
                if not own:
                    raise MismatchError(f"{plan.site} has no training examples")
                ready.append((position, plan, own))
            except FedftError as error:
                replies[position] = Message(Error(CLIENT_ERROR, error.what), reply_to=message)
        if ready:
            start = time.monotonic()
            results = _results(bench, [p for _, p, _ in ready], [b for _, _, b in ready])
            seconds = (time.monotonic() - start) / len(ready)
            for (position, plan, own), result in zip(ready, results, strict=True):
                context, message = contexts[position], messages[position]
                if isinstance(result, FedftError):
                    error = Error(TRAINER_ERROR, result.what)
                    replies[position] = Message(error, reply_to=message)
                    continue
                index = _index(bench, context)
                records = _records_sent(plan, result)
                try:
                    content, left = codec.packed_reply(
                        sent_by(bench.task, index, plan, plan.reply(result.adapter)),
                        _examples(bench, context, plan, own),
                        {**result.metrics, "seconds": seconds},
                        _packing(bench, plan, context),
                        records_sent_by(bench.task, index, plan, records),
                    )
                except FedftError as error:  # one whose training diverged costs no other its reply
                    replies[position] = Message(Error(CLIENT_ERROR, error.what), reply_to=message)
                    continue
                _keep(context, plan, result, left)
                replies[position] = Message(content, reply_to=message)
        return [replies[position] for position in range(len(messages))]


def _results(
    bench: Workbench, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
) -> "list[Trained | FedftError]":
    """What training made of each plan; where a trainer of the user's own failed, why."""
    if bench.task.trainer is None:
        return [*bench.engine.train(plans, batches)]
    found: list[Trained | FedftError] = []
    for plan, own in zip(plans, batches, strict=True):
        try:
            found += bench.engine.train([plan], [own])
        except (UpdateRejected, MismatchError) as error:  # of this client alone
            found.append(error)
    return found


app = SiteApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this site is: its position among the sites of a simulation.

    With a task: load it and try it, see :mod:`fedft.clients.preflight`. An error is part of the reply.
    """
    if (tried := trial.asked(message.content)) is not None:
        return Message(trial.answer(_tried(*tried)), reply_to=message)
    identity = ConfigRecord({"index": int(context.node_config["partition-id"])})
    return Message(RecordDict({"config": identity}), reply_to=message)


def _tried(task: str, batch_size: int) -> trial.Verdict | FedftError:
    try:
        found = check(in_trial(workbench(task)), batch_size)
        if found.why:  # what will train is tried, too
            check(in_trial(workbench(one_by_one(task))), batch_size)
        return found
    except FedftError as error:
        return error
    except Exception as error:  # whatever a model's own code raises while it is loaded
        said = f"{type(error).__name__}: {first_sentence(error)}"
        if lacks_memory(error):
            return MismatchError(
                f"there is not enough memory to load and try the model ({said})",
                fix='Choose a smaller model, [engine] precision = "bf16", or fewer workers.',
            )
        logger.warning("the trial failed", exc_info=True)
        return MismatchError(
            f"the model could not be loaded and tried: {said}",
            fix="Check that its files belong together, or choose another model.",
        )


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one site."""
    return app.train_many([message], [context])[0]


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score an adapter; the reply carries sums, so that slices can be added."""
    bench = workbench(codec.task_of(message.content))
    fields = codec.message_fields(message.content)
    plan = codec.eval_plan(message.content, bench.initial(fields["rank"]))
    if plan.probe is not None:
        return _compared(bench, plan, plan.probe, message, context)
    if plan.split == "test":
        adapter, own = plan.adapter, bench.test_batches(*plan.shard)
    else:
        adapter = _with_kept(plan.adapter, context, plan.keep)
        own = bench.holdout_batches(_index(bench, context))
    tally = bench.engine.evaluate(adapter, plan.delta, own, plan.layers)
    numbers: dict[str, Any] = {**packed(tally, bench.task.judged.sums)}
    content = RecordDict({"metrics": MetricRecord(numbers)})
    # Numbers of single rows: of the server's test set alone, never of a client's own rows.
    if plan.split == "test" and bench.task.site is None and tally.columns:
        content[GATHERED] = codec.columns_record(tally)
    return Message(content, reply_to=message)


def _compared(
    bench: Workbench, plan: EvalPlan, kind: Importance, message: Message, context: Context
) -> Message:
    """The reply to a plan that asks how alike and how important the model's blocks are."""
    own = bench.probe_batches(_index(bench, context))
    try:
        found = compare(bench.engine, plan.adapter, plan.delta, own, kind, plan.granularity)
    except FedftError as error:
        return Message(Error(CLIENT_ERROR, error.what), reply_to=message)
    tensors = {"similarity": found.similarity, "importance": found.importance}
    content = codec.reply_content(tensors, found.rows, {})
    return Message(content, reply_to=message)


def _plan(bench: Workbench, message: Message, context: Context) -> TrainPlan:
    fields = codec.message_fields(message.content)
    plan = codec.train_plan(message.content, bench.initial(fields["rank"]), bench.task.seed)
    own = bench.manifest.name_of(_index(bench, context))
    if plan.site != own:
        raise MismatchError(f"a plan for {plan.site!r} reached {own!r}")
    start = _with_kept(plan.start, context, plan.keep)
    training = bench.own_training(_index(bench, context), plan.training)
    plan = replace(plan, training=training)
    return replace(plan, start=start, records={**plan.records, **_kept_records(plan, context)})


def _index(bench: Workbench, context: Context) -> int:
    index = int(context.node_config["partition-id"])
    if not 0 <= index < len(bench.manifest):
        raise MismatchError(f"no client has index {index}; there are {len(bench.manifest)}")
    return index


def _examples(bench: Workbench, context: Context, plan: TrainPlan, own: Sequence[Batch]) -> int:
    """Distinct examples trained on: what the site holds, or fewer where its steps ran out."""
    rows, _ = bench.rows(_index(bench, context))
    if plan.training.dp_noise or bench.task.trainer is not None:
        return len(
            rows
        )  # as enrolled; the sizes of Poisson samples are secret, and a trainer has all
    return distinct(own, len(rows))


def _with_kept(adapter: Adapter, context: Context, parts: frozenset[Part]) -> Adapter:
    """``adapter`` with the site's own parts, where it has any yet."""
    record = context.state.array_records.get(codec.KEPT)
    if not parts or record is None:
        return adapter
    wanted = adapter.tensors(parts).keys()
    return adapter.replaced({k: t for k, t in codec.tensors_from(record).items() if k in wanted})


def _kept_records(plan: TrainPlan, context: Context) -> dict[str, dict[str, Tensor]]:
    """The records of the plan's terms that stay at the site, as far as it has kept them.

    Raises:
        MismatchError: what it has kept is of another shape.
    """
    state = context.state.array_records.get(codec.KEPT, {})
    found: dict[str, dict[str, Tensor]] = {}
    for record, shapes in plan.schema("keeps").items():
        own = {n: array for n, array in taken(record, state).items() if n in shapes}
        for name, array in own.items():
            if tuple(array.shape) != shapes[name]:
                raise MismatchError(
                    f"{plan.site} has kept {name} of {record!r} in the shape {list(array.shape)}, and "
                    f"the plan is for {list(shapes[name])}: its rank has changed within a run"
                )
        found[record] = {name: codec.tensor_from(array) for name, array in own.items()}
    return found


def _records_sent(plan: TrainPlan, result: Trained) -> Records:
    """The records that travel up, out of what the engine made of the plan's terms.

    Raises:
        ValueError: it did not make what the terms say.
    """
    up = plan.schema("sends")
    if wrong := fault(result.records, {**up, **plan.schema("keeps")}):
        raise ValueError(f"what training left at {plan.site} {wrong}")
    return {record: {n: result.records[record][n] for n in shapes} for record, shapes in up.items()}


def _packing(bench: Workbench, plan: TrainPlan, context: Context) -> Packing:
    """How the reply to a plan is encoded, with what this client's last ones left out."""
    left: dict[str, Tensor] = {}
    if bench.compressor.stateful:
        state = context.state.array_records.get(codec.KEPT, {})
        left = {name: codec.tensor_from(array) for name, array in taken(LEFT, state).items()}
    key = Key(plan.seed, plan.round, plan.site)
    return Packing(bench.compressor, key, plan.start.tensors(), left)


def _keep(context: Context, plan: TrainPlan, result: Trained, left: Mapping[str, Tensor]) -> None:
    """Put into the client's state what stays with it: parts, records, what an encoding left out.

    What is of blocks that it did not hold this time stays there.
    """
    tensors = result.adapter.tensors(plan.keep) | entries(LEFT, left)
    for record in plan.schema("keeps"):
        tensors |= entries(record, result.records[record])
    if tensors:
        known = context.state.array_records.get(codec.KEPT, {})
        context.state[codec.KEPT] = ArrayRecord({**known, **codec.arrays_from(tensors)})
