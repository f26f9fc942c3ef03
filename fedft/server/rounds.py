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

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedft.core.errors import FedftError, QuorumFailure
from fedft.core.record.lines import Accounts, Facts, RoundLine, with_figures
from fedft.core.types import ServerState, Site, TrainPlan
from fedft.server import evaluation
from fedft.server.aggregation import aggregated
from fedft.server.clock import SimulatedClock, Stay, at_time, check_reachable, elapsed
from fedft.server.collect import collector_of
from fedft.server.comparing import compared
from fedft.server.evaluation import Evaluation
from fedft.server.exchange import Sent, plan_for, planned, send, site_errors, unplanned
from fedft.server.federation import Account, Asked, Completed, Federation, Ledger, Stopwatch
from fedft.server.replies import Intake
from fedft.server.tables import RoundsSpec


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
    facts: Facts
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
        record: RoundLine = {
            "round": after.round,
            "cohort": [site.name for site in self.cohort],
            "failures": ledger.failures,
            **self.facts,
            "train": {"loss": self.intake.folded.loss},
            "bytes": {"up": ledger.up, "down": ledger.down},
            "seconds": self.watch.seconds,  # goes on counting
        }
        with self.watch.phase("aggregate"):
            record = with_figures(record, self._measured())
        record = {**record, **self._accounts()}
        if self.evaluation is not None:
            with self.watch.phase("evaluate"):
                record = {**record, **self.evaluation.scores(ledger)}
        return Completed(after, record, ledger.replies)

    def _measured(self) -> Mapping[str, object]:
        """The meters, and what pruning has to say."""
        federation = self.federation
        sites = planned(self.cohort, self.ledger)
        following = _next_starts(federation, self.after, sites)
        measured = self.intake.panel.line(
            self.before,
            self.intake.folded,
            self.after,
            following=following,
            evaluated=self.evaluation is not None,
        )
        if federation.pruning is not None:
            measured["pruning"] = federation.pruning.facts(self.before, sites)
        return measured

    def _accounts(self) -> Accounts:
        """What the round cost, in privacy and in simulated time, where these are kept."""
        federation, ledger = self.federation, self.ledger
        accounts: Accounts = {}
        if federation.privacy is not None:
            _add_spent(federation.privacy, ledger)
            if self.evaluation is not None:
                accounts["privacy"] = federation.privacy.guarantee()
        if federation.clock is not None:
            accounts["clock"] = {
                "seconds": ledger.now - elapsed(self.before),
                "elapsed": ledger.now,
                "device_seconds": ledger.spent,
            }
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
    state = compared(federation, state, watch, ledger)
    sent, stays = _ask(federation, state, 0, (), watch, ledger)
    return Opening(state, sent, stays, watch, ledger)


def answered(federation: Federation, opening: Opening) -> Closing:
    """Take in what the sites of a round answer, aggregate, and have the model evaluated."""
    intake, cohort, attempts = _gather(federation, opening)
    facts: Facts = {"attempts": attempts}
    state, watch, ledger = opening.state, opening.watch, opening.ledger
    return concluded(federation, state, intake, cohort, watch, ledger, facts)


def concluded(
    federation: Federation,
    state: ServerState,
    intake: Intake,
    cohort: Sequence[Site],
    watch: Stopwatch,
    ledger: Ledger,
    facts: Facts,
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
        after = aggregated(federation.strategy, state, intake.replies(state.adapter))
        if federation.clock is not None:
            after = at_time(after, ledger.now)
    asked: Evaluation | None = None
    if _evaluation_due(federation.settings, after.round):
        with watch.phase("evaluate"):
            asked = evaluation.asked(federation, after, planned(cohort, ledger))
    return Closing(federation, state, after, intake, cohort, facts, asked, watch, ledger)


def _next_starts(
    federation: Federation, after: ServerState, cohort: Sequence[Site]
) -> dict[str, TrainPlan] | None:
    """What the sites of a round would start the next one from; only mixed ranks need it told."""
    if len({site.rank for site in cohort}) < 2:
        return None
    plans: dict[str, TrainPlan] = {}
    for site in cohort:
        with site_errors(federation):
            plans[site.name] = plan_for(federation, after, site)
    return plans


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
    collector = collector_of(federation)
    intake = Intake(federation.strategy, federation.kinds)
    for attempt in range(settings.retries + 1):
        if attempt > 0:
            failed = sent
            sent, stays = _ask(federation, state, attempt, stays, watch, ledger)
            if federation.real:
                _forget(federation, failed, {site.name for site, _ in sent.asked.values()})
        with watch.phase("train"):
            intake = collector.collect(federation, sent, ledger)
        if len(intake) >= _needed(federation):
            return intake, sent.cohort, attempt + 1
        if not federation.real:
            _forget(federation, sent)
    if federation.clock is not None and settings.deadline_s is not None:
        check_reachable(stays, settings.deadline_s)
    reasons = ", ".join(f"{len(sites)} {reason}" for reason, sites in ledger.failures.items())
    first = next((r["reason"] for r in ledger.replies if "reason" in r), "")
    raise QuorumFailure(
        f"round {state.round + 1}: {len(intake)} usable replies of {settings.per_round}, "
        f"{_needed(federation)} needed, after {settings.retries + 1} attempts ({reasons}; the "
        f"first: {first})",
        fix="The model is as it was after the last completed round.",
    )


def _forget(federation: Federation, failed: Sent, again: Collection[str] = ()) -> None:
    """Tell the clients of an attempt that failed that it did not count: what it left there neither.

    Args:
        federation: as it is.
        failed: the attempt.
        again: names of real clients that are asked again. They give the result that they have, and
            what they keep is that of the same round.
    """
    for id_, (site, _) in failed.asked.items():
        if site.name not in again:
            federation.grid.refuse(id_, "too few others answered: this attempt does not count")


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
        asked: list[Asked] = []
        for site in cohort:
            with site_errors(federation, partial(unplanned, ledger, round_, site)):
                asked.append((site, plan_for(federation, state, site)))
        if federation.clock is not None:
            settings = federation.settings
            asked, stays = _in_time(federation.clock, settings, asked, stays, ledger)
    if federation.privacy is not None:
        federation.privacy.spend(round_, planned(cohort, ledger))
    again = f", attempt {attempt + 1} of {federation.settings.retries + 1}" if attempt else ""
    with watch.phase("train"):
        # Below quorum nothing would come of the training.
        enough = len(asked) >= _needed(federation)
        sent = send(federation, asked, ledger) if enough else {}
        return Sent(cohort, sent, f"round {round_}{again}"), stays


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


def _evaluation_due(settings: RoundsSpec, round_: int) -> bool:
    return round_ % settings.evaluate_every == 0 or round_ == settings.count
