"""What SCAFFOLD and FedDyn share: a record of gradients at the server, entry by entry of the adapter.

Every client counts as one of N, whatever its number of examples, as in both papers: their objective
is the mean of the clients' own. What a client does not hold (blocks that it leaves out, ranks beyond
its own) its loss does not depend on: its gradient there is zero, and it still counts as one of N.

Ranks. A client of rank r trains at scale ``s_r``, with the ratio ``s_r / s`` folded into B: its
``B_r = B[:, :r] s / s_r``. A gradient with respect to B_r is that with respect to B times ``s_r / s``;
records of gradients are translated so on the way down, and back on the way up. A's stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedft.core.parts import ALL_PARTS, part_of
from fedft.core.types import Adapter, ClientUpdate, TrainPlan, module_of
from fedft.strategies.base import Strategy

Record = Mapping[str, Tensor]
"""PEFT name → tensor."""


def check_inner(name: str, inner: Strategy) -> None:
    """Refuse rules over which a record of gradients means nothing.

    Raises:
        ValueError: ``inner`` re-draws tensors, keeps parts at the clients, or is asynchronous.
    """
    if inner.buffer_size is not None:
        raise ValueError(
            f"{name} goes over a rule of rounds: {inner.label} takes replies to older models"
        )
    if inner.personal:
        kept = ", ".join(sorted(inner.personal))
        raise ValueError(
            f"{name} needs all that trains at the server, and {inner.label} keeps {kept}"
        )
    if inner.prunes:
        raise ValueError(
            f"{name} keeps gradients at each client's rank, and {inner.label} changes the ranks; set "
            "its gamma = 1"
        )
    if inner.comparable != ALL_PARTS:
        raise ValueError(
            f"{name} keeps gradients entry by entry, and {inner.label} writes the entries anew every "
            "round; choose a rule that does not, such as fedavg-lora, lora-fair or hetlora"
        )


def alike(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The updates, each with the same weight."""
    return [replace(u, examples=1) for u in updates]


_SENT: WeakKeyDictionary[Adapter, dict[int, tuple[object, Record]]] = WeakKeyDictionary()
"""Clients of one start get one object, which the wire codec then encodes once."""


def sent_down(record: Record, slots: object, plan: TrainPlan, whole: Adapter) -> Record:
    """What a client is sent of a record of gradients at the server: of what it holds, at its rank.

    Args:
        record: of the server, float64, at the rank of ``whole``; what is not in it is zero.
        slots: that it is of; the same object for all clients of a round.
        plan: of the client.
        whole: the server's adapter.
    """
    known = _SENT.setdefault(plan.start, {})
    key = hash(frozenset(plan.train))
    if key not in known or known[key][0] is not slots:
        shapes = {n: t for n, t in plan.start.tensors().items() if plan.trains(n)}
        known[key] = (
            slots,
            {
                name: _shared(record[name], like) * _ratio(name, plan.start, whole)
                if name in record
                else torch.zeros_like(like)
                for name, like in shapes.items()
            },
        )
    return known[key][1]


def _shared(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(slice(size) for size in like.shape)].to(like.dtype).contiguous()


def _ratio(name: str, own: Adapter, whole: Adapter) -> float:
    if part_of(name) != "B" or module_of(name) not in own.factors:
        return 1.0
    module = module_of(name)
    return own.factors[module].scale / whole.factors[module].scale


def added(total: Record, record: Record, own: Adapter, whole: Adapter, share: float) -> Record:
    """A server's record with ``share`` times a client's, translated from its rank. float64

    Args:
        total: of the server; what is not in it is zero.
        record: of the client.
        own: what the client started from.
        whole: the server's adapter.
        share: of the client.
    """
    like, sum_ = whole.tensors(), dict(total)
    for name, tensor in record.items():
        old = sum_.get(name)
        new = torch.zeros(like[name].shape, dtype=torch.float64) if old is None else old.clone()
        here = tuple(slice(size) for size in tensor.shape)
        new[here] += tensor.double() * (share / _ratio(name, own, whole))
        sum_[name] = new
    return sum_
