"""What a round asks of the new model: the server's test set, submodels, and the sites' own rows.

An evaluation is asked for first and waited for later, so that the sites can begin the next round
while its last slices are scored.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import RecordDict

from fedft.core.errors import MismatchError, QuorumFailure
from fedft.core.metrics import PER_CLASS, Tally, unpacked
from fedft.core.record.lines import ByClass, ClientLine, Evaluated, Scores, with_reported
from fedft.core.sublayers import Layer
from fedft.core.tasks import Task
from fedft.core.types import EvalPlan, ServerState, Site
from fedft.core.wire import codec
from fedft.server.exchange import site_errors
from fedft.server.federation import Federation, Ledger
from fedft.server.messages import Courier, ask_to_evaluate, replies
from fedft.server.pruning import submodel

SHARDS = 8
"""Slices of the central test set. A constant, so that sums do not depend on the workers."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was asked of the model after a round, and is not answered yet.

    Attributes:
        federation: of which sites.
        state: whose model.
        cohort: the sites of the round that judge their own models.
        patience_s: seconds for which they are waited for; None is as long as it takes.
        whole: ids of the messages on the whole model, a slice of the test set each.
        submodels: the same of submodels, by their size; None where sites hold all of the model.
        sites: ids of the messages to the cohort, on each one's own rows; None where none are held out.
    """

    federation: Federation
    state: ServerState
    cohort: Sequence[Site]
    patience_s: float | None
    whole: Sequence[str]
    submodels: Mapping[int, Sequence[str]] | None
    sites: Sequence[str] | None

    def scores(self, ledger: Ledger) -> Evaluated:
        """Wait for the answers: the round's entries ``eval``, ``submodels`` and ``sites``.

        Raises:
            QuorumFailure: a slice of the test set was not evaluated.
            Interrupted: the run was asked to stop.
        """
        try:
            total = self.total()
            found: Evaluated = {"eval": self.federation.kind.scores(total)}
            if PER_CLASS in self.federation.kind.also:
                found["by_class"] = _by_class(total)
            if (submodels := self.submodels) is not None:
                found["submodels"] = {
                    str(k): self.federation.kind.scores(self._total(ids, f", submodels of {k}"))
                    for k, ids in submodels.items()
                }
            if self.sites is not None:
                found["sites"] = self._of_sites(self.sites, ledger)
        except BaseException:
            self._give_up()
            raise
        return found

    def _give_up(self) -> None:
        """Nobody waits for the rest: what was asked for later is under way all the same."""
        for ids in (self.submodels or {}).values():
            _scorer(self.federation).cancel(ids)
        self.federation.grid.cancel(self.sites or ())

    def total(self) -> Tally:
        """The sums over the server's test set.

        Raises:
            QuorumFailure, Interrupted: as :meth:`scores`.
        """
        return self._total(self.whole)

    def _total(self, ids: Sequence[str], of: str = "") -> Tally:
        """The sums over the slices of the test set; ``of`` says of what, beside the round."""
        watched = self.federation.scores(f"scoring after round {self.state.round}{of}", ids)
        tallies = self._tallies(_scorer(self.federation), ids, None, watched)
        if missing := sum(tally is None for tally in tallies):
            raise QuorumFailure(
                f"round {self.state.round}: {missing} of {len(tallies)} slices of the test set were "
                "not evaluated",
                fix="The last committed round stands, and this one is run again.",
            )
        total = Tally.total(t for t in tallies if t is not None)
        if not total.count:
            raise MismatchError(
                "nothing in the server's test set can be scored: no row has a token that takes a loss",
                fix="give test rows with prompts and answers, or raise data.max-length",
            )
        return total

    def _of_sites(self, ids: Sequence[str], ledger: Ledger) -> Scores:
        """Each site of the round judges its own model, or its part of it, on its held-out rows."""
        scores: list[Mapping[str, float]] = []
        federation = self.federation
        names = dict(zip(ids, (site.name for site in self.cohort), strict=True))
        watched = federation.waits(f"the evaluation of round {self.state.round}", names)
        tallies = self._tallies(federation.grid, ids, self.patience_s, watched)
        for site, tally in zip(self.cohort, tallies, strict=True):
            if tally is None or tally.count == 0:
                continue
            scores.append(federation.kind.scores(tally))
            line: ClientLine = {
                "kind": "eval",
                "round": self.state.round,
                "site": site.name,
                "examples": tally.count,
            }
            ledger.replies.append(with_reported(line, scores[-1]))
        if not scores:
            return {"n": 0}
        means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
        return {**means, "n": len(scores)}

    def _tallies(
        self,
        grid: Courier,
        ids: Sequence[str],
        patience_s: float | None,
        watched: Callable[[Collection[str], float], None] = lambda missing, closes: None,
    ) -> list[Tally | None]:
        """The sums behind the replies, in the order of the messages; None where there was none."""
        tallies: dict[str, Tally] = {}
        task, classes = self.federation.kind, self.federation.classes
        for reply in replies(grid, ids, patience_s, self.federation.stop, watched):
            tally = None if reply.has_error() else tally_of(reply.content, task, classes)
            if tally is not None:
                tallies[reply.metadata.reply_to_message_id] = tally
        return [tallies.get(id_) for id_ in ids]


def asked(federation: Federation, state: ServerState, cohort: Sequence[Site]) -> Evaluation:
    """Ask for all that is to be known of the model after a round.

    Args:
        federation: of which sites.
        state: after the round.
        cohort: the sites of the round.
    """
    whole, submodels, sites = _ask_central(federation, state), None, None
    if (pruning := federation.pruning) is not None:
        typical = {k: pruning.typical(state, k) for k in pruning.sizes}
        submodels = {k: _ask_central(federation, state, held) for k, held in typical.items()}
    patience_s = None
    if federation.holdout:
        cohort, sites, patience_s = _ask_sites(federation, state, cohort)
    return Evaluation(federation, state, cohort, patience_s, whole, submodels, sites)


def _by_class(tally: Tally) -> ByClass:
    counts, matrix = PER_CLASS.counts(tally), PER_CLASS.matrix(tally)
    found: ByClass = {
        "hits": counts.hits.tolist(),
        "support": counts.right.tolist(),
        "predicted": counts.predicted.tolist(),
    }
    return found if matrix is None else {**found, "confusion": matrix}


def before(federation: Federation, state: ServerState) -> Scores:
    """The scores of a model on the central test set, apart from any round.

    Raises:
        QuorumFailure, Interrupted: as :meth:`Evaluation.scores`.
    """
    whole = _ask_central(federation, state)
    asked = Evaluation(federation, state, (), None, whole, None, None)
    return federation.kind.scores(asked.total())


def _scorer(federation: Federation) -> Courier:
    return federation.evaluator or federation.grid


def _ask_central(
    federation: Federation, state: ServerState, layers: tuple[Layer, ...] | None = None
) -> list[str]:
    """Have the model scored on the central test set; any node can hold a slice of it.

    ``layers`` are those of a submodel to score in its place; None is all of them.
    """
    encoder = codec.Encoder(federation.task, federation.compressor)
    whole = submodel(EvalPlan(state.adapter, state.delta, round=state.round), layers)
    # What is scored from all rows at once is scored in one place.
    count = 1 if federation.kind.together else SHARDS
    plans = [replace(whole, shard=(shard, count)) for shard in range(count)]
    nodes = [1 + shard % federation.settings.per_round for shard in range(count)]
    contents = [encoder.evaluate(plan) for plan in plans]
    return ask_to_evaluate(_scorer(federation), state.round, contents, nodes)


def _ask_sites(
    federation: Federation, state: ServerState, cohort: Sequence[Site]
) -> tuple[Sequence[Site], list[str], float | None]:
    """Have each site of the round judge its own model, or its part of it, on its held-out rows.

    Returns:
        The sites that were asked, the ids of the messages, and the seconds to wait for them.
    """
    encoder = codec.Encoder(federation.task, federation.compressor)
    own = EvalPlan(
        state.adapter,
        state.delta,
        split="holdout",
        keep=federation.strategy.personal,
        round=state.round,
    )
    pruning = federation.pruning
    asked: list[tuple[Site, RecordDict, int]] = []
    for site in cohort:
        with site_errors(federation):
            part = submodel(own, None if pruning is None else pruning.layers(state, site))
            content = encoder.evaluate(replace(part, site=site.name))
            asked.append((site, content, federation.roster.node_of(site)))
    sites = [site for site, _, _ in asked]
    contents, nodes = [c for _, c, _ in asked], [node for _, _, node in asked]
    ids = ask_to_evaluate(federation.grid, state.round, contents, nodes)
    work = [(site.examples, codec.content_bytes(content)) for site, content, _ in asked]
    return sites, ids, federation.patience_s(work)


def tally_of(content: RecordDict, task: Task, classes: int) -> Tally | None:
    """The sums in a reply; None where it holds none that can be used.

    Args:
        content: of the reply.
        task: which says what is summed.
        classes: number of classes.
    """
    metrics: Any = content.metric_records.get("metrics", {})
    tally = unpacked(metrics, task.sums, classes)
    if tally is None or not tally.count:
        return tally
    widths = {name: width(classes) for name, width in task.gathers.items()}
    try:
        return replace(tally, columns=codec.columns_from(content, widths, tally.count))
    except ValueError:
        return None
