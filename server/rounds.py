"""The rounds of a federation: sample, plan, send, receive, validate, aggregate, measure, evaluate.

The loop is a generator of completed rounds and keeps no record of its own: whoever consumes it
commits each round before asking for the next. Flower's own loop cannot be resumed, committed,
stopped early or seeded, which is why this one exists; it talks to clients through Flower's
``Grid`` all the same.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flwr.app import Message, MessageType, RecordDict

from fedft.core import codec, meters
from fedft.core.errors import Interrupted, QuorumFailure, UpdateRejected
from fedft.core.metrics import Tally
from fedft.core.types import ClientUpdate, EvalPlan, LocalTraining, ServerState, Site, TrainPlan
from server.config import RoundsSpec
from server.roster import Roster
from server.validation import REPLY_REFUSED, Limits, validate
from strategies import Strategy

EVALUATION_SHARDS = 8
"""Slices of the central test set. A constant, so that sums do not depend on the workers."""

LOOK_UP_S = 0.5
"""Seconds after which a wait for replies looks whether the run was asked to stop."""


class Courier(Protocol):
    """What the rounds ask of a grid. Node id = index of the site + 1.

    See :class:`~server.grids.base.SimulationGrid` for what each call promises.
    """

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        """Send cohorts of messages; returns the ids of all of them, in order."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """The replies that are there, each once."""
        ...

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Block until there may be a reply; False when the time, in seconds, is over."""
        ...

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Give up on messages; their replies are dropped."""
        ...


@dataclass(frozen=True)
class Federation:
    """What a run consists of, apart from its state.

    Attributes:
        strategy: the aggregation rule.
        roster: the registered sites.
        grid: how they are reached.
        evaluator: what scores the global model on the server's test set, where the sites do not
            hold it; None is the grid itself.
        task: JSON of the :class:`~fedft.core.spec.TaskSpec`, sent with every message.
        training: local optimisation.
        settings: the `[rounds]` table.
        seed: of the run.
        kind: the model's task, which decides what is a score.
        cohort: how many sites are trained in one pass.
        wire: number format of tensors on the wire.
        limits: bounds on replies.
        holdout: whether sites judge their own models on their own held-out examples.
        stop: says whether the run was asked to stop.
    """

    strategy: Strategy
    roster: Roster
    grid: Courier
    task: str
    training: LocalTraining
    settings: RoundsSpec
    seed: int
    kind: str
    cohort: int = 1
    wire: codec.WireDtype = "fp32"
    limits: Limits = field(default_factory=Limits)
    holdout: bool = False
    evaluator: Courier | None = None
    stop: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True, eq=False)
class Completed:
    """One round: the state after it, its line for ``rounds.jsonl``, and its lines for ``clients.jsonl``."""

    state: ServerState
    record: dict[str, Any]
    replies: list[dict[str, Any]]


class Clock:
    """Seconds by phase, on the monotonic clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@dataclass
class Ledger:
    """What happened in the round in hand: replies, failures by reason, bytes."""

    replies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    up: int = 0
    down: int = 0

    def failed(self, round_: int, site: str, reason: str, why: str) -> None:
        """Count a site that gave no usable reply."""
        self.failures.setdefault(reason, []).append(site)
        self.replies.append(
            {"kind": "train", "round": round_, "site": site, "status": reason, "reason": why}
        )


def rounds(federation: Federation, state: ServerState) -> Iterator[Completed]:
    """Run the rounds that ``state`` has not seen yet.

    Raises:
        QuorumFailure: too few usable replies in every attempt; the last yielded state stands.
        Interrupted: ``federation.stop`` said so.
    """
    while state.round < federation.settings.count:
        completed = one_round(federation, state)
        state = completed.state
        yield completed


def one_round(federation: Federation, state: ServerState) -> Completed:
    """One round, from sampling to evaluation."""
    clock, ledger = Clock(), Ledger()
    updates, cohort, attempts = _gather(federation, state, clock, ledger)
    with clock.phase("aggregate"):
        after = federation.strategy.aggregate(state, updates)
        measured = meters.measure(
            state,
            updates,
            after,
            personal=federation.strategy.personal,
            following=_next_starts(federation, after, cohort),
        )
    record: dict[str, Any] = {
        "round": after.round,
        "cohort": [site.name for site in cohort],
        "failures": ledger.failures,
        "attempts": attempts,
        "train": {"loss": _mean_loss(updates)},
        "bytes": {"up": ledger.up, "down": ledger.down},
        **measured,
    }
    if _evaluation_due(federation.settings, after.round):
        if federation.settings.spectrum:
            with clock.phase("aggregate"):
                record["spectrum"] = meters.spectrum(updates, federation.strategy.personal)
        with clock.phase("evaluate"):
            record["eval"] = evaluate(federation, after)
            if federation.holdout:
                record["sites"] = _evaluate_sites(federation, after, cohort, ledger)
    record["seconds"] = clock.seconds
    return Completed(after, record, ledger.replies)


