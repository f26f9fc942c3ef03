"""What may come, by name and shape: worked out by each end from the model it knows itself."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedft.core.errors import MismatchError, UpdateRejected
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Expected, Shape
from fedft.core.parts import ALL_PARTS
from fedft.core.sublayers import HALVES
from fedft.core.terms import WAYS, Shapes, Way, records_of, terms_from
from fedft.core.types import Granularity, Part, factor_name, module_of, part_of
from fedft.core.wire.schema import ARRAYS, DELTA, numbers

if TYPE_CHECKING:
    from fedft.core.models import Schema

_NONE: Mapping[str, Shapes] = MappingProxyType({})


def of_adapter(
    schema: "Schema", rank: int, parts: Collection[Part] = ALL_PARTS
) -> dict[str, Shape]:
    """PEFT name → shape of every tensor that these parts of an adapter can have."""
    if schema.tensors:
        carried = {**schema.tensors, **schema.head}
        return {name: shape for name, shape in carried.items() if part_of(name) in parts}
    shapes: dict[str, Shape] = {}
    for module, (d_out, d_in) in schema.modules.items():
        whole: dict[Part, Shape] = {"A": (rank, d_in), "B": (d_out, rank), "R": (rank, rank)}
        for part, shape in whole.items():
            if part in parts:
                shapes[factor_name(module, part)] = shape
    if "head" in parts:
        shapes |= {name: tuple(shape) for name, shape in schema.head.items()}
    return shapes


def of_records(schema: "Schema", fields: Mapping[str, Any], way: Way) -> dict[str, Shapes]:
    """Record → PEFT name → shape of all that the terms of a plan can have beside the adapter.

    A plan of fewer layers, or of some of HydraLoRA's heads, has less; both ends hold what came
    against the plan itself afterwards.

    Args:
        schema: of the model.
        fields: of the plan to train, as JSON data.
        way: which records are meant.

    Raises:
        MismatchError: a term is of no known kind, or two have a record of the same name.
    """
    terms = terms_from(fields.get("terms", []))
    if not terms:
        return {}
    start = of_adapter(schema, int(fields["rank"]))
    trained = {name for name in start if part_of(name) in fields["train"]}
    try:
        return records_of(terms, way, start, trained)
    except ValueError as error:
        raise MismatchError(f"the plan cannot be used: {error}") from error


def beside(schema: "Schema", fields: Mapping[str, Any]) -> int:
    """Numbers that a client holds for the terms of a plan: all records, its own state twice.

    Arguments and errors as of :func:`of_records`.
    """
    down, up, kept = (numbers(of_records(schema, fields, way)) for way in WAYS)
    return down + up + 2 * kept


def of_comparison(schema: "Schema", granularity: Granularity = "block") -> dict[str, Shape]:
    """What a site says of the model's blocks, or their halves: similarities and importance."""
    L = schema.blocks * (1 if granularity == "block" else len(HALVES))
    return {"similarity": (L * (L - 1) // 2,), "importance": (L,)}


def of_work(
    schema: "Schema", rank: int, header: pb.Content, records: Mapping[str, Shapes] = _NONE
) -> Expected:
    """What a server may send a site: an adapter of a rank, a change of the base weights, and records.

    The change may have any rank up to that of the weights themselves, twice over: beyond that a
    factored form is larger than what it stands for. ``records`` are those that the terms of its plan
    receive, see :func:`of_records`.

    Raises:
        UpdateRejected: the rank is none that this model can have.
    """
    largest = min((min(shape) for shape in schema.modules.values()), default=0)
    if not schema.tensors and not 1 <= rank <= largest:
        raise UpdateRejected("shape", f"rank {rank} is none this model can have: 1 to {largest}")
    delta: dict[str, Shape] = {}
    for record in header.records:
        if record.name == DELTA:
            delta = _of_delta(schema, record)
    return {ARRAYS: of_adapter(schema, rank), DELTA: delta, **records}


def _of_delta(schema: "Schema", record: pb.Arrays) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for array in record.arrays:
        module = module_of(array.name)
        names = {factor_name(module, "A"), factor_name(module, "B")}
        if module not in schema.modules or array.name not in names or len(array.shape) != 2:
            raise UpdateRejected("keys", f"delta: {array.name[:100]!r} belongs to no layer here")
        d_out, d_in = schema.modules[module]
        first = array.name == factor_name(module, "A")
        rank = array.shape[0] if first else array.shape[1]
        if not 1 <= rank <= 2 * min(d_out, d_in):
            raise UpdateRejected("shape", f"delta: rank {rank} for a layer of {d_out} x {d_in}")
        shapes[array.name] = (rank, d_in) if first else (d_out, rank)
    return shapes
