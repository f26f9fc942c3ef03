"""Replies as they are: each is checked by itself, and the server sees every one.

A reply waits for those that were asked for before it, so that the order of arrival decides nothing.
"""

from collections import deque
from collections.abc import Generator, Sequence
from functools import partial
from typing import ClassVar, Literal

from flwr.app import Message

from fedft.core.errors import UpdateRejected
from fedft.core.record.lines import ClientLine, with_reported
from fedft.core.types import ClientUpdate, Site, TrainPlan
from fedft.core.wire import codec
from fedft.server.clock import examples
from fedft.server.exchange import Sent, send, site_errors
from fedft.server.federation import Asked, Federation, Ledger
from fedft.server.messages import replies
from fedft.server.replies import Intake
from fedft.server.validation import CHECK_FAILED, PLAN_FAILED, REPLY_REFUSED, validate

_WORDS = {PLAN_FAILED: "plan"}
"""Reasons of failures that a grid found, by their code; those that a client found are errors."""


def train(federation: Federation, asked: Sequence[Asked], ledger: Ledger) -> list[ClientUpdate]:
    """Send the plans, take what comes back until all have answered or nobody waits any longer."""
    return list(received(federation, Sent([], send(federation, asked, ledger)), ledger))


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


class Plain:
    """See :class:`~fedft.server.collect.base.Collector`."""

    sees: ClassVar[Literal["each", "sum"]] = "each"

    def collect(self, federation: Federation, sent: Sent, ledger: Ledger) -> Intake:
        """One exchange: the replies to the plans."""
        intake = Intake(federation.strategy, federation.kinds)
        return intake.add(received(federation, sent, ledger))
