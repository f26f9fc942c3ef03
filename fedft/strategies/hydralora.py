"""HydraLoRA, federated: one A for all, several B, a router that weighs them for every token.

    Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
    NeurIPS 2024, arXiv:2404.19245.
    Wang et al., "FedLEASE", NeurIPS 2025, arXiv:2509.15087: groups by silhouette.

    y = W x + s sum_i w_i(x) B_i A x        w(x) = softmax(W_g x)        i = 1 … N

State: experimental, as the first paper trains in one place.

Departures from the paper: it does not federate the method. There are three ways to, by ``mode``.

``clustered`` (default). Each site belongs to one of at most N clusters and trains A, the head of
its cluster, its own router and the task head, beside the other clusters' heads, which are frozen:

    A <- sum_k p_k A_k        B_c <- sum_{k in c} q_k (B_c + dB_k)        q_k = n_k / sum_{j in c} n_j

The router never leaves its site. In its first round a site has no cluster: it starts with the mean
of the heads in the place of each of them, so that the router has no say, and trains the first one;
what it changes there says where it belongs. The first round's changes are grouped (average
linkage on 1 - mean_layers cos(dB_i, dB_j), the number of groups by silhouette); a site that comes
later joins the cluster with the largest cos(dB_k, B_c - mean_i B_i). Every ``recluster-every``
rounds the heads of the sites at hand are grouped anew, and the groups take the places of the
heads they resemble most.

``global``. Everything is averaged. The heads of each site are matched with those that were sent, layer
by layer, by the Hungarian method on cos(B_i, B_j), before they are averaged with their routers' rows.

``private``. A is averaged; the heads and the router of a site stay there. With one head this is
FedSA-LoRA.

Averaging heads is exact for a common A and given gates; averaging A with B is not, as in
FedAvg-LoRA, and averaging routers never is: the softmax is not linear. ``freeze-a`` keeps A as the
seed made it.

Wire, with a = sum_modules r d_in, b = sum_modules r d_out, g = sum_modules N d_in (0 for N = 1):
``global`` a + N b + g each way, ``clustered`` a + N b down and a + b up, ``private`` a each way; plus
the task head both ways. ``freeze-a`` takes a away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedft.core.adapters import hydra
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Part,
    ServerState,
    Site,
    TrainPlan,
    factor_name,
    head_name,
    part_of,
)
from fedft.strategies import grouping
from fedft.strategies.base import Strategy, mean_of, weighted_sum, weights

MEMBERS = "members"
"""Slot with a row for each site that has a cluster: (its name's hash, the cluster). [n, 2] int64"""


class HydraLoRA(Strategy):
    """Share A; share, cluster or keep the heads; share or keep the router.

    Attributes:
        mode: see above.
        recluster_every: rounds between two groupings, of ``clustered``.
        least_silhouette: mean silhouette below which all sites are one cluster.
        freeze_a: train the heads, the router and the task head only.
        head: whether the task head is averaged or stays at the sites.
    """

    name: str = "hydralora"
    mode: Literal["clustered", "global", "private"] = "clustered"
    recluster_every: PositiveInt = 5
    least_silhouette: Annotated[float, Field(ge=-1, le=1)] = 0.1
    freeze_a: bool = False
    head: Literal["shared", "local"] = "shared"

    def supports(self, method: str) -> bool:
        return method == "hydralora"

    @property
    def personal(self) -> frozenset[Part]:
        own: dict[str, frozenset[Part]] = {
            "global": frozenset(),
            "clustered": frozenset({"router"}),
            "private": frozenset({"B", "router"}),
        }
        task: frozenset[Part] = frozenset({"head"} if self.head == "local" else set())
        return own[self.mode] | task

    @property
    def comparable(self) -> frozenset[Part]:
        everything: frozenset[Part] = frozenset({"A", "B", "router", "head"})
        return everything if self.mode == "global" else frozenset({"A", "head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        learned: frozenset[Part] = frozenset({"A", "B", "router", "head"})
        if self.freeze_a:
            learned -= {"A"}
        shared = learned - self.personal
        whole = TrainPlan(
            start=state.adapter,
            delta=state.delta,
            receive=shared,
            train=learned,
            send=shared,
            keep=self.personal,
        )
        if self.mode != "clustered":
            return whole
        cluster = _members(state).get(_key(site.name))
        if cluster is not None:
            return replace(whole, heads=(cluster,))
        return replace(
            whole, start=_levelled(state.adapter), train=learned - {"router"}, heads=(0,)
        )

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        if self.mode == "clustered":
            return self._clustered(state, updates)
        if self.mode == "global":
            updates = [_matched(u, state.adapter) for u in updates]
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)))

    def _clustered(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        members = _members(state)
        replies = [_Reply.of(u, members.get(_key(u.site))) for u in updates]
        present = _heads(state.adapter)
        if not members:
            places = self._groups([r.change for r in replies], len(present))
            bases = places
        else:
            bases = [_place(r, present, sorted({*members.values()})) for r in replies]
            due = (state.round - 1) % self.recluster_every == 0
            places = self._regrouped(replies, bases, present) if due else bases
        members |= {_key(u.site): place for u, place in zip(updates, places, strict=True)}
        shared = [replace(u, tensors=_without_heads(u.tensors)) for u in updates]
        heads = _folded(state.adapter, replies, bases, places)
        return replace(
            state,
            adapter=state.adapter.replaced({**mean_of(shared), **heads}),
            slots={**state.slots, MEMBERS: _table(members)},
        )

    def _groups(self, heads: Sequence[grouping.Heads], largest: int) -> list[int]:
        return [int(g) for g in grouping.agglomerated(heads, largest, self.least_silhouette)]

    def _regrouped(
        self, replies: "Sequence[_Reply]", bases: Sequence[int], present: Sequence[grouping.Heads]
    ) -> list[int]:
        """New clusters of the sites at hand, in the places of the heads that they resemble most."""
        trained = [
            [B + dB for B, dB in zip(present[base], r.change, strict=True)]
            for r, base in zip(replies, bases, strict=True)
        ]
        groups = self._groups(trained, len(present))
        means = [
            _mean([t for t, own in zip(trained, groups, strict=True) if own == group])
            for group in range(max(groups) + 1)
        ]
        places = grouping.assigned(grouping.cosines(means, present))
        return [places[group] for group in groups]


# ── replies ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Reply:
    """One site's answer in ``clustered``.

    Attributes:
        update: as it came.
        cluster: that the site had; None in its first round.
        change: of the one head that it trained, one matrix a layer.
    """

    update: ClientUpdate
    cluster: int | None
    change: grouping.Heads

    @staticmethod
    def of(update: ClientUpdate, cluster: int | None) -> "_Reply":
        names = [head_name(module, cluster or 0) for module in hydra.modules(update.start)]
        change = [update.tensors[n] - update.start.head[n] for n in names]
        return _Reply(update, cluster, change)


def _place(reply: _Reply, present: Sequence[grouping.Heads], used: Sequence[int]) -> int:
    """The cluster of a reply: its own, or the one in use that its change points to."""
    if reply.cluster is not None:
        return reply.cluster
    mean = _mean(present)
    away = [[B - m for B, m in zip(present[c], mean, strict=True)] for c in used]
    return used[int(grouping.cosines([reply.change], away)[0].argmax())]


def _folded(
    adapter: Adapter, replies: Sequence[_Reply], bases: Sequence[int], places: Sequence[int]
) -> dict[str, Tensor]:
    """``B_c = sum_k q_k (B_base(k) + dB_k)`` of every cluster that has replies, by name.

    The base is the cluster itself, but for sites that a new grouping has moved.
    """
    new: dict[str, Tensor] = {}
    for cluster in sorted({*places}):
        mine = [k for k, place in enumerate(places) if place == cluster]
        q = weights([replies[k].update for k in mine])
        for i, module in enumerate(hydra.modules(adapter)):
            heads = [adapter.head[head_name(module, bases[k])].double() for k in mine]
            moved = [B + replies[k].change[i] for k, B in zip(mine, heads, strict=True)]
            name = head_name(module, cluster)
            new[name] = weighted_sum(moved, q).to(adapter.head[name].dtype)
    return new


def _mean(heads: Sequence[grouping.Heads]) -> grouping.Heads:
    """The plain mean, layer by layer."""
    return [torch.stack(list(layer)).mean(0) for layer in zip(*heads, strict=True)]


def _without_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part_of(name) != "B"}


