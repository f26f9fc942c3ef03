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
from torch import Tensor

from fedft.core import codec, folding, meters
from fedft.core.errors import Interrupted, QuorumFailure, UpdateRejected
from fedft.core.metrics import Tally
from fedft.core.sublayers import Layer
from fedft.core.types import (
    ClientUpdate,
    EvalPlan,
    LocalTraining,
    Part,
    ServerState,
    Site,
    TrainPlan,
)
from server.clock import SimulatedClock, Stay, at_time, check_reachable, elapsed
from server.config import RoundsSpec
from server.pruning import Pruning, narrowed, submodel
from server.roster import Roster
from server.validation import REPLY_REFUSED, Limits, comparison, validate
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


class Account(Protocol):
    """What the rounds ask of a privacy account; see :class:`~server.privacy.PrivacyAccount`."""

    @property
    def poisson(self) -> bool:
        """Whether it draws the cohorts, of any size, and rounds are never retried."""
        ...

    def cohort(self) -> list[Site]:
        """A Poisson sample of the sites, in the order of their names."""
        ...

    def spend(self, round_: int, cohort: Sequence[Site]) -> None:
        """Enter an attempt at a round; when this returns, it is on disk."""
        ...

    def guarantee(self) -> dict[str, Any]:
        """What has been spent so far."""
        ...

    def of_sites(self, names: Sequence[str]) -> dict[str, float]:
        """What some sites have spent of their own, where sites do."""
        ...


@dataclass(frozen=True)
class Federation:
    """What a run consists of, apart from its state.

    Attributes:
        strategy: the aggregation rule.
        roster: the registered sites.
        grid: how they are reached.
        clock: the simulated clock of a fleet that has one; without it time is the machine's.
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
        pruning: which blocks sites hold that cannot hold them all; None where all can.
        frozen: parts that no rule may train: they stay as the seed made them.
        holdout: whether sites judge their own models on their own held-out examples.
        stop: says whether the run was asked to stop.
        privacy: the account of a run that promises privacy.
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
    clock: SimulatedClock | None = None
    pruning: Pruning | None = None
    frozen: frozenset[Part] = frozenset()
    stop: Callable[[], bool] = field(default=lambda: False)
    privacy: Account | None = None

    @property
    def patience_s(self) -> float | None:
        """Seconds of this machine's time for which replies are waited; None is as long as it takes.

        Under a simulated clock the deadline is one of simulated time.
        """
        return self.settings.deadline_s if self.clock is None else None


Asked = tuple[Site, TrainPlan]
"""A site and what it is asked to do."""


@dataclass(frozen=True, eq=False)
class Completed:
    """One round: the state after it, its line for ``rounds.jsonl``, and its lines for ``clients.jsonl``."""

    state: ServerState
    record: dict[str, Any]
    replies: list[dict[str, Any]]


class Stopwatch:
    """Seconds by phase, on this machine's monotonic clock."""

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
    """What happened in the round in hand.

    Attributes:
        replies: lines for ``clients.jsonl``.
        failures: reason → sites.
        up, down: bytes.
        now: simulated seconds since the beginning of the run.
        busy: seconds that the devices of the cohort in hand spent on the simulated clock.
        spent: the same of all cohorts, summed.
    """

    replies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    up: int = 0
    down: int = 0
    now: float = 0.0
    busy: Mapping[str, float] = field(default_factory=dict[str, float])
    spent: float = 0.0

    def failed(self, round_: int, site: str, reason: str, why: str) -> None:
        """Count a site that gave no usable reply."""
        self.failures.setdefault(reason, []).append(site)
        line = {"kind": "train", "round": round_, "site": site, "status": reason, "reason": why}
        self.replies.append({**line, **self.timing(site)})

    def timing(self, site: str) -> dict[str, float]:
        """What a line on a site says of its device's time; nothing where there is no clock."""
        return {"device_seconds": self.busy[site]} if site in self.busy else {}

    def took(self, busy: Mapping[str, float]) -> None:
        """Devices of the next cohort spent that many seconds."""
        self.busy = busy
        self.spent += sum(busy.values())


