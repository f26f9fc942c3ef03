"""How alike the blocks of the model are, asked of the sites of a round where pruning goes by it."""

from dataclasses import replace

from torch import Tensor

from fedft.core.errors import QuorumFailure
from fedft.core.types import EvalPlan, ServerState
from fedft.core.wire import codec
from fedft.server.exchange import site_errors
from fedft.server.federation import Federation, Ledger, Stopwatch
from fedft.server.messages import ask_to_evaluate, replies
from fedft.server.pruning import Pruning
from fedft.server.validation import CHECK_FAILED, comparison

_PROBED = 64
"""Rows on which a site compares the model's blocks, at most."""


def compared(
    federation: Federation, state: ServerState, watch: Stopwatch, ledger: Ledger
) -> ServerState:
    """``state`` with how alike the model's blocks are, where that is due; the cohort is asked."""
    pruning = federation.pruning
    if pruning is None or not pruning.due(state):
        return state
    with watch.phase("compare"):
        for attempt in range(federation.settings.retries + 1):
            answers = _comparisons(federation, pruning, state, attempt, ledger)
            if answers:
                return pruning.learned(state, answers)
    raise QuorumFailure(
        f"round {state.round + 1}: no client could compare the model's blocks, after "
        f"{federation.settings.retries + 1} attempts",
        fix='Choose them without: [pruning] selection = "stride".',
    )


def _comparisons(
    federation: Federation, pruning: Pruning, state: ServerState, attempt: int, ledger: Ledger
) -> list[tuple[Tensor, Tensor, int]]:
    """What a cohort says of the model's blocks, in its order."""
    round_ = state.round + 1
    cohort = federation.roster.sample(
        federation.seed, round_, attempt, federation.settings.per_round
    )
    encoder = codec.Encoder(federation.task, federation.compressor)
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
    patience = federation.patience_s(
        (_PROBED * (pruning.count + 1), codec.content_bytes(content)) for content in contents
    )
    names = dict(zip(ids, (site.name for site in cohort), strict=True))
    watched = federation.waits(f"the comparison before round {round_}", names)
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    silent = dict(names)
    for reply in replies(federation.grid, ids, patience, federation.stop, watched):
        id_ = reply.metadata.reply_to_message_id
        site, why = silent.pop(id_), "what it says of the blocks cannot be used"
        answer = None
        if reply.has_error():
            why = reply.error.reason or ""
        else:
            with site_errors(federation):
                answer = comparison(reply.content, pruning.count)
        if answer is None:
            code = reply.error.code if reply.has_error() else CHECK_FAILED
            ledger.failed(round_, site, "compare", why, code=code, kind="compare")
            continue
        ledger.up += codec.content_bytes(reply.content)
        found[id_] = answer
    for site in silent.values():
        ledger.failed(round_, site, "timeout", "no comparison before the deadline", kind="compare")
    return [found[id_] for id_ in ids if id_ in found]
