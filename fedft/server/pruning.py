"""Layer-pruned clients: which transformer blocks each site holds, under its memory budget.

    Wu, Li, Tian, Guo and Li, "Layer-wise pruning for federated fine-tuning under memory budgets"
    (FedPruner), 2025, arXiv:2508.17209. Read: its abstract, and reviews; the rest is ours.

A site that can afford K of L blocks holds one block of each of K groups. Groups are runs of blocks
(or clusters) that do alike: S is the CKA similarity of the blocks' outputs, averaged over the
sites of a round by their rows, and

    contiguous   the K runs whose mean similarity within, weighted by their lengths, is largest
    spectral     k-means of the rows of the K smallest eigenvectors of I - D^-1/2 S D^-1/2

Within a group block l is drawn with p_l = softmax(I_l / tau) by (seed, round, site), I being the
blocks' importance in standard deviations over all blocks. Pruning is no aggregation rule: it
narrows the rule's plan for a site, so that every rule, and mixed ranks, compose with it.

With ``granularity = "sublayer"`` (the paper's FedPruner+) all of this is done with the 2 L halves of
the blocks: 2 b is attention of block b, and 2 b + 1 its feed-forward part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from fedft.core import models, seeds
from fedft.core.errors import ConfigError
from fedft.core.link.shapes import beside, of_adapter
from fedft.core.memory import MIB, Footprint, Geometry, footprint
from fedft.core.optimizers import numbers_kept
from fedft.core.similarity import from_upper
from fedft.core.spec import LoraSpec, Table
from fedft.core.sublayers import HALVES, Layer, Sublayer, sublayer_of
from fedft.core.tasks import task_of
from fedft.core.terms import terms_json
from fedft.core.types import (
    Adapter,
    Delta,
    EvalPlan,
    Granularity,
    Importance,
    ServerState,
    Site,
    TrainPlan,
    in_blocks,
)
from fedft.core.wire.schema import ARRAYS, numbers
from fedft.server.block_groups import Matrix, contiguous_groups, spectral_groups, standardised
from fedft.server.fleet import Distribution
from fedft.strategies import Strategy
from fedft.strategies.beside import first_plan

_SIMILARITY, _IMPORTANCE, _SINCE = (f"pruning/{n}" for n in ("similarity", "importance", "round"))


class PruningSpec(Table):
    """`[pruning]`: how blocks are chosen for sites that cannot hold them all.

    Attributes:
        selection: ``none``: every site holds the whole model. ``cka``: one block of each functional
            group. Baselines: ``random`` blocks by seed, ``stride`` evenly spaced ones, the ``first``
            or the ``last``, and those of most ``importance``.
        granularity: what is chosen: whole blocks; or each block's attention and feed-forward part
            by itself (FedPruner+), which all must have adapted layers then.
        grouping: of ``cka``: runs of blocks by dynamic programming, or spectral clusters.
        importance: ``block-influence``, 1 - cos of a block's input and output; or ``ablation``, the
            rise of the loss without the block, which takes L + 1 passes at every site.
        tau: temperature of the draw within a group; small always takes the most important.
        every: rounds after which similarity and importance are measured anew.
    """

    selection: Literal["none", "cka", "random", "stride", "first", "last", "importance"] = "none"
    granularity: Granularity = "block"
    grouping: Literal["contiguous", "spectral"] = "contiguous"
    importance: Importance = "block-influence"
    tau: PositiveFloat = 1.0
    every: PositiveInt = 5


def unprunable(lora: LoraSpec) -> str | None:
    """Why blocks cannot be left out under this adapter; None where they can."""
    if lora.form != "lora" or lora.init != "default":
        return 'it needs [lora] method = "lora" with init = "default"'
    if lora.layers is not None:
        return "it chooses the blocks: [lora] layers cannot stand beside it"
    return None


# ── groups and choices ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pruning:
    """Which layers a site holds in a round: a function of (seed, state, site) alone.

    Attributes:
        spec: the `[pruning]` table. Layers are blocks or halves of blocks, by its granularity.
        affordable: how many layers a site can hold.
        count: L, of the whole model.
        seed: of the run.
        sizes: numbers of layers, below L, that sites of this fleet hold.
    """

    spec: PruningSpec
    affordable: Callable[[Site], int]
    count: int
    seed: int
    sizes: tuple[int, ...] = ()

    def due(self, state: ServerState) -> bool:
        """Whether the layers are to be compared before the round that follows ``state``."""
        if self.spec.selection not in ("cka", "importance"):
            return False
        since = state.slots.get(_SINCE)
        return since is None or state.round - int(since) >= self.spec.every

    def learned(
        self, state: ServerState, answers: Sequence[tuple[Tensor, Tensor, int]]
    ) -> ServerState:
        """``state`` with what sites said of the layers: the mean by rows.

        Args:
            state: before the round.
            answers: (similarity above the diagonal [L (L - 1) / 2], importance [L], rows) by site.
        """
        total = sum(rows for _, _, rows in answers)
        similarity = torch.stack([s.double() * (n / total) for s, _, n in answers]).sum(0)
        importance = torch.stack([i.double() * (n / total) for _, i, n in answers]).sum(0)
        found = {
            _SIMILARITY: from_upper(similarity, self.count),
            _IMPORTANCE: importance,
            _SINCE: torch.tensor(state.round),
        }
        return replace(state, slots={**state.slots, **found})

    def layers(self, state: ServerState, site: Site) -> tuple[Layer, ...] | None:
        """What a site holds in the round after ``state``; None is the whole model.

        Raises:
            ConfigError: it cannot hold a single layer.
        """
        held = self._held(state, site)
        return None if held is None else self.named(held)

    def named(self, indices: Sequence[int]) -> tuple[Layer, ...]:
        """The layers of these indices, as a plan names them."""
        if self.spec.granularity == "block":
            return tuple(indices)
        return tuple(Sublayer(k // len(HALVES), HALVES[k % len(HALVES)]) for k in indices)

    def _held(self, state: ServerState, site: Site) -> tuple[int, ...] | None:
        count = self.affordable(site)
        if count >= self.count:
            return None
        if count == 0:
            raise ConfigError(
                f"{site.name} grants {site.memory_mib or 0:.0f} MiB, which is less than one "
                f"{self.spec.granularity} takes",
                fix="Grant it more memory, or leave it out.",
            )
        generator = seeds.numpy_generator(self.seed, "blocks", state.round + 1, site.name)
        return self._chosen(state, count, generator)

    def typical(self, state: ServerState, count: int) -> tuple[Layer, ...]:
        """The submodel of ``count`` layers that is evaluated: the most important of each group.

        Of ``random`` layers there is none that is typical: the same draw is taken in every round.
        """
        generator = seeds.numpy_generator(self.seed, "typical blocks", count)
        if self.spec.selection == "cka":
            importance = self._measured(state)[1]
            groups = self.groups(state, count)
            return self.named(sorted(max(g, key=lambda b: importance[b]) for g in groups))
        return self.named(self._chosen(state, count, generator))

    def groups(self, state: ServerState, count: int) -> list[list[int]]:
        """The functional groups of the layers."""
        similarity, _ = self._measured(state)
        divide = contiguous_groups if self.spec.grouping == "contiguous" else spectral_groups
        return divide(similarity, count)

    def facts(self, state: ServerState, cohort: Sequence[Site]) -> dict[str, Any]:
        """What a round's line says: the layers of each site, and what they were chosen by."""
        held = {site.name: self._held(state, site) for site in cohort}
        facts: dict[str, Any] = {"held": {n: b for n, b in held.items() if b is not None}}
        if _SIMILARITY in state.slots:
            similarity, importance = self._measured(state)
            facts["measured"] = {
                "by": "sites",
                "round": int(state.slots[_SINCE]) + 1,
                "similarity": similarity.round(6).tolist(),
                "importance": importance.round(6).tolist(),
            }
            if self.spec.selection == "cka":
                facts["groups"] = {str(k): self.groups(state, k) for k in self.sizes}
        return facts

    def _chosen(
        self, state: ServerState, count: int, generator: np.random.Generator
    ) -> tuple[int, ...]:
        L = self.count
        match self.spec.selection:
            case "first":
                return tuple(range(count))
            case "last":
                return tuple(range(L - count, L))
            case "stride":
                return tuple(i * L // count for i in range(count))
            case "importance":
                order = np.argsort(-self._measured(state)[1], kind="stable")
                return tuple(sorted(order[:count].tolist()))
            case "cka":
                return self._one_a_group(state, count, generator)
            case _:
                return tuple(sorted(generator.choice(L, count, replace=False).tolist()))

    def _one_a_group(
        self, state: ServerState, count: int, generator: np.random.Generator
    ) -> tuple[int, ...]:
        importance = standardised(self._measured(state)[1]) / self.spec.tau
        drawn: list[int] = []
        for group in self.groups(state, count):
            p = np.exp(importance[group] - importance[group].max())
            drawn.append(int(generator.choice(group, p=p / p.sum())))
        return tuple(sorted(drawn))

    def _measured(self, state: ServerState) -> tuple[Matrix, Matrix]:
        return state.slots[_SIMILARITY].numpy(), state.slots[_IMPORTANCE].numpy()


# ── what a site can hold ──────────────────────────────────────────────────────────────────────


def pruning_of(
    config: Any, shapes: models.Schema, geometry: Geometry | None
) -> tuple[Pruning | None, tuple[float, ...] | Distribution]:
    """How a run prunes, None where it does not; and the sites' budgets in MiB.

    Args:
        config: the :class:`~fedft.server.config.RunConfig`.
        shapes: of the model.
        geometry: of the model; None where its memory is not known.

    Raises:
        ConfigError: some site's budget does not hold what it is to train, or cannot be checked.
    """
    fleet = config.fleet
    prunes = config.pruning.selection != "none"
    if geometry is None:
        if prunes or _limited(fleet):
            raise ConfigError(
                f"the memory model does not know the architecture of {config.model.source!r}: it knows models "
                f"of {models.KNOWN}",
                fix="Leave memory budgets and [pruning] out, or choose another model.",
            )
        return None, fleet.memory_budgets_mib
    if prunes and not shapes.separable:
        raise ConfigError(
            f"no block of {config.model.source!r} can be left out: each gives more than the hidden states, "
            "or does not say what it gives",
            fix="Leave [pruning] out, or choose another model.",
        )
    if granularity(config) == "sublayer":
        _check_halves(config, shapes, geometry)

    @cache
    def needs(rank: int, limited: bool) -> Footprint:
        """Of a site of any rank: real clients bring ranks that stand in no configuration."""
        return site_footprint(config, shapes, geometry, rank, limited=limited)

    limited = _limited(fleet)
    largest = needs(config.rank, limited)
    budgets = fleet.memory_budgets_mib
    if fleet.model_shares:
        L = largest.layers
        budgets = tuple(largest.mib(max(1, int(share * L))) for share in fleet.model_shares)
    granted = _least_and_all(fleet, budgets)
    if granted:
        _check_budget(min(granted), largest, config.pruning)
    if not prunes:
        return None, budgets

    def affordable(site: Site) -> int:
        if site.memory_mib is None:
            return largest.layers
        rank = config.rank if site.rank is None else site.rank
        # A real client that grants limited memory does so whatever the configuration's fleet is.
        return needs(rank, True).affordable(site.memory_mib)

    sizes = {largest.affordable(mib) for mib in granted} - {largest.layers}
    spec = config.pruning
    return Pruning(spec, affordable, largest.layers, config.seed, tuple(sorted(sizes))), budgets


def _least_and_all(fleet: Any, budgets: tuple[float, ...] | Distribution) -> list[float]:
    """Every budget of the fleet, in MiB; of a distribution its bounds."""
    if fleet.devices:
        return [d.memory_mib for d in fleet.devices if d.memory_mib is not None]
    return [budgets.low, budgets.high] if isinstance(budgets, Distribution) else list(budgets)


def _check_halves(config: Any, shapes: models.Schema, geometry: Geometry) -> None:
    """Refuse to divide blocks that cannot be, or into halves that do not learn."""
    wanted = '[pruning] granularity = "sublayer"'
    if geometry.halves is None:
        raise ConfigError(
            f"{wanted}: attention and feed-forward part of the blocks of {config.model.source!r} "
            "cannot be told apart",
            fix='Set granularity = "block".',
        )
    adapted = {sublayer_of(module) for module in shapes.modules}
    for half in HALVES:
        if any(Sublayer(block, half) not in adapted for block in range(geometry.blocks)):
            raise ConfigError(
                f"{wanted}: no layer of the {half} part is adapted, and a client could hold nothing "
                "that learns",
                fix='Set [lora] target-modules = "all-linear", or granularity = "block".',
            )


def _check_budget(least: float, needs: Footprint, spec: PruningSpec) -> None:
    prunes = spec.selection != "none"
    needed = needs.mib(1 if prunes else None)
    if least >= needed:
        return
    parts = ", ".join(
        f"{name} {value / MIB:.0f}" for name, value in needs.of(1 if prunes else None).items()
    )
    what = f"one {spec.granularity} of the model" if prunes else "the whole model"
    raise ConfigError(
        f"[fleet] a client grants {least:.0f} MiB, and training {what} takes {needed:.0f} MiB ({parts})",
        fix="Lower [training] batch-size or [data] max-length, set [engine] gradient-checkpointing, "
        "or leave such clients out."
        if prunes
        else 'Let such clients hold a part of it: [pruning] selection = "cka".',
    )


def site_footprint(
    config: Any,
    shapes: models.Schema,
    geometry: Geometry,
    rank: int,
    *,
    checkpointing: bool | None = None,
    limited: bool | None = None,
) -> Footprint:
    """What a site of this rank needs, with every row as long as ``[data] max-length`` allows.

    Args:
        config: the :class:`~fedft.server.config.RunConfig`; all answer tokens are taken to be scored.
        shapes: of the model.
        geometry: of the model.
        rank: of the site.
        checkpointing: whether blocks run again in the backward pass; None is as configured.
        limited: whether it grants limited memory, and leaves tables in their file if it trains
            plain LoRA; None is as the fleet.
    """
    tokens = geometry.patches or config.data.max_length
    load = models.load_of(
        shapes,
        geometry.blocks,
        rank,
        batch=config.training.batch_size * task_of(config.model.task).each,
        tokens=tokens,
        scored=tokens,
        checkpointing=config.engine.gradient_checkpointing
        if checkpointing is None
        else checkpointing,
    )
    more = max(0, numbers_kept(config.training.local()) - _MOMENTS)
    load = replace(load, beside=_beside(config.strategy, shapes, rank) + more)
    precision = config.engine.precision
    held_in = "fp32" if precision == "auto" else precision
    if limited is None:
        limited = _limited(config.fleet)
    if not (limited and config.lora.form == "lora"):
        geometry = replace(geometry, in_file={})
    return footprint(geometry, load, held_in, granularity(config))


_MOMENTS = 2
"""Numbers of optimiser state that every footprint counts for each one that learns."""


def _beside(rule: Strategy, shapes: models.Schema, rank: int) -> float:
    """Numbers in records of terms for each parameter of the adapter."""
    plan = first_plan(rule)
    terms = terms_json(plan.terms)
    more = beside(shapes, {"rank": rank, "train": sorted(plan.train), "terms": terms})
    return more / max(1, numbers({ARRAYS: of_adapter(shapes, rank, plan.train)}))


def _limited(fleet: Any) -> bool:
    """Whether any site of a fleet grants limited memory."""
    return bool(fleet.model_shares or _least_and_all(fleet, fleet.memory_budgets_mib))


def granularity(config: Any) -> Granularity:
    """What sites of this run leave out; blocks where they leave out nothing."""
    return "block" if config.pruning.selection == "none" else config.pruning.granularity


# ── the plan of such a site ───────────────────────────────────────────────────────────────────

_NARROWED: WeakKeyDictionary[Adapter, dict[tuple[Layer, ...], tuple[Adapter, Delta, Delta]]] = (
    WeakKeyDictionary()
)
"""Sites that hold the same layers start from one object, which is encoded, and shared, once."""


def narrowed(plan: TrainPlan, layers: tuple[Layer, ...] | None) -> TrainPlan:
    """The same plan for a site that holds only these layers: nothing of the others travels."""
    if layers is None:
        return plan
    known = _NARROWED.setdefault(plan.start, {})
    if layers not in known or known[layers][1] is not plan.delta:
        delta = {m: f for m, f in plan.delta.items() if in_blocks(m, layers)}
        known[layers] = (plan.start.narrowed(layers), plan.delta, delta)
    start, _, delta = known[layers]
    return replace(plan, start=start, delta=delta, layers=layers).trimmed()


def submodel(plan: EvalPlan, layers: tuple[Layer, ...] | None) -> EvalPlan:
    """The same evaluation on the model of these layers alone; None leaves it as it is."""
    if layers is None:
        return plan
    delta = {m: f for m, f in plan.delta.items() if in_blocks(m, layers)}
    return replace(plan, adapter=plan.adapter.narrowed(layers), delta=delta, layers=layers)
