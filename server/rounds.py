"""The rounds of a federation: sample, plan, send, receive, validate, aggregate, measure, evaluate.

The loop is a generator of completed rounds and keeps no record of its own: whoever consumes it
commits each round before asking for the next. Flower's own loop cannot be resumed, committed,
stopped early or seeded, which is why this one exists; it talks to clients through Flower's
``Grid`` all the same.

The next round is opened before the last one is measured, evaluated and committed, where nothing
stands against it (:func:`_may_go_ahead`): sites get to work as soon as there is a model for them to
start from. What they answer is not looked at before the last round is committed: the same bytes
come of it, and a run that is killed in between goes on as if the next round had not been opened.
"""

import itertools
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType
from torch import Tensor

from fedft.core import codec, meters
from fedft.core.errors import FedftError, QuorumFailure, UpdateRejected
from fedft.core.types import ClientUpdate, EvalPlan, ServerState, Site, TrainPlan
from server import evaluation
from server.clock import SimulatedClock, Stay, at_time, check_reachable, elapsed
from server.config import RoundsSpec
from server.courier import ask_to_evaluate, messages, replies
from server.evaluation import Evaluation
from server.federation import Account, Asked, Completed, Federation, Ledger, Stopwatch
from server.intake import Intake
from server.pruning import narrowed
from server.validation import REPLY_REFUSED, comparison, validate


@dataclass(frozen=True, eq=False)
class Sent:
    """A cohort that was sent its plans.

    Attributes:
        cohort: all of it.
        asked: the sites that are to answer, and their plans as they read them, by the id of the
            message to each; in the order in which they are worked on.
    """

    cohort: Sequence[Site]
    asked: Mapping[str, Asked]


@dataclass(frozen=True, eq=False)
class Opening:
    """A round that has begun: its first cohort is at work.

    Attributes:
        state: that the round starts from.
        sent: the first cohort.
        stays: how the trips of this cohort end, on the simulated clock.
        watch, ledger: of the round.
    """

    state: ServerState
    sent: Sent
    stays: Sequence[Stay]
    watch: Stopwatch
    ledger: Ledger


@dataclass(frozen=True, eq=False)
class Closing:
    """A round whose replies are aggregated; its model is being evaluated, where that is due.

    Attributes:
        federation: of which sites.
        before, after: the states around the round.
        intake: the replies.
        cohort: the sites that were asked.
        facts: entries of the round's line that say how it went.
        evaluation: what was asked of the model; None where no evaluation is due.
        watch, ledger: of the round.
    """

    federation: Federation
    before: ServerState
    after: ServerState
    intake: Intake
    cohort: Sequence[Site]
    facts: Mapping[str, Any]
    evaluation: Evaluation | None
    watch: Stopwatch
    ledger: Ledger

    def completed(self) -> Completed:
        """Measure, wait for the evaluation, and say what happened.

        Raises:
            QuorumFailure: a part of the evaluation is missing.
            Interrupted: the run was asked to stop.
        """
        ledger, after = self.ledger, self.after
        record: dict[str, Any] = {
            "round": after.round,
            "cohort": [site.name for site in self.cohort],
            "failures": ledger.failures,
            **self.facts,
            "train": {"loss": self.intake.folded.loss},
            "bytes": {"up": ledger.up, "down": ledger.down},
        }
        with self.watch.phase("aggregate"):
            record |= self._measured()
        record |= self._accounts()
        if self.evaluation is not None:
            with self.watch.phase("evaluate"):
                record |= self.evaluation.scores(ledger)
        record["seconds"] = self.watch.seconds
        return Completed(after, record, ledger.replies)

    def _measured(self) -> Mapping[str, Any]:
        """The meters, and what pruning has to say."""
        federation, folded = self.federation, self.intake.folded
        following = _next_starts(federation, self.after, self.cohort)
        measured = dict[str, Any](
            meters.measure(self.before, folded, self.after, following=following)
        )
        if self.evaluation is not None and federation.settings.spectrum:
            held = self.before.adapter.factors
            measured["spectrum"] = meters.spectrum(folded, held=held)
        if federation.pruning is not None:
            measured["pruning"] = federation.pruning.facts(self.before, self.cohort)
        return measured

    def _accounts(self) -> Mapping[str, Any]:
        """What the round cost, in privacy and in simulated time, where these are kept."""
        federation, ledger = self.federation, self.ledger
        accounts: dict[str, Any] = {}
        if federation.privacy is not None:
            _add_spent(federation.privacy, ledger)
            if self.evaluation is not None:
                accounts["privacy"] = federation.privacy.guarantee()
        if federation.clock is not None:
            spent = {"seconds": ledger.now - elapsed(self.before), "elapsed": ledger.now}
            accounts["clock"] = {**spent, "device_seconds": ledger.spent}
        return accounts