def _next_starts(
    federation: Federation, after: ServerState, cohort: Sequence[Site]
) -> dict[str, TrainPlan] | None:
    """What the sites of a round would start the next one from; only mixed ranks need it told."""
    if len({site.rank for site in cohort}) < 2:
        return None
    return {site.name: plan_for(federation, after, site) for site in cohort}


def _gather(
    federation: Federation, state: ServerState, clock: Clock, ledger: Ledger
) -> tuple[list[ClientUpdate], list[Site], int]:
    """Ask cohorts until one of them meets the quorum."""
    settings, round_ = federation.settings, state.round + 1
    needed = settings.needed
    updates: list[ClientUpdate] = []
    for attempt in range(settings.retries + 1):
        with clock.phase("plan"):
            cohort = federation.roster.sample(federation.seed, round_, attempt, settings.per_round)
            plans = [plan_for(federation, state, site) for site in cohort]
        with clock.phase("train"):
            updates = _train(federation, cohort, plans, ledger)
        if len(updates) >= needed:
            return updates, cohort, attempt + 1
    reasons = ", ".join(f"{len(sites)} {reason}" for reason, sites in ledger.failures.items())
    first = next((r["reason"] for r in ledger.replies if r["status"] != "ok"), "")
    raise QuorumFailure(
        f"round {round_}: {len(updates)} usable replies of {settings.per_round}, {needed} needed, "
        f"after {settings.retries + 1} attempts ({reasons}; the first: {first})",
        fix="The model is as it was after the last completed round.",
    )


def plan_for(federation: Federation, state: ServerState, site: Site) -> TrainPlan:
    """The rule's plan for a site, with the facts of the round."""
    plan = federation.strategy.plan(state, site)
    training = federation.training.overlaid(plan.training)
    return replace(
        plan, training=training, round=state.round + 1, site=site.name, seed=federation.seed
    )


def _train(
    federation: Federation, cohort: Sequence[Site], plans: Sequence[TrainPlan], ledger: Ledger
) -> list[ClientUpdate]:
    """Send the plans, take what comes back until all have answered or the deadline has passed."""
    encoder = codec.Encoder(federation.task, federation.wire)
    groups = grouped(plans, federation.cohort)
    jobs: list[list[Message]] = []
    for group in groups:
        contents = [encoder.train(plans[i]) for i in group]
        ledger.down += sum(codec.content_bytes(content) for content in contents)
        nodes = [federation.roster.node_of(cohort[i]) for i in group]
        jobs.append(_messages(MessageType.TRAIN, plans[0].round, contents, nodes))
    ids = federation.grid.push_jobs(jobs)
    order = itertools.chain.from_iterable(groups)
    asked = {id_: (cohort[i], plans[i]) for id_, i in zip(ids, order, strict=True)}
    updates: list[ClientUpdate] = []
    for reply in _replies(federation, federation.grid, ids, federation.settings.deadline_s):
        site, plan = asked.pop(reply.metadata.reply_to_message_id)
        if (update := _accept(federation, reply, site, plan, ledger)) is not None:
            updates.append(update)
    for site, plan in asked.values():
        ledger.failed(plan.round, site.name, "timeout", "no answer before the deadline")
    return sorted(updates, key=lambda update: update.site)


def _accept(
    federation: Federation, reply: Message, site: Site, plan: TrainPlan, ledger: Ledger
) -> ClientUpdate | None:
    if reply.has_error():
        why = reply.error.reason or ""
        word = why.split(":")[0] if reply.error.code == REPLY_REFUSED else "error"
        ledger.failed(plan.round, site.name, word, why)
        return None
    try:
        sent = replace(plan, start=codec.on_the_wire(plan.start, federation.wire))
        update = validate(reply.content, sent, site, federation.limits)
    except UpdateRejected as rejected:
        ledger.failed(plan.round, site.name, rejected.reason, rejected.what)
        return None
    size = codec.content_bytes(reply.content)
    ledger.up += size
    ledger.replies.append(
        {
            **update.metrics,
            "kind": "train",
            "round": plan.round,
            "site": site.name,
            "status": "ok",
            "examples": update.examples,
            "rank": update.start.rank,
            "bytes_up": size,
        }
    )
    return update


def _replies(
    federation: Federation, grid: Courier, ids: Sequence[str], deadline_s: float | None
) -> Iterator[Message]:
    """Replies as they arrive, each once, until all are in or the deadline has passed."""
    waiting = set(ids)
    closes = time.monotonic() + (deadline_s if deadline_s is not None else float("inf"))
    while waiting and time.monotonic() < closes:
        if federation.stop():
            grid.cancel(waiting)
            raise Interrupted("stopped; the last completed round is committed")
        for reply in grid.pull_messages(waiting):
            if reply.metadata.reply_to_message_id in waiting:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
        look_up = min(closes, time.monotonic() + LOOK_UP_S)
        arrived = not waiting or grid.wait(waiting, max(0.0, look_up - time.monotonic()))
        if not arrived and time.monotonic() < look_up:
            break  # nothing is under way that could still answer
    grid.cancel(waiting)