def one_round(federation: Federation, state: ServerState) -> Completed:
    """One round, from sampling to evaluation."""
    watch, ledger = Stopwatch(), Ledger(now=elapsed(state))
    state = compared(federation, state, watch, ledger)
    updates, cohort, attempts = _gather(federation, state, watch, ledger)
    return concluded(federation, state, updates, cohort, watch, ledger, {"attempts": attempts})


def rounds(
    federation: Federation,
    state: ServerState,
    step: Callable[[Federation, ServerState], Completed] = one_round,
) -> Iterator[Completed]:
    """Run the rounds that ``state`` has not seen yet.

    Args:
        federation: of the run.
        state: to go on from.
        step: makes one round: this module's, or one update of :mod:`server.asynchrony`.

    Raises:
        QuorumFailure: too few usable replies in every attempt; the last yielded state stands.
        Interrupted: ``federation.stop`` said so.
        ConfigError: on the simulated clock nobody can be reached, or meet the deadline.
    """
    while state.round < federation.settings.count:
        completed = step(federation, state)
        state = completed.state
        yield completed


def concluded(
    federation: Federation,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    cohort: Sequence[Site],
    watch: Stopwatch,
    ledger: Ledger,
    facts: Mapping[str, Any],
) -> Completed:
    """Aggregate, measure and, where it is due, evaluate.

    ``cohort`` are the sites that were asked, ``watch`` and ``ledger`` those of the round so far,
    and ``facts`` further entries of its line.
    """
    with watch.phase("aggregate"):
        after = federation.strategy.aggregate(state, updates)
        folded = folding.fold(updates, federation.strategy.personal)
        following = _next_starts(federation, after, cohort)
        measured = meters.measure(state, folded, after, following=following)
    if federation.pruning is not None:
        facts = {**facts, "pruning": federation.pruning.facts(state, cohort)}
    record: dict[str, Any] = {
        "round": after.round,
        "cohort": [site.name for site in cohort],
        "failures": ledger.failures,
        **facts,
        "train": {"loss": folded.loss},
        "bytes": {"up": ledger.up, "down": ledger.down},
        **measured,
    }
    if federation.privacy is not None:
        _add_spent(federation.privacy, ledger)
        if _evaluation_due(federation.settings, after.round):
            record["privacy"] = federation.privacy.guarantee()
    if federation.clock is not None:
        after = at_time(after, ledger.now)
        spent = {"seconds": ledger.now - elapsed(state), "elapsed": ledger.now}
        record["clock"] = {**spent, "device_seconds": ledger.spent}
    if _evaluation_due(federation.settings, after.round):
        if federation.settings.spectrum:
            with watch.phase("aggregate"):
                record["spectrum"] = meters.spectrum(folded)
        with watch.phase("evaluate"):
            record["eval"] = evaluate(federation, after)
            if (pruning := federation.pruning) is not None:
                submodels = {k: pruning.typical(after, k) for k in pruning.sizes}
                record["submodels"] = {
                    str(k): evaluate(federation, after, layers) for k, layers in submodels.items()
                }
            if federation.holdout:
                record["sites"] = _evaluate_sites(federation, after, cohort, ledger)
    record["seconds"] = watch.seconds
    return Completed(after, record, ledger.replies)


def _next_starts(
    federation: Federation, after: ServerState, cohort: Sequence[Site]
) -> dict[str, TrainPlan] | None:
    """What the sites of a round would start the next one from; only mixed ranks need it told."""
    if len({site.rank for site in cohort}) < 2:
        return None
    return {site.name: plan_for(federation, after, site) for site in cohort}


def _add_spent(account: Account, ledger: Ledger) -> None:
    """Each site's own ε so far, on its line."""
    trained = [line for line in ledger.replies if line["kind"] == "train"]
    spent = account.of_sites([line["site"] for line in trained])
    for line in trained:
        if line["site"] in spent:
            line["epsilon"] = spent[line["site"]]


