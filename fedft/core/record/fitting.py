"""Lines that somebody else may have written, held to their declared types.

The types of :mod:`fedft.core.record.lines` say what fedft writes. What is read may come from clients
that nobody vouches for, from a damaged file or from another version: :func:`fitted` makes a line of
the type of it, so that whoever reads it need not doubt every value again.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")

_MISFIT = object()


def fitted(kind: type[T], found: Mapping[str, object]) -> T:
    """A line of a type: a declared key whose value is not of its type counts as absent.

    An absent key that the type requires gets the value that stands for nothing: None where the type
    has it, else no text, no entries, 0, or the first of the words that are allowed. Keys that are not
    declared are kept as they are.

    Args:
        kind: one of the TypedDicts of :mod:`fedft.core.record.lines`.
        found: a JSON object.
    """
    hints = hints_of(kind)
    line = {key: value for key, value in found.items() if key not in hints}
    for key, hint in hints.items():
        value = _fit(found[key], hint) if key in found else _MISFIT
        if value is not _MISFIT:
            line[key] = value
        elif key in required_of(kind):
            line[key] = _nothing(hint)
    return cast(T, line)


def misfits(kind: type[Any], found: Mapping[str, object], place: str = "") -> Iterator[str]:
    """Where a line is not of a type: keys that are not declared, are missing, or have another type."""
    hints = hints_of(kind)
    yield from (f"{place}{key}: not declared" for key in found if key not in hints)
    yield from (f"{place}{key}: missing" for key in required_of(kind) if key not in found)
    for key, hint in hints.items():
        if key in found:
            yield from _misfits(found[key], hint, f"{place}{key}")


def declared(kind: type[Any], keys: Sequence[str]) -> bool:
    """Whether a path of keys leads to something that lines of a type may have."""
    hint: Any = kind
    for key in keys:
        hint = _without_none(hint)
        if hint is object:
            return True
        if is_typeddict(hint):
            if key not in hints_of(hint):
                return False
            hint = hints_of(hint)[key]
        elif get_origin(hint) in _TABLES:
            hint = get_args(hint)[1]
        else:
            return False
    return True


@lru_cache(maxsize=64)
def hints_of(kind: type[Any]) -> Mapping[str, Any]:
    """Key → declared type, of a TypedDict."""
    return get_type_hints(kind)


def required_of(kind: type[Any]) -> frozenset[str]:
    """Keys that every line of a type has."""
    return cast(frozenset[str], kind.__required_keys__)


_TABLES = (dict, Mapping)
_LISTS = (list, Sequence)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _without_none(hint: Any) -> Any:
    """Of ``X | None``: X."""
    return next((option for option in _options(hint) if option is not types.NoneType), hint)


def _fit(value: object, hint: Any) -> object:
    """What of a value is of a type; ``_MISFIT`` where nothing is."""
    found = (_fit_one(value, option) for option in _options(hint))
    return next((one for one in found if one is not _MISFIT), _MISFIT)


def _fit_one(value: object, hint: Any) -> object:
    origin = get_origin(hint)
    if is_typeddict(hint):
        return fitted(hint, cast("Mapping[str, object]", value)) if _is_table(value) else _MISFIT
    if origin in _TABLES and _is_table(value):
        entries = cast("Mapping[str, object]", value).items()
        kept = ((key, _fit(entry, get_args(hint)[1])) for key, entry in entries)
        return {key: entry for key, entry in kept if entry is not _MISFIT}
    if origin in _LISTS and isinstance(value, list | tuple):
        entries = (_fit(entry, get_args(hint)[0]) for entry in cast("Sequence[object]", value))
        return [entry for entry in entries if entry is not _MISFIT]
    return value if _is_plain(value, hint) else _MISFIT


def _misfits(value: object, hint: Any, place: str) -> Iterator[str]:
    allowed = _options(hint)
    if value is not None:  # what it should have been is told, not that it could be absent
        allowed = tuple(option for option in allowed if option is not types.NoneType)
    options = [list(_misfits_one(value, option, place)) for option in allowed]
    if all(options):
        yield from min(options, key=len)


def _misfits_one(value: object, hint: Any, place: str) -> Iterator[str]:
    origin = get_origin(hint)
    if is_typeddict(hint) and _is_table(value):
        yield from misfits(hint, cast("Mapping[str, object]", value), f"{place}.")
    elif origin in _TABLES and _is_table(value):
        for key, entry in cast("Mapping[str, object]", value).items():
            yield from _misfits(entry, get_args(hint)[1], f"{place}.{key}")
    elif origin in _LISTS and isinstance(value, list | tuple):
        for index, entry in enumerate(cast("Sequence[object]", value)):
            yield from _misfits(entry, get_args(hint)[0], f"{place}[{index}]")
    elif not _is_plain(value, hint):
        yield f"{place}: {type(value).__name__} {str(value)[:40]!r} is no {hint}"


def _is_plain(value: object, hint: Any) -> bool:
    """Whether a value is of a type without parts."""
    if hint is object:
        return True
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and not is_typeddict(hint) and isinstance(value, hint)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _nothing(hint: Any) -> object:
    """What stands for an absent value of a type."""
    if types.NoneType in _options(hint):
        return None
    if is_typeddict(hint):
        return fitted(hint, {})
    if get_origin(hint) is Literal:
        return get_args(hint)[0]
    if get_origin(hint) in _TABLES:
        return {}
    return [] if get_origin(hint) in _LISTS else hint()
