"""The central types: what travels between server and client, and what survives a round.

All of them are frozen data. A tensor's shape is stated where it is made; ``d_in`` and ``d_out``
are the widths of the adapted linear layer, ``r`` is the LoRA rank.

Tensors are named as PEFT names them in a saved adapter (``base_model.model.<module>.lora_A.weight``
and so on), so that the wire, the checkpoint, the exported adapter and any other PEFT program
speak of the same keys.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.parts import ALL_PARTS, Part, checked, factor_name, head_of, part_of
from fedft.core.parts import PREFIX as PREFIX  # names of tensors belong to the central types, too
from fedft.core.parts import head_name as head_name
from fedft.core.parts import module_of as module_of
from fedft.core.sublayers import Layer, sublayer_of
from fedft.core.terms import Shapes, Term, Way, records_of, taken
from fedft.core.training import LocalTraining

Importance = Literal["block-influence", "ablation"]
"""How much a transformer block does: by how far it turns its input, or by what its absence costs."""

Granularity = Literal["block", "sublayer"]
"""What a site holds or leaves out: transformer blocks, or their halves one by one."""

Records = Mapping[str, Mapping[str, Tensor]]
"""Name of a record → PEFT name → tensor: what the terms of a plan have beside the adapter."""

IGNORED = -100
"""Label of a token on which no loss is taken; the number that transformers uses."""

LARGEST_SENT = torch.finfo(torch.bfloat16).max
"""The largest number that every format of the wire holds; float32 ends 0.4 % above bfloat16."""


def block_of(path: str) -> int | None:
    """Index of the transformer block a module path lies in; None outside of all blocks."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def in_blocks(path: str, layers: Collection[Layer]) -> bool:
    """Whether a model that holds only the blocks, and halves of blocks, ``layers`` has this module."""
    block = block_of(path)
    return block is None or block in layers or sublayer_of(path) in layers