def _gather(
    federation: Federation, state: ServerState, watch: Stopwatch, ledger: Ledger
) -> tuple[list[ClientUpdate], list[Site], int]:
    """Ask cohorts until one of them meets the quorum."""
    settings, round_ = federation.settings, state.round + 1
    private = federation.privacy
    # A Poisson sample has any size, and asking a second one would release the first.
    needed = 0 if private is not None and private.poisson else settings.needed
    updates: list[ClientUpdate] = []
    stays: list[Stay] = []
    for attempt in range(settings.retries + 1):
        with watch.phase("plan"):
            cohort = _cohort(federation, round_, attempt, ledger)
            plans = [plan_for(federation, state, site) for site in cohort]
            asked = list(zip(cohort, plans, strict=True))
            if federation.clock is not None:
                asked, stays = _in_time(federation.clock, settings, asked, stays, ledger)
        if private is not None:
            private.spend(round_, cohort)
        with watch.phase("train"):
            # Below quorum nothing would come of the training.
            updates = train(federation, asked, ledger) if len(asked) >= needed else []
        if len(updates) >= needed:
            return updates, cohort, attempt + 1
    if federation.clock is not None and settings.deadline_s is not None:
        check_reachable(stays, settings.deadline_s)
    reasons = ", ".join(f"{len(sites)} {reason}" for reason, sites in ledger.failures.items())
    first = next((r["reason"] for r in ledger.replies if r["status"] != "ok"), "")
    raise QuorumFailure(
        f"round {round_}: {len(updates)} usable replies of {settings.per_round}, {needed} needed, "
        f"after {settings.retries + 1} attempts ({reasons}; the first: {first})",
        fix="The model is as it was after the last completed round.",
    )


def _cohort(federation: Federation, round_: int, attempt: int, ledger: Ledger) -> list[Site]:
    """The sites to ask; the clock goes on to when enough of them can be reached."""
    settings = federation.settings
    if federation.privacy is not None and federation.privacy.poisson:
        return federation.privacy.cohort()
    if federation.clock is None:
        return federation.roster.sample(federation.seed, round_, attempt, settings.per_round)
    count = settings.per_round + settings.spares
    cohort, ledger.now = federation.clock.cohort(
        round_, attempt, count, settings.needed, ledger.now
    )
    return cohort


def _in_time(
    clock: SimulatedClock,
    settings: RoundsSpec,
    asked: Sequence[Asked],
    before: Sequence[Stay],
    ledger: Ledger,
) -> tuple[list[Asked], list[Stay]]:
    """Those of a cohort whose replies will count, and how everybody's trip ends, ``before`` included.

    Of the others, which are not even trained, the ledger notes the reason; the clock goes on to the
    end of the round.
    """
    stays = [clock.stay(site, plan, ledger.now) for site, plan in asked]
    closing = clock.close(stays, settings.per_round, ledger.now)
    ledger.took(closing.busy)
    for (site, plan), stay in zip(asked, stays, strict=True):
        if site.name in closing.lost:
            ledger.down += stay.trip.bytes_down
            reason = closing.lost[site.name]
            why = f"{reason}: needs {stay.trip.seconds:.4g} s of simulated time"
            ledger.failed(plan.round, site.name, reason, why)
    ledger.now = closing.ends
    return [pair for pair in asked if pair[0].name not in closing.lost], [*before, *stays]


