"""To and from Flower's records: what is said in types on one side of the wire, in bytes on it.

These records make up a message:

    arrays   ArrayRecord   the tensors of an adapter, by PEFT name
    delta    ArrayRecord   the factored change of the base weights, where there is one
    NAME     ArrayRecord   one for every record of the plan's terms that travels this way
    config   ConfigRecord  {"plan": JSON, "task": JSON}; a reply has none
    gathered ArrayRecord   numbers of single test rows, in the reply to an evaluation of the server's own

A reply carries ``arrays`` and ``metrics`` (MetricRecord with ``num-examples``), which is also what
Flower's own strategies expect. What each record consists of is told by
:class:`~fedft.core.wire.schema.PlanSchema`; how a tensor becomes bytes is the business of
:mod:`fedft.core.wire.compress`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.algebra import orthonormal_basis
from fedft.core.errors import MismatchError
from fedft.core.metrics import Tally
from fedft.core.parts import ALL_PARTS
from fedft.core.sublayers import Layer, Sublayer
from fedft.core.terms import terms_from, terms_json
from fedft.core.types import (
    Adapter,
    Delta,
    EvalPlan,
    Factors,
    LocalTraining,
    Part,
    Records,
    TrainPlan,
    factor_name,
    module_of,
)
from fedft.core.wire.changes import Packing
from fedft.core.wire.compress import FP32, Compressor, Key, downward
from fedft.core.wire.dtypes import FRAMING, plain, plain_bytes
from fedft.core.wire.schema import ARRAYS, DELTA, Contents, PlanSchema, fault, finite

KEPT = "fedft.kept"
"""Under this name a site's own state holds the parts of its adapter that never leave it."""


def arrays_from(tensors: Mapping[str, Tensor], compressor: Compressor = FP32) -> ArrayRecord:
    """Encode tensors as a server sends them: floats by the cast of a run, others as they are."""
    return Packing(downward(compressor)).pack(tensors)[0]


