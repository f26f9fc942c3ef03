"""The parts that adapters have: one table, and the names that PEFT gives their tensors.

Every place that asks which parts there are, or to which one a tensor belongs, reads :data:`PARTS`.
An adapter family with parts of its own adds a row for each.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Part = str
"""Name of a part, a key of :data:`PARTS`."""

PREFIX = "base_model.model."
"""What PEFT puts before the path of a module in the name of a tensor."""


@dataclass(frozen=True)
class PartRow:
    """One part.

    Attributes:
        name: as plans and rules say it.
        key: of its tensors in a layer: ``….<key>.weight``, or ``….<key>.<i>.weight`` where a layer
            has several. None is every tensor that no other row names.
        product: whether it is a factor of the product that a layer's update is.
    """

    name: Part
    key: str | None
    product: bool = False


PARTS: Mapping[Part, PartRow] = {
    row.name: row
    for row in (
        PartRow("A", "lora_A", product=True),
        PartRow("B", "lora_B", product=True),
        PartRow("R", "lora_R", product=True),
        PartRow("router", "lora_router"),
        PartRow("head", None),
    )
}
"""The factors of a layer, B also several times and then with HydraLoRA's router; and the rest: a
task head, and whatever tensors another method of peft has."""

ALL_PARTS: frozenset[Part] = frozenset(PARTS)

MATRICES: frozenset[Part] = frozenset(row.name for row in PARTS.values() if row.product)
"""The parts that make up a layer's update."""

_BY_KEY = {row.key: row.name for row in PARTS.values() if row.key is not None}
(_REST,) = (row.name for row in PARTS.values() if row.key is None)
_TENSOR = re.compile(rf"\.({'|'.join(map(re.escape, _BY_KEY))})(?:\.(\d+))?\.weight$")


def factor_name(module: str, part: Part) -> str:
    """The PEFT name of one factor, e.g. ``base_model.model.layer.0.query.lora_A.weight``."""
    return f"{PREFIX}{module}.{PARTS[part].key}.weight"


def head_name(module: str, head: int) -> str:
    """The name of one of HydraLoRA's up-projections, ``….lora_B.<head>.weight``."""
    return f"{PREFIX}{module}.{PARTS['B'].key}.{head}.weight"


def part_of(name: str) -> Part:
    """Which part of an adapter a PEFT tensor name belongs to."""
    found = _TENSOR.search(name)
    return _REST if found is None else _BY_KEY[found[1]]


def head_of(name: str) -> int | None:
    """Which of HydraLoRA's up-projections a name means; None where it means none of them."""
    found = _TENSOR.search(name)
    return None if found is None or found[2] is None else int(found[2])


def module_of(name: str) -> str:
    """The module path behind the name of a factor."""
    found = _TENSOR.search(name)
    path = name.rsplit(".lora_", 1)[0] if found is None else name[: found.start()]
    return path.removeprefix(PREFIX)


def checked(part: Part) -> Part:
    """The part, if it is one.

    Raises:
        ValueError: it is none.
    """
    if part not in PARTS:
        raise ValueError(f"{part[:40]!r} is no part of an adapter; those are {', '.join(PARTS)}")
    return part