def rounds(federation: Federation, state: ServerState) -> Generator[Completed, None, None]:
    """Run the rounds that ``state`` has not seen yet.

    Args:
        federation: of the run.
        state: to go on from.

    Raises:
        QuorumFailure: too few usable replies in every attempt; the last yielded state stands.
        Interrupted: ``federation.stop`` said so.
        ConfigError: on the simulated clock nobody can be reached, or meet the deadline.
    """
    opening: Opening | None = None
    try:
        while state.round < federation.settings.count:
            closing = answered(federation, opening or opened(federation, state))
            opening = _ahead(federation, closing)
            completed = closing.completed()
            state = completed.state
            yield completed
    finally:
        if opening is not None:
            federation.grid.cancel(opening.sent.asked)


def one_round(federation: Federation, state: ServerState) -> Completed:
    """One round by itself, from sampling to evaluation: the definition of :func:`rounds`."""
    return answered(federation, opened(federation, state)).completed()


def _ahead(federation: Federation, closing: Closing) -> Opening | None:
    """The next round, opened before this one is evaluated; None where that has to wait."""
    if not _may_go_ahead(federation, closing):
        return None
    try:
        return opened(federation, closing.after)
    except FedftError:
        return None  # this round is to be committed first; the next one then meets it again


def _may_go_ahead(federation: Federation, closing: Closing) -> bool:
    """Whether nothing of the next round has to wait until this one is committed.

    What has to: a run that may end with this evaluation; the account of a private run, which is
    charged for a round when it begins; a comparison of the blocks, which the server waits for; and
    sites that are not there yet.
    """
    settings = federation.settings
    return (
        closing.after.round < settings.count
        and settings.patience is None
        and federation.privacy is None
        and (federation.pruning is None or not federation.pruning.due(closing.after))
        and federation.roster.ready(settings.per_round)
    )


def opened(federation: Federation, state: ServerState) -> Opening:
    """Begin a round: its first cohort gets its plans."""
    watch, ledger = Stopwatch(), Ledger(now=elapsed(state))
    state = _compared(federation, state, watch, ledger)
    sent, stays = _ask(federation, state, 0, (), watch, ledger)
    return Opening(state, sent, stays, watch, ledger)


def answered(federation: Federation, opening: Opening) -> Closing:
    """Take in what the sites of a round answer, aggregate, and have the model evaluated."""
    intake, cohort, attempts = _gather(federation, opening)
    facts = {"attempts": attempts}
    state, watch, ledger = opening.state, opening.watch, opening.ledger
    return concluded(federation, state, intake, cohort, watch, ledger, facts)


def concluded(
    federation: Federation,
    state: ServerState,
    intake: Intake,
    cohort: Sequence[Site],
    watch: Stopwatch,
    ledger: Ledger,
    facts: Mapping[str, Any],
) -> Closing:
    """Aggregate and, where it is due, have the model evaluated.

    Args:
        federation: of which sites.
        state: that the round started from.
        intake: the replies.
        cohort: the sites that were asked.
        watch: of the round so far.
        ledger: of the round so far.
        facts: further entries of its line.
    """
    with watch.phase("aggregate"):
        after = federation.strategy.aggregate(state, intake.replies(state.adapter))
        if federation.clock is not None:
            after = at_time(after, ledger.now)
    asked: Evaluation | None = None
    if _evaluation_due(federation.settings, after.round):
        with watch.phase("evaluate"):
            asked = evaluation.asked(federation, after, cohort)
    return Closing(federation, state, after, intake, cohort, facts, asked, watch, ledger)


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


def _gather(federation: Federation, opening: Opening) -> tuple[Intake, Sequence[Site], int]:
    """Take in answers, and ask further cohorts until one of them meets the quorum."""
    settings, state = federation.settings, opening.state
    sent, stays, watch, ledger = opening.sent, opening.stays, opening.watch, opening.ledger
    intake = Intake(federation.strategy)
    for attempt in range(settings.retries + 1):
        if attempt > 0:
            sent, stays = _ask(federation, state, attempt, stays, watch, ledger)
        with watch.phase("train"):
            intake = Intake(federation.strategy).add(_received(federation, sent, ledger))
        if len(intake) >= _needed(federation):
            return intake, sent.cohort, attempt + 1
    if federation.clock is not None and settings.deadline_s is not None:
        check_reachable(stays, settings.deadline_s)
    reasons = ", ".join(f"{len(sites)} {reason}" for reason, sites in ledger.failures.items())
    first = next((r["reason"] for r in ledger.replies if r["status"] != "ok"), "")
    raise QuorumFailure(
        f"round {state.round + 1}: {len(intake)} usable replies of {settings.per_round}, "
        f"{_needed(federation)} needed, after {settings.retries + 1} attempts ({reasons}; the "
        f"first: {first})",
        fix="The model is as it was after the last completed round.",
    )