def tensors_from(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode a record. bfloat16 comes back as float32, the dtype in which all rules compute."""
    return {name: tensor_from(array) for name, array in record.items()}


def tensor_from(array: Array) -> Tensor:
    """Decode one array, as :func:`tensors_from` does.

    Raises:
        ValueError: the bytes are not what they say they are.
    """
    return plain(array)


GATHERED = "gathered"
"""The record with columns of metrics, of an evaluation of the server's own test set."""


def columns_record(tally: Tally) -> ArrayRecord:
    """What metrics gathered of every item, in float64."""
    return ArrayRecord({name: Array(tally.column(name)) for name in tally.columns})


def columns_from(
    content: RecordDict, widths: Mapping[str, int], count: int
) -> dict[str, list[NDArray[np.float64]]]:
    """The columns of a reply.

    Args:
        content: of the reply; it may lack them.
        widths: name → numbers an item.
        count: of items.

    Raises:
        ValueError: they are others, or of other shapes.
    """
    record = content.array_records.get(GATHERED)
    if record is None:
        return {}
    found = {name: np.asarray(array.numpy(), np.float64) for name, array in record.items()}
    wanted = {name: (count, width) for name, width in widths.items()}
    if {name: column.shape for name, column in found.items()} != wanted:
        raise ValueError("columns of other items than there are")
    return {name: [column] for name, column in found.items()}


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of what a record encodes, without names and headers."""
    return sum(
        plain_bytes(array.dtype, array.shape) if array.stype in FRAMING else len(array.data)
        for array in record.values()
    )


def plan_bytes(plan: TrainPlan, compressor: Compressor = FP32) -> tuple[int, int]:
    """Bytes of all tensors of a ``train`` message and of the reply to it, from their shapes alone."""
    schema = PlanSchema.of(plan)
    return _most(schema.down, downward(compressor)), _most(schema.up, compressor)


def _most(contents: Contents, compressor: Compressor) -> int:
    return sum(compressor.most(shape) for shapes in contents.values() for shape in shapes.values())


def delta_tensors(delta: Delta) -> dict[str, Tensor]:
    """A base delta as named tensors; scales are folded into A."""
    flat: dict[str, Tensor] = {}
    for module, f in delta.items():
        flat[factor_name(module, "A")] = f.scale * f.folded_A()
        flat[factor_name(module, "B")] = f.B
    return flat


def delta_from(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of :func:`delta_tensors`; every scale is 1."""
    modules = dict.fromkeys(module_of(name) for name in tensors)
    return {
        m: Factors(tensors[factor_name(m, "A")], tensors[factor_name(m, "B")], 1.0) for m in modules
    }


def adapter_from(tensors: Mapping[str, Tensor], initial: Adapter, scale: float) -> Adapter:
    """The adapter that the received tensors describe; what did not travel is ``initial``'s."""
    factors = {
        module: Factors(
            A=tensors.get(factor_name(module, "A"), f.A),
            B=tensors.get(factor_name(module, "B"), f.B),
            scale=scale,
            R=tensors.get(factor_name(module, "R"), f.R),
        )
        for module, f in initial.factors.items()
    }
    return Adapter(factors, {name: tensors.get(name, t) for name, t in initial.head.items()})


class Encoder:
    """Encodes the plans of one round.

    The same adapter, or delta, in several plans becomes the same record *object*, so that a grid
    that knows its workers can send it to each of them once.
    """

    def __init__(self, task: str, compressor: Compressor = FP32) -> None:
        self._task = task
        self._compressor = compressor
        self._records: dict[tuple[object, ...], ArrayRecord] = {}
        self._alive: list[object] = []  # an id is unique only while its object lives

    def train(self, plan: TrainPlan) -> RecordDict:
        """The content of a ``train`` message.

        Raises:
            ValueError: the plan's records are not what its terms say.
        """
        wanted = plan.schema("receives")
        if wrong := fault(plan.records, wanted):
            raise ValueError(f"the plan for {plan.site!r} {wrong}")
        fields: dict[str, Any] = {
            "scale": _scale(plan.start),
            "rank": plan.start.rank,
            "train": sorted(plan.train),
            "send": sorted(plan.send),
            "keep": sorted(plan.keep),
            "basis": plan.basis,
            "training": plan.training.to_fields(),
            "layers": plan.layers,
            "heads": plan.heads,
            "round": plan.round,
            "site": plan.site,
        }
        if plan.terms:
            fields["terms"] = terms_json(plan.terms)
        content = self._content(plan.start, plan.receive, plan.delta, fields)
        for record, shapes in wanted.items():
            tensors = plan.records[record]
            content[record] = self._named({name: tensors[name] for name in shapes})
        return content

    def evaluate(self, plan: EvalPlan) -> RecordDict:
        """The content of an ``evaluate`` message."""
        fields = {
            "scale": _scale(plan.adapter),
            "rank": plan.adapter.rank,
            "split": plan.split,
            "keep": sorted(plan.keep),
            "shard": plan.shard,
            "layers": plan.layers,
            "probe": plan.probe,
            "granularity": plan.granularity,
            "round": plan.round,
            "site": plan.site,
        }
        return self._content(plan.adapter, ALL_PARTS, plan.delta, fields)

    def _content(
        self, adapter: Adapter, parts: frozenset[Part], delta: Delta, fields: dict[str, Any]
    ) -> RecordDict:
        content = RecordDict({ARRAYS: self._record(adapter, parts)})
        if delta:
            content[DELTA] = self._record(delta, frozenset())
        content["config"] = ConfigRecord({"plan": json.dumps(fields), "task": self._task})
        return content

    def _record(self, source: Adapter | Delta, parts: frozenset[Part]) -> ArrayRecord:
        key = (id(source), parts)
        if key not in self._records:
            tensors = (
                source.tensors(parts) if isinstance(source, Adapter) else delta_tensors(source)
            )
            self._records[key] = arrays_from(tensors, self._compressor)
            self._alive.append(source)
        return self._records[key]

    def _named(self, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        """A record of a term; plans that have the same tensors in it share one."""
        key = tuple((name, id(tensor)) for name, tensor in tensors.items())
        if key not in self._records:
            self._records[key] = arrays_from(tensors, self._compressor)
            self._alive.append(tensors)
        return self._records[key]


def _scale(adapter: Adapter) -> float:
    return next((f.scale for f in adapter.factors.values()), 1.0)


def message_fields(content: RecordDict) -> dict[str, Any]:
    """The plan's fields of a message, as JSON data."""
    return json.loads(cast(str, content.config_records["config"]["plan"]))


def task_of(content: RecordDict) -> str:
    """The JSON of the :class:`~fedft.core.spec.TaskSpec` that a message belongs to."""
    return cast(str, content.config_records["config"]["task"])


def train_plan(content: RecordDict, initial: Adapter, seed: int) -> TrainPlan:
    """Decode a ``train`` message.

    Args:
        content: as :meth:`Encoder.train` made it.
        initial: the adapter of the common seed at the plan's rank.
        seed: of the run.

    Raises:
        MismatchError: its terms are not known here, or their records are not what they should be.
    """
    fields = message_fields(content)
    basis = fields["basis"]
    if basis is not None:
        initial = _on_basis(initial, basis)
    plan = TrainPlan(
        start=_start(content, initial, fields),
        delta=_delta(content),
        train=frozenset(fields["train"]),
        send=frozenset(fields["send"]),
        keep=frozenset(fields["keep"]),
        basis=basis,
        training=LocalTraining.of_fields(fields["training"]),
        layers=_layers(fields["layers"]),
        heads=_indices(fields["heads"]),
        terms=terms_from(fields.get("terms", [])),
        round=fields["round"],
        site=fields["site"],
        seed=seed,
    )
    return replace(plan, records=_received(content, plan))


def _received(content: RecordDict, plan: TrainPlan) -> dict[str, dict[str, Tensor]]:
    """The records of the plan's terms that came with it, as they should be."""
    try:
        wanted = plan.schema("receives")
    except ValueError as error:
        raise MismatchError(f"the plan cannot be used: {error}") from error
    records = {
        name: tensors_from(record)
        for name, record in content.array_records.items()
        if name not in (ARRAYS, DELTA)
    }
    if wrong := fault(records, wanted):
        raise MismatchError(f"the plan {wrong}")
    for record, tensors in records.items():
        if not finite(tensors.values()):
            raise MismatchError(f"the record {record!r} of the plan contains NaN or Inf")
    return {name: {n: records[name][n] for n in shapes} for name, shapes in wanted.items()}


def eval_plan(content: RecordDict, initial: Adapter) -> EvalPlan:
    """Decode an ``evaluate`` message; arguments as for :func:`train_plan`."""
    fields = message_fields(content)
    return EvalPlan(
        adapter=_start(content, initial, fields),
        delta=_delta(content),
        split=fields["split"],
        keep=frozenset(fields["keep"]),
        shard=tuple(fields["shard"]),
        layers=_layers(fields["layers"]),
        probe=fields["probe"],
        granularity=fields["granularity"],
        round=fields["round"],
        site=fields["site"],
    )


def _start(content: RecordDict, initial: Adapter, fields: dict[str, Any]) -> Adapter:
    received = tensors_from(content.array_records[ARRAYS])
    layers = _layers(fields["layers"])
    held = initial if layers is None else initial.narrowed(layers)
    return adapter_from(received, held, fields["scale"])


def _indices(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _layers(values: list[Any] | None) -> tuple[Layer, ...] | None:
    """Blocks are numbers; a half of one is a pair, as JSON writes a :class:`Sublayer`."""
    if values is None:
        return None
    return tuple(Sublayer(*v) if isinstance(v, list) else v for v in values)


def _on_basis(initial: Adapter, basis: int) -> Adapter:
    factors = {
        module: Factors(*orthonormal_basis(basis, module, f.shape, f.rank), f.scale)
        for module, f in initial.factors.items()
    }
    return initial.map_factors(factors)


def _delta(content: RecordDict) -> dict[str, Factors]:
    record = content.array_records.get(DELTA)
    return delta_from(tensors_from(record)) if record is not None else {}


def reply_content(
    tensors: Mapping[str, Tensor],
    examples: int,
    metrics: Mapping[str, float],
    records: Records = MappingProxyType({}),
) -> RecordDict:
    """The content of a reply in plain float32; ``records`` are those of terms that travel up."""
    return packed_reply(tensors, examples, metrics, Packing(), records)[0]


def packed_reply(
    tensors: Mapping[str, Tensor],
    examples: int,
    metrics: Mapping[str, float],
    packing: Packing,
    records: Records = MappingProxyType({}),
) -> tuple[RecordDict, dict[str, Tensor]]:
    """The content of a reply to a plan to train, and what its encoding left out.

    Args:
        tensors: of the adapter, PEFT name → tensor.
        examples: trained on.
        metrics: name → number.
        packing: how it is encoded.
        records: those of terms that travel up.

    Raises:
        MismatchError: as :meth:`Packing.pack`.
    """
    arrays, left = packing.pack(tensors)
    content = RecordDict({ARRAYS: arrays})
    for name, record in records.items():
        content[name], more = packing.beside(name, record)
        left |= more
    content["metrics"] = MetricRecord({"num-examples": examples, **metrics})
    return content, left


def on_the_wire(adapter: Adapter, compressor: Compressor) -> Adapter:
    """``adapter`` as a client of the run will read it."""
    cast = downward(compressor)
    if cast.exact:
        return adapter
    key = Key()  # of no meaning: a cast draws nothing
    read = {k: cast.decode(cast.encode(t, key)).to(t.dtype) for k, t in adapter.tensors().items()}
    return adapter.replaced(read)


def content_bytes(content: RecordDict) -> int:
    """Bytes of all tensors in a message."""
    return sum(payload_bytes(record) for record in content.array_records.values())
