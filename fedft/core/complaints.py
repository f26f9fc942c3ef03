"""What a table of the configuration says wrong, in words of the configuration.

pydantic finds the faults; its own sentences name its types, and one fault of a key that may be of
several types is several sentences. Here each key gets one: its place, its value and the rule.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, cast

from pydantic import ValidationError

_EXPECTED: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
    "mapping": "a table",
    "dataclass": "a table",
}
"""First word of pydantic's name of a fault of type → what was expected."""

_BRANCH = re.compile(
    r".*\[.*|(constrained-)?(int|float|str|bool|tuple|list|dict)|distribution|function-.*|nullable"
)
"""Names that pydantic puts into a path for the alternatives of one key; none of them is a key."""

_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}

_SHOWN = 60


@dataclass(frozen=True)
class Complaint:
    """One fault.

    Attributes:
        path: keys from the outermost table to the one at fault; a position in a list as text.
        kind: pydantic's word for the kind of fault.
        value: that was given.
        rule: that it breaks, in words.
        about_table: whether it is a table as a whole that breaks the rule.
    """

    path: tuple[str, ...]
    kind: str
    value: Any
    rule: str
    about_table: bool

    @property
    def shown(self) -> str:
        """The value as one would write it in TOML, cut where it is long."""
        return shown(self.value)


def complaints(error: ValidationError) -> list[Complaint]:
    """The faults of a table, one a key."""
    found: dict[tuple[str, ...], list[tuple[Mapping[str, Any], str, bool]]] = {}
    for item in cast(Sequence[Mapping[str, Any]], error.errors(include_url=False)):
        path = _path(item)
        rule, expectation = _rule(item)
        found.setdefault(path, []).append((item, rule, expectation))
    result: list[Complaint] = []
    for path, items in found.items():
        item = items[0][0]
        rules = list(dict.fromkeys(rule for _, rule, _ in items))
        expected = [rule for _, rule, expectation in items if expectation]
        if expected and any(len(p) > len(path) and p[: len(path)] == path for p in found):
            continue  # of another alternative: one of the values inside is what is wrong
        rule = f"{_any_of(list(dict.fromkeys(expected)))} is expected" if expected else rules[0]
        if len(expected) < len(items):  # of the right type in one of the alternatives
            rule = next(rule for _, rule, expectation in items if not expectation)
        whole = item["type"] == "value_error" and not isinstance(item["input"], str | int | float)
        result.append(Complaint(path, str(item["type"]), item["input"], rule, whole))
    return result


def _any_of(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def shown(value: object) -> str:
    """A value as one would write it in TOML, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a whole number of many digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _path(item: Mapping[str, Any]) -> tuple[str, ...]:
    parts = [str(part) for part in item["loc"]]
    last = len(parts) - 1
    own = item["type"] == "extra_forbidden"
    return tuple(p for i, p in enumerate(parts) if (own and i == last) or not _BRANCH.fullmatch(p))


def _rule(item: Mapping[str, Any]) -> tuple[str, bool]:
    """The rule in words, and whether it says what is expected."""
    kind, context = str(item["type"]), item.get("ctx", {})
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "literal_error":
        return str(context["expected"]), True
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return f"must be {words} {bound if isinstance(bound, int) else format(bound, 'g')}", False
    if kind == "finite_number":
        return "must be a finite number", False
    if kind == "missing":
        return "is missing", False
    if kind == "string_unicode":
        return "text in UTF-8", True
    if kind == "int_parsing_size":
        return "must have fewer digits", False
    if kind in ("too_short", "too_long"):
        return "has too few values" if kind == "too_short" else "has too many values", False
    if kind == "value_error":
        return message, False
    if (word := kind.split("_")[0]) in _EXPECTED:
        return _EXPECTED[word], True
    return message.replace("Input should be", "must be"), False