def grouped(plans: Sequence[TrainPlan], size: int) -> list[list[int]]:
    """Positions of plans that are trained in one pass: a function of the plans alone.

    Sites with the same parts, layers and base delta share a pass; passes are of equal size, as far
    as that goes, and at most ``size``.
    """
    kinds: dict[Any, list[int]] = {}
    for index, plan in enumerate(plans):
        key = (plan.train, plan.send, plan.keep, plan.layers, id(plan.delta) if plan.delta else 0)
        kinds.setdefault(key, []).append(index)
    groups: list[list[int]] = []
    for members in kinds.values():
        passes = -(-len(members) // size)
        bounds = [len(members) * i // passes for i in range(passes + 1)]
        groups += [members[a:b] for a, b in itertools.pairwise(bounds)]
    return groups


def evaluate(federation: Federation, state: ServerState) -> dict[str, float]:
    """Score the global model on the central test set; any node can hold a slice of it."""
    encoder = codec.Encoder(federation.task, federation.wire)
    whole = EvalPlan(state.adapter, state.delta, round=state.round)
    shards = range(EVALUATION_SHARDS)
    plans = [replace(whole, shard=(shard, EVALUATION_SHARDS)) for shard in shards]
    nodes = [1 + shard % federation.settings.per_round for shard in shards]
    contents = [encoder.evaluate(plan) for plan in plans]
    messages = _messages(MessageType.EVALUATE, state.round, contents, nodes)
    tallies = _tallies(federation, federation.evaluator or federation.grid, messages, None)
    missing = sum(tally is None for tally in tallies)
    if missing:
        raise QuorumFailure(
            f"round {state.round}: {missing} of {len(tallies)} slices of the test set were not evaluated",
            fix="The last committed round stands, and this one is run again.",
        )
    return Tally.total(t for t in tallies if t is not None).scores(federation.kind)


def _evaluate_sites(
    federation: Federation, state: ServerState, cohort: Sequence[Site], ledger: Ledger
) -> dict[str, float]:
    """Each site of the round judges its own model on its own held-out examples."""
    encoder = codec.Encoder(federation.task, federation.wire)
    own = EvalPlan(
        state.adapter,
        state.delta,
        split="holdout",
        keep=federation.strategy.personal,
        round=state.round,
    )
    contents = [encoder.evaluate(replace(own, site=site.name)) for site in cohort]
    nodes = [federation.roster.node_of(site) for site in cohort]
    messages = _messages(MessageType.EVALUATE, state.round, contents, nodes)
    scores: list[Mapping[str, float]] = []
    deadline = federation.settings.deadline_s
    tallies = _tallies(federation, federation.grid, messages, deadline)
    for site, tally in zip(cohort, tallies, strict=True):
        if tally is None or tally.count == 0:
            continue
        scores.append(tally.scores(federation.kind))
        line = {"kind": "eval", "round": state.round, "site": site.name, "examples": tally.count}
        ledger.replies.append({**line, **scores[-1]})
    if not scores:
        return {"n": 0}
    means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    return {**means, "n": len(scores)}


def _messages(
    kind: str, round_: int, contents: Sequence[RecordDict], nodes: Sequence[int]
) -> list[Message]:
    return [
        Message(content, node, kind, group_id=str(round_))
        for content, node in zip(contents, nodes, strict=True)
    ]


def _tallies(
    federation: Federation, grid: Courier, messages: Sequence[Message], deadline_s: float | None
) -> list[Tally | None]:
    """The sums behind the replies, in the order of the messages; None where there was none."""
    ids = grid.push_jobs([[message] for message in messages])
    tallies: dict[str, Tally] = {}
    for reply in _replies(federation, grid, ids, deadline_s):
        tally = None if reply.has_error() else _tally(reply.content)
        if tally is not None:
            tallies[reply.metadata.reply_to_message_id] = tally
    return [tallies.get(id_) for id_ in ids]


def _tally(content: RecordDict) -> Tally | None:
    """The sums in a reply; None where it holds none that can be used."""
    metrics: Any = content.metric_records.get("metrics", {})
    try:
        tally = Tally(
            float(metrics["loss-sum"]), int(metrics["correct"]), int(metrics["num-examples"])
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return tally if 0 <= tally.correct <= tally.count else None


def _evaluation_due(settings: RoundsSpec, round_: int) -> bool:
    return round_ % settings.evaluate_every == 0 or round_ == settings.count


def _mean_loss(updates: Sequence[ClientUpdate]) -> float | None:
    known = [(u.examples, u.metrics["loss"]) for u in updates if "loss" in u.metrics]
    total = sum(examples for examples, _ in known)
    return sum(examples * loss for examples, loss in known) / total if total else None