def compared(
    federation: Federation, state: ServerState, watch: Stopwatch, ledger: Ledger
) -> ServerState:
    """``state`` with how alike the model's blocks are, where that is due; the cohort is asked."""
    pruning = federation.pruning
    if pruning is None or not pruning.due(state):
        return state
    round_ = state.round + 1
    with watch.phase("compare"):
        cohort = federation.roster.sample(federation.seed, round_, 0, federation.settings.per_round)
        encoder = codec.Encoder(federation.task, federation.wire)
        asked = EvalPlan(
            state.adapter,
            state.delta,
            probe=pruning.spec.importance,
            granularity=pruning.spec.granularity,
            round=round_,
        )
        contents = [encoder.evaluate(replace(asked, site=site.name)) for site in cohort]
        ledger.down += sum(map(codec.content_bytes, contents))
        nodes = [federation.roster.node_of(site) for site in cohort]
        messages = _messages(MessageType.EVALUATE, round_, contents, nodes)
        ids = federation.grid.push_jobs([[message] for message in messages])
        found: dict[str, tuple[Tensor, Tensor, int]] = {}
        for reply in _replies(federation, federation.grid, ids, federation.patience_s):
            answer = None if reply.has_error() else comparison(reply.content, pruning.count)
            if answer is not None:
                ledger.up += codec.content_bytes(reply.content)
                found[reply.metadata.reply_to_message_id] = answer
    if not found:
        raise QuorumFailure(
            f"round {round_}: no site of {len(cohort)} could compare the model's blocks",
            fix='Choose them without: [pruning] selection = "stride".',
        )
    return pruning.learned(state, [found[id_] for id_ in ids if id_ in found])


def plan_for(federation: Federation, state: ServerState, site: Site) -> TrainPlan:
    """The rule's plan for a site, with the facts of the round."""
    plan = federation.strategy.plan(state, site).without(federation.frozen)
    if federation.pruning is not None:
        plan = narrowed(plan, federation.pruning.layers(state, site))
    training = federation.training.overlaid(plan.training)
    return replace(
        plan, training=training, round=state.round + 1, site=site.name, seed=federation.seed
    )


def train(federation: Federation, asked: Sequence[Asked], ledger: Ledger) -> list[ClientUpdate]:
    """Send the plans, take what comes back until all have answered or the deadline has passed."""
    encoder = codec.Encoder(federation.task, federation.wire)
    groups = grouped([plan for _, plan in asked], federation.cohort)
    jobs: list[list[Message]] = []
    for group in groups:
        contents = [encoder.train(asked[i][1]) for i in group]
        ledger.down += sum(codec.content_bytes(content) for content in contents)
        nodes = [federation.roster.node_of(asked[i][0]) for i in group]
        jobs.append(_messages(MessageType.TRAIN, asked[0][1].round, contents, nodes))
    ids = federation.grid.push_jobs(jobs)
    order = itertools.chain.from_iterable(groups)
    open_ = {id_: asked[i] for id_, i in zip(ids, order, strict=True)}
    updates: list[ClientUpdate] = []
    for reply in _replies(federation, federation.grid, ids, federation.patience_s):
        site, plan = open_.pop(reply.metadata.reply_to_message_id)
        if (update := _accept(federation, reply, site, plan, ledger)) is not None:
            updates.append(update)
    for site, plan in open_.values():
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
            **ledger.timing(site.name),
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


def evaluate(
    federation: Federation, state: ServerState, layers: tuple[Layer, ...] | None = None
) -> dict[str, float]:
    """Score the global model on the central test set; any node can hold a slice of it.

    Args:
        federation: of which sites.
        state: whose adapter.
        layers: those of a submodel to score in its place; None is all of them.
    """
    encoder = codec.Encoder(federation.task, federation.wire)
    whole = submodel(EvalPlan(state.adapter, state.delta, round=state.round), layers)
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
    """Each site of the round judges its own model, or its part of it, on its held-out examples."""
    encoder = codec.Encoder(federation.task, federation.wire)
    own = EvalPlan(
        state.adapter,
        state.delta,
        split="holdout",
        keep=federation.strategy.personal,
        round=state.round,
    )
    pruning = federation.pruning
    parts = [None if pruning is None else pruning.layers(state, site) for site in cohort]
    contents = [
        encoder.evaluate(replace(submodel(own, layers), site=site.name))
        for site, layers in zip(cohort, parts, strict=True)
    ]
    nodes = [federation.roster.node_of(site) for site in cohort]
    messages = _messages(MessageType.EVALUATE, state.round, contents, nodes)
    scores: list[Mapping[str, float]] = []
    tallies = _tallies(federation, federation.grid, messages, federation.patience_s)
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
