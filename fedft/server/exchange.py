"""One round's plans, made and sent. What comes back is :mod:`fedft.server.collect`'s business.

Whatever goes wrong with one real client, in planning, sending or checking, costs it its place.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from fedft.core.errors import UpdateRejected
from fedft.core.types import ServerState, Site, TrainPlan
from fedft.core.wire import codec
from fedft.server.federation import Asked, Federation, Ledger
from fedft.server.grids.serve import describe
from fedft.server.messages import messages
from fedft.server.pruning import narrowed
from fedft.server.validation import PLAN_FAILED
from fedft.strategies.beside import check_beside
from fedft.strategies.blame import blamed

logger = logging.getLogger(__name__)


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
    with blamed(federation.strategy, f"planning round {state.round + 1}"):
        plan = federation.strategy.plan(state, site).without(federation.frozen)
    if federation.pruning is not None:
        plan = narrowed(plan, federation.pruning.layers(state, site))
    training = federation.training.overlaid(plan.training)
    asked = {term.kind for term in plan.terms}
    terms = (*plan.terms, *(term for term in federation.terms if term.kind not in asked))
    check_beside(federation.strategy, terms, dp_sgd=training.dp_noise > 0)
    facts = {"round": state.round + 1, "site": site.name, "seed": federation.seed}
    return replace(plan, training=training, terms=terms, **facts)


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