def _heads(adapter: Adapter) -> list[list[Tensor]]:
    """For each of the N heads, its matrix in every layer."""
    layers = [hydra.heads_of(adapter, module) for module in hydra.modules(adapter)]
    return [list(head) for head in zip(*layers, strict=True)]


_LEVELLED: WeakKeyDictionary[Adapter, Adapter] = WeakKeyDictionary()
"""Sites without a cluster start from one object, which the wire codec then encodes once."""


def _levelled(adapter: Adapter) -> Adapter:
    """The adapter with the mean of its heads in the place of each: plain LoRA for any router."""
    if adapter not in _LEVELLED:
        tensors: dict[str, Tensor] = {}
        for module in hydra.modules(adapter):
            heads = hydra.heads_of(adapter, module)
            mean = weighted_sum(heads, [1 / len(heads)] * len(heads)).to(heads[0].dtype)
            tensors |= {head_name(module, i): mean for i in range(len(heads))}
        _LEVELLED[adapter] = adapter.replaced(tensors)
    return _LEVELLED[adapter]


def _matched(update: ClientUpdate, sent: Adapter) -> ClientUpdate:
    """An update with its heads, and its routers' rows, in the order of the heads it was sent."""
    tensors = dict(update.tensors)
    for module in hydra.modules(sent):
        mine, theirs = hydra.heads_of(update.adapter, module), hydra.heads_of(sent, module)
        places = grouping.assigned(grouping.cosines([[B] for B in mine], [[B] for B in theirs]))
        if places == list(range(len(mine))):
            continue
        order = [places.index(i) for i in range(len(places))]
        tensors |= {head_name(module, i): mine[k] for i, k in enumerate(order)}
        router = factor_name(module, "router")
        tensors[router] = update.tensors[router][order]
    return replace(update, tensors=tensors)


# ── who belongs where ─────────────────────────────────────────────────────────────────────────


def _key(site: str) -> int:
    """64 bits of a site's name, as a signed number."""
    return int.from_bytes(blake2b(site.encode(), digest_size=8).digest(), "big", signed=True)


def _members(state: ServerState) -> dict[int, int]:
    table = state.slots.get(MEMBERS)
    if table is None:
        return {}
    return {int(key): int(cluster) for key, cluster in table}


def _table(members: Mapping[int, int]) -> Tensor:
    return torch.tensor(sorted(members.items()), dtype=torch.int64)  # [n, 2]


def cluster_of(state: ServerState, site: str) -> int | None:
    """The cluster of a site; None where it has none yet."""
    return _members(state).get(_key(site))
