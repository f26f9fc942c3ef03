"""What the messages of a plan consist of: every record, its tensors and their shapes, in one place.

Whoever needs to know what travels, or what stays at a client, asks here: the encoder, both ends'
checks, the count of bytes, the forecast of memory and a client's own state. What a record of a term
consists of is said by :meth:`fedft.core.terms.Term.shapes`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedft.core.terms import Shapes, entries
from fedft.core.types import Records, TrainPlan, factor_name

ARRAYS = "arrays"
"""The record of the adapter's tensors."""

DELTA = "delta"
"""The record of the change of the base weights."""

Contents = Mapping[str, Shapes]
"""Name of a record → PEFT name → shape."""


@dataclass(frozen=True)
class PlanSchema:
    """The records of one plan.

    Attributes:
        down: of the message with the plan; no record of a base change where there is none.
        up: of the reply to it.
        kept: of the terms: what stays at the client.
        parts: PEFT name → shape of what stays there of the adapter itself.
    """

    down: Contents
    up: Contents
    kept: Contents
    parts: Shapes

    @classmethod
    def of(cls, plan: TrainPlan) -> "PlanSchema":
        """Of a plan, as the server has it or as a client has decoded it.

        Raises:
            ValueError: two terms have a record of the same name.
        """
        delta = {
            factor_name(module, part): shape
            for module, f in plan.delta.items()
            for part, shape in (("A", tuple(f.A.shape)), ("B", tuple(f.B.shape)))
        }
        return cls(
            down={
                ARRAYS: _shapes(plan.start.tensors(plan.receive)),
                **({DELTA: delta} if delta else {}),
                **plan.schema("receives"),
            },
            up={ARRAYS: _shapes(plan.sent()), **plan.schema("sends")},
            kept=plan.schema("keeps"),
            parts=_shapes(plan.start.tensors(plan.keep)),
        )

    @property
    def state(self) -> Shapes:
        """What a client's own state consists of after this plan: name in the state → shape."""
        named = dict(self.parts)
        for record, shapes in self.kept.items():
            named |= entries(record, shapes)
        return named


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def numbers(contents: Contents) -> int:
    """How many numbers the tensors of some records have."""
    return sum(math.prod(shape) for shapes in contents.values() for shape in shapes.values())


def fault(records: Records, wanted: Contents) -> str:
    """What is wrong with some records of tensors, in a sentence without a subject; empty if nothing.

    Args:
        records: as they are.
        wanted: as the schema has them: none missing, none beside.
    """
    if foreign := records.keys() - wanted.keys():
        return f"has a record {min(foreign)!r}, which no term of the plan has"
    for record, shapes in wanted.items():
        tensors = records.get(record)
        if tensors is None:
            return f"lacks the record {record!r}"
        if missing := shapes.keys() - tensors.keys():
            return f"lacks {min(missing)} in the record {record!r}"
        if foreign := tensors.keys() - shapes.keys():
            return f"has {min(foreign)} in the record {record!r}, which is none of it"
        for name, shape in shapes.items():
            found = tuple(tensors[name].shape)
            if found != shape:
                return (
                    f"has {name} in the record {record!r} of shape {list(found)}, not {list(shape)}"
                )
    return ""


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of some tensors is one."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