def _needed(federation: Federation) -> int:
    """Usable replies without which a round is not aggregated."""
    # A Poisson sample has any size, and asking a second one would release the first.
    private = federation.privacy is not None and federation.privacy.poisson
    return 0 if private else federation.settings.needed


def _ask(
    federation: Federation,
    state: ServerState,
    attempt: int,
    stays: Sequence[Stay],
    watch: Stopwatch,
    ledger: Ledger,
) -> tuple[Sent, Sequence[Stay]]:
    """Send the plans of a round to a cohort; ``stays`` are those of the attempts so far."""
    round_ = state.round + 1
    with watch.phase("plan"):
        cohort = _cohort(federation, round_, attempt, ledger)
        plans = [plan_for(federation, state, site) for site in cohort]
        asked = list(zip(cohort, plans, strict=True))
        if federation.clock is not None:
            settings = federation.settings
            asked, stays = _in_time(federation.clock, settings, asked, stays, ledger)
    if federation.privacy is not None:
        federation.privacy.spend(round_, cohort)
    with watch.phase("train"):
        # Below quorum nothing would come of the training.
        enough = len(asked) >= _needed(federation)
        return Sent(cohort, _send(federation, asked, ledger) if enough else {}), stays


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


def _compared(
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
        ids = ask_to_evaluate(federation.grid, round_, contents, nodes)
        found: dict[str, tuple[Tensor, Tensor, int]] = {}
        for reply in replies(federation.grid, ids, federation.patience_s, federation.stop):
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
    """Send the plans, take what comes back until all have answered or nobody waits any longer."""
    return list(_received(federation, Sent([], _send(federation, asked, ledger)), ledger))


def _send(federation: Federation, asked: Sequence[Asked], ledger: Ledger) -> dict[str, Asked]:
    """Send the plans; the sites, and their plans as they read them, by the id of the message."""
    encoder = codec.Encoder(federation.task, federation.wire)
    groups = grouped([plan for _, plan in asked], federation.cohort)
    jobs: list[list[Message]] = []
    for group in groups:
        contents = [encoder.train(asked[i][1]) for i in group]
        ledger.down += sum(codec.content_bytes(content) for content in contents)
        nodes = [federation.roster.node_of(asked[i][0]) for i in group]
        jobs.append(messages(MessageType.TRAIN, asked[0][1].round, contents, nodes))
    ids = federation.grid.push_jobs(jobs)
    starts = {id(plan.start): plan.start for _, plan in asked}
    read = {key: codec.on_the_wire(start, federation.wire) for key, start in starts.items()}
    plans = [(site, replace(plan, start=read[id(plan.start)])) for site, plan in asked]
    order = itertools.chain.from_iterable(groups)
    return {id_: plans[i] for id_, i in zip(ids, order, strict=True)}


def _received(
    federation: Federation, sent: Sent, ledger: Ledger
) -> Generator[ClientUpdate, None, None]:
    """The usable replies of a cohort, in the order in which it was asked.

    A reply waits for those that were asked for before it, so that the order of arrival decides
    nothing. Passes are worked on in about the same order, so that few replies wait.
    """
    open_ = dict(sent.asked)
    order = deque(open_)
    arrived: dict[str, ClientUpdate | None] = {}
    for reply in replies(federation.grid, order, federation.patience_s, federation.stop):
        id_ = reply.metadata.reply_to_message_id
        arrived[id_] = _accept(federation, reply, *open_.pop(id_), ledger)
        while order and order[0] in arrived:
            if (update := arrived.pop(order.popleft())) is not None:
                yield update
    for site, plan in open_.values():
        ledger.failed(plan.round, site.name, "timeout", "no answer before the deadline")
    late = (arrived.get(id_) for id_ in order)
    yield from (update for update in late if update is not None)


def _accept(
    federation: Federation, reply: Message, site: Site, plan: TrainPlan, ledger: Ledger
) -> ClientUpdate | None:
    if reply.has_error():
        why = reply.error.reason or ""
        word = why.split(":")[0] if reply.error.code == REPLY_REFUSED else "error"
        ledger.failed(plan.round, site.name, word, why)
        return None
    try:
        update = validate(reply.content, plan, site, federation.limits)
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


def _evaluation_due(settings: RoundsSpec, round_: int) -> bool:
    return round_ % settings.evaluate_every == 0 or round_ == settings.count
