"""One round's plans on their way to the sites, and their replies on the way back.

A reply waits for those that were asked for before it, so that the order of arrival decides nothing.
Whatever goes wrong with one real client, in planning, sending or checking, costs it its place.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from fedft.core.errors import UpdateRejected
from fedft.core.record.lines import ClientLine, with_reported
from fedft.core.types import ClientUpdate, ServerState, Site, TrainPlan
from fedft.core.wire import codec
from fedft.server.clock import examples
from fedft.server.federation import Asked, Federation, Ledger
from fedft.server.grids.serve import describe
from fedft.server.messages import messages, replies
from fedft.server.pruning import narrowed
from fedft.server.validation import CHECK_FAILED, PLAN_FAILED, REPLY_REFUSED, validate
from fedft.strategies.beside import check_beside

logger = logging.getLogger(__name__)

_WORDS = {PLAN_FAILED: "plan"}
"""Reasons of failures that a grid found, by their code; those that a client found are errors."""


@dataclass(frozen=True, eq=False)
class Sent:
    """A cohort that was sent its plans.

    Attributes:
        cohort: all of it.
        asked: the sites that are to answer, and their plans as they read them, by the id of the
            message to each; in the order in which they are worked on.
        what: was asked, for whoever watches.
    """

    cohort: Sequence[Site]
    asked: Mapping[str, Asked]
    what: str = ""


@contextmanager
def site_errors(
    federation: Federation, lost: Callable[[str], None] = lambda why: None
) -> Iterator[None]:
    """Whatever goes wrong inside is about one site, and costs a real client its place.

    Args:
        federation: of real clients, or of simulated ones, where the exception goes on.
        lost: is told what went wrong.
    """
    try:
        yield
    except UpdateRejected:
        raise
    except Exception as error:
        if not federation.real:
            raise
        logger.debug("a client cost itself its place", exc_info=error)
        lost(describe(error))


def planned(cohort: Sequence[Site], ledger: Ledger) -> list[Site]:
    """The sites of a cohort for which plans could be made."""
    return [site for site in cohort if site.name not in ledger.unplanned]


def unplanned(ledger: Ledger, round_: int, site: Site, why: str) -> None:
    """Note a site for which no plan could be made, or not be sent."""
    ledger.unplanned.add(site.name)
    ledger.failed(round_, site.name, "plan", why, code=PLAN_FAILED)


def plan_for(federation: Federation, state: ServerState, site: Site) -> TrainPlan:
    """The rule's plan for a site, with the facts of the round."""
    plan = federation.strategy.plan(state, site).without(federation.frozen)
    if federation.pruning is not None:
        plan = narrowed(plan, federation.pruning.layers(state, site))
    training = federation.training.overlaid(plan.training)
    asked = {term.kind for term in plan.terms}
    terms = (*plan.terms, *(term for term in federation.terms if term.kind not in asked))
    check_beside(federation.strategy, terms, dp_sgd=training.dp_noise > 0)
    facts = {"round": state.round + 1, "site": site.name, "seed": federation.seed}
    return replace(plan, training=training, terms=terms, **facts)


def train(federation: Federation, asked: Sequence[Asked], ledger: Ledger) -> list[ClientUpdate]:
    """Send the plans, take what comes back until all have answered or nobody waits any longer."""
    return list(received(federation, Sent([], send(federation, asked, ledger)), ledger))


def send(federation: Federation, asked: Sequence[Asked], ledger: Ledger) -> dict[str, Asked]:
    """Send the plans; the sites, and their plans as they read them, by the id of the message."""
    encoder = codec.Encoder(federation.task, federation.compressor)
    made: dict[int, tuple[RecordDict, int]] = {}
    for i, (site, plan) in enumerate(asked):
        with site_errors(federation, partial(unplanned, ledger, plan.round, site)):
            made[i] = encoder.train(plan), federation.roster.node_of(site)
    together = grouped([plan for _, plan in asked], federation.cohort)
    groups = [here for group in together if (here := [i for i in group if i in made])]
    ledger.down += sum(codec.content_bytes(content) for content, _ in made.values())
    jobs: list[list[Message]] = []
    for group in groups:
        contents, nodes = zip(*(made[i] for i in group), strict=True)
        jobs.append(messages(MessageType.TRAIN, asked[0][1].round, contents, nodes))
    ids = federation.grid.push_jobs(jobs)
    starts = {id(plan.start): plan.start for _, plan in asked}
    read = {key: codec.on_the_wire(start, federation.compressor) for key, start in starts.items()}
    plans = [(site, replace(plan, start=read[id(plan.start)])) for site, plan in asked]
    order = itertools.chain.from_iterable(groups)
    return {id_: plans[i] for id_, i in zip(ids, order, strict=True)}


