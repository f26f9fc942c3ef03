"""What a run will send, as far as it can be known before anything is trained.

The first round follows from shapes alone. What later rounds send is the rule's business: a base
change that grows with every round, a basis that travels once, factors by turns. So the rule itself
is tried, on one layer of each shape, and a forecast says whether more rounds are alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedft.core import seeds
from fedft.core.terms import entry
from fedft.core.types import Adapter, ClientUpdate, Delta, Site, TrainPlan
from fedft.core.wire import codec
from fedft.server.aggregation import aggregated
from fedft.server.config import RunConfig
from fedft.strategies.blame import blamed

TRIED = 3
"""Rounds that are compared with the first: enough for rules that alternate."""

MANY = 16
"""Clients of a tried round at most; more change how fast something grows, not whether it does."""


def shares(config: RunConfig) -> Mapping[int, float]:
    """Rank → the share of the clients that are expected to have it; they sum to one."""
    fleet = config.fleet
    hands = [(d.rank, d.share) for d in fleet.devices if d.rank is not None]
    hands = hands or [(rank, 1.0) for rank in fleet.rank_choices or (config.rank,)]
    total = sum(share for _, share in hands)
    found = dict.fromkeys(sorted(rank for rank, _ in hands), 0.0)
    for rank, share in hands:
        found[rank] += share / total
    return found


def counted(config: RunConfig) -> dict[str, int]:
    """Of how many clients a round counts the bytes, by way.

    Spares are asked, and nobody waits for their replies. A round of an asynchronous rule is one
    server update: what counts are the jobs that end in it, however many others are at work.
    """
    replies = config.strategy.buffer_size or config.rounds.per_round
    return {"up": replies, "down": replies + config.rounds.spares}


def varies(config: RunConfig, initial: Adapter, delta: Delta) -> bool:
    """Whether clients send or receive other numbers of bytes in later rounds than in the first.

    Args:
        config: resolved.
        initial: the adapter before the first round.
        delta: the change of the base weights by then, which a start such as PiSSA's makes.
    """
    ranks = list(shares(config))
    count = min(MANY, max(counted(config)["up"], len(ranks)))
    sites = [
        Site(f"client-{k:02}", 1, ranks[k % len(ranks)] if len(ranks) > 1 else None)
        for k in range(count)
    ]
    rule, modules = config.rule(), _one_of_each_shape(initial)
    with blamed(rule, "starting"):
        small = rule.init(Adapter({m: initial.factors[m] for m in modules}))
    small = replace(small, delta={m: delta[m] for m in modules if m in delta})
    if not modules:  # tensors that are carried whole, of one size for good
        return False
    first = None
    for round_ in range(min(TRIED, config.rounds.count - 1) + 1):
        with blamed(rule, f"planning round {round_ + 1}"):
            plans = [rule.plan(small, site).without(config.frozen) for site in sites]
        sent = [codec.plan_bytes(plan) for plan in plans]
        first = first or sent
        if sent != first:
            return True
        small = aggregated(rule, small, _replies(config.seed, round_, sites, plans))
    return False


def _one_of_each_shape(adapter: Adapter) -> list[str]:
    """The last adapted layer of each shape. The head is left out: it never changes its size."""
    return sorted({(f.A.shape, f.B.shape): m for m, f in adapter.factors.items()}.values())


def _replies(
    seed: int, round_: int, sites: Sequence[Site], plans: Sequence[TrainPlan]
) -> list[ClientUpdate]:
    """What clients might answer: every tensor that they send, moved at random."""

    def moved(site: Site, name: str, tensor: Tensor) -> Tensor:
        noise = seeds.torch_generator(seed, "traffic", round_, site.name, name)
        return tensor + 0.01 * torch.randn(tensor.shape, generator=noise)

    return [
        ClientUpdate(
            site.name,
            1,
            {n: moved(site, n, t) for n, t in plan.sent().items()},
            plan.start,
            records={
                record: {
                    n: moved(site, entry(record, n), torch.zeros(s)) for n, s in shapes.items()
                }
                for record, shapes in plan.schema("sends").items()
            },
        )
        for site, plan in zip(sites, plans, strict=True)
    ]
