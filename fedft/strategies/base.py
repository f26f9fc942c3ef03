"""What an aggregation rule is: frozen hyperparameters and pure functions of data.

A rule never sees Flower, Ray, a socket, a file or a clock. What it needs of a client it says in a
:class:`~fedft.core.types.TrainPlan`; what it makes of the answers is a new
:class:`~fedft.core.types.ServerState`. Its hyperparameters are the `[strategy]` table of the
configuration: the validated table *is* the strategy object.

A rule is a subclass of :class:`Strategy` that implements ``combine`` (and ``plan`` where clients do
something other than train and send everything). One of ours is a file here, a row in
``strategies/__init__.py`` and one in the conformance table of ``tests/strategies``; one of somebody
else's needs no row, see docs/extending.md.

Ranks. The global adapter has the largest rank R of the fleet, with scale s. A site of rank r trains
at alpha constant, that is with s_r = s R / r, and the ratio is folded into B, so that what it
starts from is the product of the first r rows and columns of the global factors. (Under
rank-stabilised LoRA sites get the same s_r; the rules are exact for any s_r, since every sum over
sites folds it.) The rest of the global factors, beyond the site's rank, is not the site's to change:
a rule that counts it as zero there loses a part of it in every round, also if nobody trains, and
declares that it :attr:`~Strategy.forgets`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from pydantic import PrivateAttr
from torch import Tensor

from fedft.core import algebra
from fedft.core.errors import ConfigError
from fedft.core.means import RunningMean
from fedft.core.parts import ALL_PARTS
from fedft.core.strict import Table
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Delta,
    Factors,
    Part,
    ServerState,
    Site,
    TrainPlan,
    module_of,
    part_of,
)
from fedft.strategies.facts import RunFacts
from fedft.strategies.renamed import answer_to_old_names
from fedft.strategies.sendable import NO_RESULT, REMEDY, check_sendable


class Strategy(Table, ABC):
    """Base of every aggregation rule.

    Attributes:
        name: under which a configuration finds the class: the plain name of one of ours, or of one
            that an installed package registers, or ``package.module:Class``. A rule from outside of
            fedft need not say it.
    """

    name: str = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        super().__pydantic_init_subclass__(**more)
        answer_to_old_names(cls)

    _facts: RunFacts = PrivateAttr(default_factory=RunFacts)

    @property
    def facts(self) -> RunFacts:
        """Of the run that the rule is used in: for ``init``, ``plan`` and ``combine`` to read."""
        return self._facts

    def own_seed(self, given: int | None) -> int:
        """A rule's own ``seed`` key where it is given, else the run seed."""
        return self._facts.seed if given is None else given

    @property
    def prunes(self) -> bool:
        """Whether the rank of a client may become another one within a run."""
        return False

    def of_run(self, facts: RunFacts) -> Self:
        """The same rule in a run with these facts. A server calls it before it asks for anything."""
        bound = self.model_copy()
        bound._facts = facts
        return bound

    @property
    def mixed_ranks(self) -> bool:
        """Whether sites may train different ranks under this rule."""
        return False

    @property
    def forgets(self) -> bool:
        """Whether, at mixed ranks, the model shrinks by a round in which no site trains.

        Such a rule counts what lies beyond a site's rank as zero at that site. Its page says how
        much is lost, and the meters report it in every round
        (:attr:`fedft.core.meters.gaps.LayerBias.forgotten`). This is the one place where it is declared:
        the tests hold every other rule to losing nothing.
        """
        return False

    @property
    def personal(self) -> frozenset[Part]:
        """The parts that stay at the sites.

        A run of a rule that has any has no single global model: each site is to be judged with
        its own parts.
        """
        return frozenset()

    @property
    def comparable(self) -> frozenset[Part]:
        """The parts whose entries mean the same from one round to the next.

        What a rule re-draws or writes in a new basis every round is not among them: a difference
        between two rounds means nothing there, and a server optimiser leaves it alone.
        """
        return ALL_PARTS

    @property
    def uses_mean_only(self) -> bool:
        """Whether the new state depends on the replies through the mean of what they sent alone.

        The mean, or another summary of the replies (a median, a noisy mean), can then take their
        place: it is handed to ``combine`` as the one reply of the round. The mean that
        :meth:`fedft.core.folding.Folded.mean_update` makes gives the same bits as all replies do.
        """
        return False

    @property
    def chooses(self) -> bool:
        """Whether the rule itself picks replies, or values of single replies, in place of their mean.

        Noise that cancels in the mean does not cancel there, so that only a compressor that draws
        none can be used.
        """
        return False

    @property
    def buffer_size(self) -> int | None:
        """Replies that make a server update while other sites are still at work (FedBuff's K).

        None waits for the whole cohort of a round.
        """
        return None

    @property
    def guards(self) -> str:
        """What the rule promises of each reply and keeps to the adapter's tensors for.

        A sentence without its end; empty where it promises nothing of the kind. Terms with records
        that travel up are refused where there is any: see :mod:`fedft.strategies.beside`.
        """
        return ""

    def supports(self, method: str) -> bool:
        """Whether the rule can aggregate adapters of this `[lora] method`.

        One whose equation is about factors takes ``lora`` alone. One that takes the mean of every
        tensor, whatever it stands for, takes any method whose tensors are carried whole.
        """
        return method == "lora"

    def init(self, adapter: Adapter) -> ServerState:
        """The state before the first round."""
        return ServerState(adapter)

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        """What ``site`` is to do this round. Default: train A, B and the head, send all three."""
        return TrainPlan(start=state.adapter, delta=state.delta)

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """One round: fold the updates into a new state.

        The laws that hold for every rule are kept here: sites without examples are left out,
        updates are folded in the order of site names, a round with no usable update changes nothing
        but the round's number, and what the rule made can be sent to the sites.

        Raises:
            ConfigError: the new state holds a number that is not finite, or too large for the wire.
        """
        usable = sorted((u for u in updates if u.examples > 0), key=lambda u: u.site)
        following = replace(state, round=state.round + 1)
        return self.checked(following, usable) if usable else following

    def checked(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """:meth:`combine`, and its result can be sent.

        Raises:
            ConfigError: it holds a number that is not finite, or too large for the wire.
        """
        try:
            after = self.combine(state, updates)
        except NO_RESULT as error:
            raise ConfigError(
                f"round {state.round}: {self.label} has no result in numbers of this size: {error}",
                fix=REMEDY,
            ) from error
        check_sendable(self.label, state, after)
        return after

    @property
    def label(self) -> str:
        """The rule's name, as an error names it."""
        return self.name or type(self).__name__

    @abstractmethod
    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The rule's own equation.

        Args:
            state: as it was broadcast, with ``round`` already counted up to the round in hand.
            updates: at least one, each with at least one example, in the order of site names.
        """


answer_to_old_names(Strategy)


# ── means ─────────────────────────────────────────────────────────────────────────────────────


def weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """``p_k = n_k / sum_j n_j`` over the sites that took part."""
    total = sum(u.examples for u in updates)
    return [u.examples / total for u in updates]


def weighted_sum(tensors: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """``sum_k p_k x_k`` in float64, in the order given."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, p, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def mean_of(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """The weighted mean of every tensor that was sent, by name; the dtype is kept.

    A tensor that some sites do not hold (layer-pruned clients) is averaged over those that do,
    with their weights renormalised.

    Raises:
        ValueError: the sites sent a tensor in different shapes.
    """
    mean = RunningMean()
    for update in updates:
        mean.add(update.tensors, update.examples)
    return mean.tensors()


def mean_head(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """The weighted mean of the fully trained tensors; empty where the sites sent none."""
    mean = RunningMean()
    for update in updates:
        head = {name: t for name, t in update.tensors.items() if part_of(name) == "head"}
        mean.add(head, update.examples)
    return mean.tensors()


# ── layer by layer ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Layer:
    """What came back of one adapted layer.

    Attributes:
        module: its path.
        parts: the factors of the sites that hold it, in the order of site names.
        p: their weights, renormalised over these sites.
        holders: the updates the parts belong to.
    """

    module: str
    parts: Sequence[Factors]
    p: Sequence[float]
    holders: Sequence[ClientUpdate]

    def mean_update(self) -> Factors:
        """``dW = sum_k p_k s_k B_k A_k``, exactly, at rank ``sum_k r_k``."""
        return algebra.stack(self.parts, self.p)

    def completed(self, old: Factors) -> Factors:
        """The mean update in which nothing of what the server has is lost.

        A site of rank r had the first r rows and columns of the server's factors, changed them, and
        left the rest as it is, so that its change is added to all of them:

            sum_k p_k (s_k B_k A_k + tail_k)      tail_k = s B[:, r_k:] A[r_k:]

        which is ``s B A + sum_k p_k (s_k B_k A_k - what it started from)``, at rank
        ``sum_k r_k + R - min_k r_k``. Where all ranks are R it is :meth:`mean_update`, bit for bit.

        Args:
            old: the server's factors of this layer, of rank R, as the sites' starts were cut from.
        """
        tails = algebra.beyond(old, [x.rank for x in self.parts], self.p)
        if not tails.rank:
            return self.mean_update()
        return algebra.stack([*self.parts, tails], [*self.p, 1.0])


def layers(updates: Sequence[ClientUpdate]) -> Iterator[Layer]:
    """Every adapted layer that some site sent, in the order of the model."""
    adapters = [u.adapter for u in updates]
    sent = [{module_of(name) for name in u.tensors if part_of(name) != "head"} for u in updates]
    for module in dict.fromkeys(module for u in updates for module in u.start.factors):
        held = [k for k, modules in enumerate(sent) if module in modules]
        if held:
            holders = [updates[k] for k in held]
            parts = [adapters[k].factors[module] for k in held]
            yield Layer(module, parts, weights(holders), holders)


def rebuilt(
    state: ServerState, factors: Mapping[str, Factors], updates: Sequence[ClientUpdate]
) -> Adapter:
    """The global adapter with new factors and the mean head; other layers are kept."""
    adapter = state.adapter.map_factors({**state.adapter.factors, **factors})
    return adapter.replaced(mean_head(updates))


def grown(delta: Delta, module: str, more: Factors, rank: int | None) -> Factors:
    """The base delta of one layer with ``more`` added to it, at no higher rank than needed.

    Args:
        delta: of all layers, so far.
        module: the layer's path.
        more: what to add.
        rank: the cap; None keeps everything.
    """
    total = algebra.stack([delta[module], more]) if module in delta else more
    return algebra.capped(total, rank)


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────

_RESIZED: WeakKeyDictionary[Adapter, dict[tuple[int, bool], Adapter]] = WeakKeyDictionary()
"""Sites of one rank start from one object, which the wire codec then encodes once."""


def at_rank(adapter: Adapter, rank: int | None, *, common_scale: bool = False) -> Adapter:
    """The adapter that a site of ``rank`` starts from: the leading part of the global one.

    Args:
        adapter: the global adapter, of rank R.
        rank: of the site; None is R.
        common_scale: keep s for every rank. Otherwise alpha is kept: the site's scale is
            ``s R / r`` and the ratio is folded into B, so that the product is the truncated one.

    Raises:
        ConfigError: the site's rank is above R.
    """
    if rank is None or rank == adapter.rank:
        return adapter
    if rank > adapter.rank:
        raise ConfigError(
            f"a client trains rank {rank}, but the global adapter has rank {adapter.rank}",
            fix="set [lora] rank to the largest rank of [fleet] ranks",
        )
    known = _RESIZED.setdefault(adapter, {})
    key = (rank, common_scale)
    if key not in known:
        known[key] = adapter.map_factors(
            {m: _first(f, rank, common_scale) for m, f in adapter.factors.items()}
        )
    return known[key]


def _first(x: Factors, rank: int, common_scale: bool) -> Factors:
    if rank >= x.rank:
        return x
    head = algebra.truncate(x, rank)
    if common_scale:
        return head
    ratio = x.rank / rank
    return Factors(head.A, head.B / ratio, x.scale * ratio)


def spectral(
    triplets: tuple[Tensor, Tensor, Tensor], rank: int, like: Factors, *, balanced: bool = False
) -> Factors:
    """Factors of ``rank`` from singular triplets, with the scale and dtype of ``like``.

    A direction with (next to) no singular value keeps a unit row in A beside its zero column in B.
    With both at zero neither would ever have a gradient.

    Args:
        triplets: U [d_out, q], S [q], V^T [q, d_in] of :func:`algebra.top_svd` at this rank.
        rank: of the result; a rank above min(d_out, d_in) is filled up with zeros.
        like: where scale and dtype come from.
        balanced: S^(1/2) on both factors; otherwise all of S on B, and A has orthonormal rows.
    """
    U, S, Vt = triplets
    unit = torch.ones_like(S)
    right = torch.where(S.gt(1e-6 * S[0]), (S / like.scale).sqrt(), unit) if balanced else unit
    left = S / like.scale / right
    dtype, missing = like.A.dtype, rank - S.numel()
    A = torch.nn.functional.pad((right[:, None] * Vt).to(dtype), (0, 0, 0, missing))
    B = torch.nn.functional.pad((U * left).to(dtype), (0, missing))
    return Factors(A.contiguous(), B.contiguous(), like.scale)
