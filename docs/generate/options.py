"""The options reference: every key of every table of a configuration, from the tables themselves."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedft.server.config import RunConfig
from fedft.strategies import RULES

SINCE = "0.1"
"""The version that has had a key, unless its field says otherwise (`json_schema_extra`)."""

_SUFFIXES = {
    "_s": "seconds",
    "_mib": "MiB",
    "_mbps": "Mbit/s",
    "_mb": "MB",
    "_epsilon": "ε",
    "_rounds": "rounds",
}
_UNITS = {
    "clients": "clients",
    "per_round": "clients",
    "expected_sites": "clients",
    "quorum": "replies",
    "size": "replies",
    "spares": "clients",
    "count": "rounds",
    "evaluate_every": "rounds",
    "recluster_every": "rounds",
    "every": "rounds",
    "patience": "evaluations",
    "retries": "attempts",
    "keep_checkpoints": "checkpoints",
    "epochs": "epochs",
    "steps": "optimiser steps",
    "batch_size": "examples",
    "accumulate": "forward passes",
    "label_smoothing": "fraction",
    "max_batch": "examples",
    "speeds": "examples/s",
    "samples_per_s": "examples/s",
    "max_length": "tokens",
    "max_new_tokens": "tokens",
    "min_rows": "rows",
    "rows_per_client": "rows",
    "max_rows": "rows",
    "shards_per_client": "shards",
    "byzantine": "clients",
    "select": "clients",
    "workers": "processes",
    "threads": "threads",
    "gpus_per_worker": "GPUs",
    "cohort": "clients",
    "share": "fraction",
    "holdout": "fraction",
    "test_fraction": "fraction",
    "model_shares": "fraction",
}


@dataclass(frozen=True)
class Option:
    """One key.

    Attributes:
        table: where it stands, as in TOML: ``rounds``, ``data.partition``.
        key: its name there.
        kind: what values it takes.
        default: as TOML, or what an absent key means.
        unit: of a number; empty where it counts nothing.
        since: the version that has it.
        effect: what it does, from the docstring of its table.
    """

    table: str
    key: str
    kind: str
    default: str
    unit: str
    since: str
    effect: str


def tables() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table that a configuration can have, by its name in TOML; rules by theirs."""
    yield "", RunConfig
    for name, field in RunConfig.model_fields.items():
        if name != "strategy":
            yield from _with_inner(_key(name, field), field.annotation)
    for rule in RULES:
        name = f"strategy: {rule.model_fields['name'].default}"
        yield name, rule
        for key, field in rule.model_fields.items():
            if key != "inner":
                yield from _with_inner(f"{name}.{_key(key, field)}", field.annotation)


def _with_inner(name: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    for model in _models(annotation):
        yield name, model
        for key, field in model.model_fields.items():
            yield from _with_inner(f"{name}.{_key(key, field)}", field.annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    found = [model for part in get_args(annotation) for model in _models(part)]
    return list(dict.fromkeys(found))


def options() -> list[Option]:
    """Every key, in the order of the configuration. A table is a key of the table around it."""
    found: dict[tuple[str, str], Option] = {}
    for table, model in tables():
        about = effects(model)
        for name, field in model.model_fields.items():
            # A rule's name chooses it, and tables of the whole have sections of their own.
            chosen = name == "name" and model in RULES
            if not chosen and not (model is RunConfig and _models(field.annotation)):
                below = [
                    (model.__doc__ or "").split("\n\n")[0] for model in _models(field.annotation)
                ]
                option = _option(table, name, field, about.get(name) or " ".join(below))
                found.setdefault((option.table, option.key), option)
    return list(found.values())


def _option(table: str, name: str, field: FieldInfo, effect: str) -> Option:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    suffix = next((unit for end, unit in _SUFFIXES.items() if name.endswith(end)), "")
    rule = name == "inner"
    return Option(
        table,
        _key(name, field),
        "table of a rule" if rule else kinds(field.annotation),
        default(field),
        str(extra.get("unit", _UNITS.get(name, suffix))),
        str(extra.get("since", SINCE)),
        plain(effect),
    )


def plain(text: str) -> str:
    """A docstring's text as Markdown on one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return re.sub(r"\bNone\b", "none", text.replace("``", "`")).replace("|", "\\|")


def _key(name: str, field: FieldInfo) -> str:
    return field.alias or name.replace("_", "-")


def default(field: FieldInfo) -> str:
    """As TOML would have it; "none" where the key is absent, "required" where it must be there."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return _toml(value)


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        name = getattr(value, "name", None) or getattr(value, "kind", None)
        return f"`{name}`" if name else "as its keys"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(_toml(item).strip('`') for item in value)}]`"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def kinds(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """What values an annotation takes, in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(_toml(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        parts = [kinds(part) for part in get_args(annotation) if part is not NoneType]
        return " or ".join(dict.fromkeys(parts))
    if origin in (tuple, list, frozenset, set):
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return f"list of {kinds(inner[0])}" if inner else "list"
    if origin is not None and origin.__name__ in ("dict", "Mapping"):
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    names = {bool: "boolean", int: "integer", float: "number", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def effects(model: type[Any]) -> dict[str, str]:
    """What docstrings say of each attribute: a class that one refers to, the bases, the table."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        text = base.__doc__ or ""
        if base is object or base is BaseModel:
            continue
        if other := re.search(r"See :class:`~?([\w.]+)\.(\w+)`", text):
            found |= effects(getattr(import_module(other[1]), other[2]))
        if section := re.search(r"Attributes:\n(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL):
            entry = rf"^ {{{_indent(section[1])}}}([a-zA-Z_, 0-9]+): (.*?)(?=^ {{{_indent(section[1])}}}\S|\Z)"
            for names, about in re.findall(entry, section[1], re.DOTALL | re.MULTILINE):
                found |= {name.strip(): about for name in names.split(",")}
    return found


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


HEAD = """# Options

Every key of a configuration, made from the tables that read it.
`fedft plan CONFIG` writes out a run's own, with all defaults.
"None" is an absent key: TOML has no null.
Numbers in a column of units count what it names.
"""


def page() -> str:
    """The reference as Markdown, a section a table."""
    parts, last = [HEAD], None
    for option in options():
        if option.table != last:
            last = option.table
            parts.append(_heading(option.table))
        parts.append(
            f"| `{option.key}` | {option.kind} | {option.default} | {option.unit or '–'} "
            f"| {option.since} | {option.effect} |\n"
        )
    bare = {name for name, _ in tables()} - {option.table for option in options()}
    rules = ", ".join(f"`{name.removeprefix('strategy: ')}`" for name in sorted(bare))
    parts.append(f"\n## Rules without keys of their own\n\n{rules}.\n")
    return "".join(parts)


def _heading(table: str) -> str:
    name, _, rest = table.removeprefix("strategy: ").partition(".")
    if table.startswith("strategy"):
        title = f"[strategy] {rest} of {name}" if rest else f'[strategy] name = "{name}"'
    else:
        title = f"[{table}]" if table else "At the top"
    columns = "| key | values | default | unit | since | effect |\n|---|---|---|---|---|---|\n"
    return f"\n## `{title}`\n\n{columns}" if table else f"\n## {title}\n\n{columns}"