def received(
    federation: Federation, sent: Sent, ledger: Ledger
) -> Generator[ClientUpdate, None, None]:
    """The usable replies of a cohort, in the order in which it was asked.

    A reply waits for those that were asked for before it, so that the order of arrival decides
    nothing. Passes are worked on in about the same order, so that few replies wait.
    """
    open_ = dict(sent.asked)
    order = deque(open_)
    arrived: dict[str, ClientUpdate | None] = {}
    patience = federation.patience_s(_work(federation, *one) for one in open_.values())
    watched = federation.waits(sent.what, {id_: site.name for id_, (site, _) in open_.items()})
    for reply in replies(federation.grid, order, patience, federation.stop, watched):
        id_ = reply.metadata.reply_to_message_id
        arrived[id_] = _accept(federation, reply, *open_.pop(id_), ledger)
        while order and order[0] in arrived:
            if (update := arrived.pop(order.popleft())) is not None:
                yield update
    for site, plan in open_.values():
        ledger.failed(plan.round, site.name, "timeout", "no answer before the deadline")
    late = (arrived.get(id_) for id_ in order)
    yield from (update for update in late if update is not None)


def _work(federation: Federation, site: Site, plan: TrainPlan) -> tuple[int, int]:
    """What a plan takes of a site: examples, passes counted, and bytes in both directions."""
    passes = examples(plan.training, site.examples)
    return passes, sum(codec.plan_bytes(plan, federation.compressor))


def _accept(
    federation: Federation, reply: Message, site: Site, plan: TrainPlan, ledger: Ledger
) -> ClientUpdate | None:
    if reply.has_error():
        why, code = reply.error.reason or "", reply.error.code
        word = why.split(":")[0] if code == REPLY_REFUSED else _WORDS.get(code, "error")
        ledger.failed(plan.round, site.name, word, why, code=code)
        return None
    update: ClientUpdate | None = None
    id_, refused = reply.metadata.reply_to_message_id, partial(_refused, federation, ledger, plan)
    try:
        with site_errors(federation, partial(refused, id_, "check", code=CHECK_FAILED)):
            update = validate(reply.content, plan, site, federation.limits, federation.compressor)
    except UpdateRejected as rejected:
        refused(id_, rejected.reason, rejected.what)
    if update is None:
        return None
    size = codec.content_bytes(reply.content)
    ledger.up += size
    line: ClientLine = {
        "kind": "train",
        "round": plan.round,
        "site": site.name,
        "status": "ok",
        "examples": update.examples,
        "rank": update.start.rank,
        "bytes_up": size,
        **ledger.timing(site.name),
    }
    ledger.replies.append(with_reported(line, update.metrics))
    return update


def _refused(
    federation: Federation,
    ledger: Ledger,
    plan: TrainPlan,
    id_: str,
    reason: str,
    why: str,
    *,
    code: int | None = None,
) -> None:
    """Note a reply that cannot be used, and tell its site: it would keep it for a next attempt."""
    ledger.failed(plan.round, plan.site, reason, why, code=code)
    federation.grid.refuse(id_, f"{reason}: {why}")


def grouped(plans: Sequence[TrainPlan], size: int) -> list[list[int]]:
    """Positions of plans that are trained in one pass: a function of the plans alone.

    Sites with the same parts, layers, terms and base delta share a pass; passes are of equal size, as far
    as that goes, and at most ``size``.
    """
    kinds: dict[Any, list[int]] = {}
    for index, plan in enumerate(plans):
        parts = (plan.train, plan.send, plan.keep, plan.layers, plan.terms)
        key = (*parts, id(plan.delta) if plan.delta else 0)
        kinds.setdefault(key, []).append(index)
    groups: list[list[int]] = []
    for members in kinds.values():
        passes = -(-len(members) // size)
        bounds = [len(members) * i // passes for i in range(passes + 1)]
        groups += [members[a:b] for a, b in itertools.pairwise(bounds)]
    return groups
