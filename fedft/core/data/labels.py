"""Labels and owners as names: one spelling for each, whatever file they came in.

The same table saved as JSON, CSV or Parquet has the same classes: white space around a label does
not count, ``1``, ``1.0`` and ``"1"`` are one class, booleans are ``True`` and ``False``, and what stands
for a missing value in an export (NaN, ``<NA>``) is missing.
"""

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

MISSING = frozenset({"nan", "NaN", "NAN", "-nan", "NaT", "<NA>", "#N/A"})
"""Words that programs write where there is no value, and people do not use for a class."""

_DOUBTFUL = frozenset({"none", "null", "na", "n/a", "nil", "?", "-"})
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0+)?")
_UNSEEN = "\ufeff\u200b\u2060"
_NOTED = 5


def named(values: Sequence[object], known: Iterable[str] = ()) -> list[object]:
    """Each value as a name; None where it is missing, and itself where it can be no name.

    Args:
        values: a column.
        known: names that exist already, where other data came before.
    """
    names = set(known)
    cleaned = [_name(value) for value in values]
    if names:
        return [_matched(value, names) for value in cleaned]
    texts = {value for value in cleaned if isinstance(value, str)}
    # "1.0" is what a column of integers becomes when one is missing; beside "1.1" it is a name.
    if not all(map(_WHOLE.fullmatch, texts)):
        return cleaned
    return [_integer(value) if isinstance(value, str) else value for value in cleaned]


def notes(
    source: str, what: tuple[str, str], values: Sequence[object], names: Sequence[object]
) -> list[str]:
    """What a reader should know of how the values became names.

    Args:
        source: of the data.
        what: the names are, one and several: ``("class", "classes")``.
        values: a column.
        names: as :func:`named` made them of it.
    """
    one, many = what
    spellings: dict[str, dict[str, None]] = {}
    for value, name in zip(values, names, strict=True):
        if isinstance(name, str):
            spellings.setdefault(name, {})[_shown(value)] = None
    merged = {name: list(found) for name, found in spellings.items() if len(found) > 1}
    said = [
        f"{source}: {', '.join(found[:-1][:3])} and {found[-1]} are taken for one {one}, {_shown(name)}"
        for name, found in sorted(merged.items())
    ]
    alike: dict[str, list[str]] = {}
    for name in sorted(spellings):
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    said += [
        f"{source}: {', '.join(map(_shown, same))} are different {many}; they differ in case or inner space only"
        for same in alike.values()
        if len(same) > 1
    ]
    said += [
        f"{source}: {_shown(name)} is one of the {many}; if it stands for a missing value, leave it empty"
        for name in sorted(spellings)
        if name.casefold() in _DOUBTFUL
    ]
    more = len(said) - _NOTED
    return said[:_NOTED] + ([f"{source}: {more} more such notes on its {many}"] if more > 0 else [])


def _name(value: object) -> object:
    if isinstance(value, str):
        text = value.strip().strip(_UNSEEN).strip()
        return None if not text or text in MISSING else text
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if math.isfinite(value) and value == int(value):
            return str(int(value))
    return value


def _matched(value: object, names: set[str]) -> object:
    """A name of other data that this one stands for."""
    if isinstance(value, str) and value not in names and _integer(value) in names:
        return _integer(value)
    return value


def _integer(text: str) -> str:
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole and whole[2] else text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 42 else f"{text[:40]}…"