@dataclass(frozen=True, eq=False)
class Factors:
    """The low-rank update of one linear layer, ``scale * B @ A`` (or ``scale * B @ R @ A``).

    Attributes:
        A: down-projection, [r, d_in].
        B: up-projection, [d_out, r].
        scale: LoRA's s, alpha / r (or alpha / sqrt(r) with rank-stabilised LoRA).
        R: the r x r core of LoRA-XS and Fed-SB, [r, r]; None elsewhere.

    Raises:
        ValueError: the shapes do not fit together.
    """

    A: Tensor
    B: Tensor
    scale: float
    R: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"A must be [r, d_in] and B [d_out, r]; got {list(self.A.shape)} and {list(self.B.shape)}"
            )
        if self.R is not None and self.R.shape != (self.rank, self.rank):
            raise ValueError(f"R must be [r, r] with r = {self.rank}; got {list(self.R.shape)}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in): the shape of the weight this update is added to."""
        return self.B.shape[0], self.A.shape[1]

    def product(self) -> Tensor:
        """The dense update, [d_out, d_in]. For export and tests: the rules never form it."""
        return self.scale * (self.B @ self.folded_A())

    def folded_A(self) -> Tensor:
        """``R @ A`` where there is a core, else ``A``. [r, d_in]"""
        return self.A if self.R is None else self.R @ self.A

    def folded(self) -> "Factors":
        """The same update without a core."""
        return replace(self, A=self.folded_A(), R=None)


Delta = Mapping[str, Factors]
"""Module path → a factored change of the frozen base weights. Ranks may differ by module."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is fine-tuned: LoRA factors by module path, and other tensors by PEFT name.

    Every module of one adapter has the same rank and scale; a site of another rank has another
    adapter. The order of both mappings is that of the model and is kept everywhere.

    ``head`` holds the tensors that are carried whole: a task head, and, where the method is not
    plain LoRA, all tensors of the method; there are no ``factors`` then.
    """

    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", MappingProxyType(dict(self.factors)))
        object.__setattr__(self, "head", MappingProxyType(dict(self.head)))

    def __reduce__(self) -> tuple[object, ...]:
        return (Adapter, (dict(self.factors), dict(self.head)))

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 where nothing has a rank."""
        downs = (t for name, t in self.head.items() if part_of(name) == "A")
        ranks = [f.rank for f in self.factors.values()] or [A.shape[0] for A in downs]
        return max(ranks, default=0)

    def tensors(self, parts: Iterable[Part] = ALL_PARTS) -> dict[str, Tensor]:
        """The chosen parts as PEFT name → tensor, in the order of the model."""
        wanted = set(parts)
        flat: dict[str, Tensor] = {}
        for module, factors in self.factors.items():
            for part, tensor in (("A", factors.A), ("R", factors.R), ("B", factors.B)):
                if part in wanted and tensor is not None:
                    flat[factor_name(module, part)] = tensor
        return flat | {name: t for name, t in self.head.items() if part_of(name) in wanted}

    def replaced(self, tensors: Mapping[str, Tensor], scale: float | None = None) -> "Adapter":
        """A new adapter with the named tensors in place of this one's; the rest is kept.

        Args:
            tensors: PEFT name → tensor. Factors may change their rank, A, B and R together.
            scale: the new scale of every module; None keeps the present one.

        Raises:
            KeyError: a name that this adapter does not have.
        """
        unknown = tensors.keys() - self.tensors().keys()
        if unknown:
            raise KeyError(f"not in this adapter: {sorted(unknown)[:3]}")
        factors = {
            module: Factors(
                A=tensors.get(factor_name(module, "A"), f.A),
                B=tensors.get(factor_name(module, "B"), f.B),
                scale=f.scale if scale is None else scale,
                R=tensors.get(factor_name(module, "R"), f.R) if f.R is not None else None,
            )
            for module, f in self.factors.items()
        }
        return Adapter(factors, {name: tensors.get(name, t) for name, t in self.head.items()})

    def map_factors(self, factors: Mapping[str, Factors]) -> "Adapter":
        """A new adapter with other factors and the same head."""
        return Adapter(factors, self.head)

    def narrowed(self, layers: Collection[Layer]) -> "Adapter":
        """What a site that holds only these blocks, and halves of blocks, has of this adapter."""
        return self.map_factors({m: f for m, f in self.factors.items() if in_blocks(m, layers)})


@dataclass(frozen=True)
class Site:
    """A client as the server knows it.

    Attributes:
        name: unique and stable over restarts; sampling and seeds go by it.
        examples: training examples it holds. Zero excludes it from training.
        rank: the LoRA rank it can train; None takes the run's.
        memory_mib: memory it grants to training, in MiB; None is unlimited.
    """

    name: str
    examples: int
    rank: int | None = None
    memory_mib: float | None = None


@dataclass(frozen=True, eq=False)
class Origin:
    """Which rows a batch consists of, for whoever keeps what was computed of a row.

    Attributes:
        pool: the rows that the batch was drawn from; within a process the same name stands for the
            same rows.
        lengths: tokens of every row of the pool, [n] int64; all ones where rows are of one size.
        cut: positions in the pool → these rows as a batch.
        positions: of this batch's rows in the pool, [b] int64.
    """

    pool: str
    lengths: NDArray[np.int64]
    cut: "Callable[[NDArray[np.int64]], Batch]"
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """A few examples, padded to their own longest.

    Attributes:
        inputs: keyword arguments of the model: ``input_ids`` and ``attention_mask`` [b, t] int64,
            or ``pixel_values`` [b, c, h, w].
        labels: class ids [b], or token ids [b, t] with -100 where no loss is taken. int64
        origin: where the rows come from; None where that is not known.
        each: rows of the model that an example has, one below another: inputs and labels then have
            b * each rows.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    origin: Origin | None = None
    each: int = 1

    def __len__(self) -> int:
        return self.labels.shape[0] // self.each


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """What the server asks of one site this round. No strategy name: only what to do.

    Attributes:
        start: where training starts, at the rank of this site.
        delta: what to add to the frozen base weights first, in factored form.
        receive: the parts of ``start`` that travel down. The site makes the others itself, from
            the common seed, exactly as the server made its first adapter.
        train: the parts that learn; the rest of ``start`` is frozen.
        send: the parts that travel back.
        keep: the parts that stay at the site: loaded from its own state where it has one, and
            saved there afterwards. They replace the same parts of ``start``.
        basis: where set, the A and B that do not travel are not those of the common seed but
            ``algebra.orthonormal_basis(basis, ...)``, which the site makes itself (Fed-SB).
        training: the optimiser's settings.
        layers: the transformer blocks this site holds, by index, and the halves of others; None
            holds all of them.
        heads: indices of the HydraLoRA heads that the site trains and sends, of part B; None means
            all of them.
        terms: what local training does beyond plain steps, see :mod:`fedft.core.terms`.
        records: of the terms: those that travel down, and at the client also what it has kept of
            those that stay there. A tensor that it has not kept yet is absent, and counts as zero.
        round: the round this belongs to.
        site: the site's name.
        seed: of the run; the site derives the order of its batches from (seed, round, site).
    """

    start: Adapter
    delta: Delta = field(default_factory=dict[str, Factors])
    receive: frozenset[Part] = frozenset({"A", "B", "R", "head"})
    train: frozenset[Part] = frozenset({"A", "B", "head"})
    send: frozenset[Part] = frozenset({"A", "B", "head"})
    keep: frozenset[Part] = frozenset()
    basis: int | None = None
    training: LocalTraining = field(default_factory=LocalTraining)
    layers: tuple[Layer, ...] | None = None
    heads: tuple[int, ...] | None = None
    terms: tuple[Term, ...] = ()
    records: Records = field(default_factory=dict[str, Mapping[str, Tensor]])
    round: int = 0
    site: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.receive | self.train | self.send | self.keep:
            checked(part)

    def without(self, parts: frozenset[Part]) -> "TrainPlan":
        """The same plan, but these parts stay as the common seed made them, and never travel."""
        if not parts:
            return self
        return replace(
            self,
            receive=self.receive - parts,
            train=self.train - parts,
            send=self.send - parts,
            keep=self.keep - parts,
        ).trimmed()

    def schema(self, way: Way) -> dict[str, Shapes]:
        """The records of the plan's terms that go one way: name → PEFT name → shape.

        Raises:
            ValueError: two terms have a record of the same name.
        """
        if not self.terms:
            return {}
        shapes = {name: tuple(t.shape) for name, t in self.start.tensors().items()}
        return records_of(self.terms, way, shapes, {name for name in shapes if self.trains(name)})

    def trimmed(self) -> "TrainPlan":
        """The same plan; of its records only the tensors that its terms still have in it.

        A plan that trains less than the rule said, for a client that holds less, is cut by it.
        """
        if not self.records:
            return self
        wanted = self.schema("receives")
        cut = {
            record: {name: t for name, t in tensors.items() if name in wanted.get(record, tensors)}
            for record, tensors in self.records.items()
        }
        return replace(self, records=cut)

    def trains(self, name: str) -> bool:
        """Whether the tensor of this PEFT name learns."""
        return part_of(name) in self.train and self._own_head(name)

    def sent(self) -> dict[str, Tensor]:
        """The tensors of ``start`` that a reply must consist of: its schema. PEFT name → tensor."""
        return self.reply(self.start)

    def reply(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors of a trained adapter that travel back."""
        tensors = adapter.tensors(self.send)
        return {name: t for name, t in tensors.items() if self._own_head(name)}

    def _own_head(self, name: str) -> bool:
        return self.heads is None or head_of(name) is None or head_of(name) in self.heads


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """What to evaluate.

    Attributes:
        adapter: the adapter to measure.
        delta: what to add to the frozen base weights first.
        split: ``test`` is the server's central set, ``holdout`` the site's own held-out part.
        keep: the parts that the site replaces by its own, as in :class:`TrainPlan`.
        shard: (index, count): which slice of the split; the sums over all slices are the result.
        layers: as in :class:`TrainPlan`.
        probe: where set, no scores are asked for: the site compares the blocks of the model on its
            own training rows, and weighs their importance by this measure.
        granularity: whether a probe compares whole blocks, or their halves.
        round, site: as in :class:`TrainPlan`.
    """

    adapter: Adapter
    delta: Delta = field(default_factory=dict[str, Factors])
    split: Literal["test", "holdout"] = "test"
    keep: frozenset[Part] = frozenset()
    shard: tuple[int, int] = (0, 1)
    layers: tuple[Layer, ...] | None = None
    probe: Importance | None = None
    granularity: Granularity = "block"
    round: int = 0
    site: str = ""


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What came back from one site, validated.

    Attributes:
        site: its name.
        examples: the number of examples it trained on; its weight.
        tensors: PEFT name → tensor, exactly the parts the plan asked for.
        start: the adapter the site started from, at its rank.
        metrics: numbers it reported, for example ``loss``.
        staleness: server updates made since the version that ``start`` is of.
        records: of the plan's terms, those that travel up, exactly as their schema has them.
    """

    site: str
    examples: int
    tensors: Mapping[str, Tensor]
    start: Adapter
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    staleness: int = 0
    records: Records = field(default_factory=dict[str, Mapping[str, Tensor]])

    @property
    def adapter(self) -> Adapter:
        """The site's whole adapter after training: what it sent, and the start for the rest."""
        return self.start.replaced(self.tensors)


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything that crosses a round boundary. It *is* the checkpoint.

    Attributes:
        round: rounds completed.
        adapter: the global adapter.
        delta: the change of the base weights so far, in factored form (FLoRA, FedEx-LoRA, …).
        slots: further tensors of the strategy by name, such as a server optimiser's moments.
    """

    adapter: Adapter
    round: int = 0
    delta: Delta = field(default_factory=dict[str, Factors])
    slots: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def record(self, name: str) -> dict[str, Tensor]:
        """A record that the rule keeps in its slots, under :func:`fedft.core.terms.entries`."""
        return taken(name, self.slots)


def clone(tensor: Tensor) -> Tensor:
    """A detached contiguous copy on the CPU."""
    return torch.clone(tensor.detach().cpu()).contiguous()
