"""What is wrong with a configuration, a sentence a fault: where, what, and the nearest valid name."""

from typing import Any, get_args

from pydantic import BaseModel

from fedft.core.complaints import Complaint
from fedft.core.names import hint
from fedft.core.plugins import is_reference
from fedft.strategies import REGISTRY


def sentence(fault: Complaint, root: type[BaseModel]) -> str:
    """One fault in words.

    Args:
        fault: of the configuration.
        root: the outermost table.
    """
    path = fault.path
    if not path:
        return fault.rule
    if fault.kind == "extra_forbidden":
        return f"{place(path)}: unknown key; {hint(path[-1][:100], _keys_beside(path, root))}"
    if fault.kind == "missing":
        return f"{place(path)} is missing"
    if path == ("strategy",) and isinstance(fault.value, str):
        return f"strategy = {fault.shown}: write [strategy] name = {fault.shown}"
    if fault.kind == "unknown_name":
        return f"{place((*path, 'name'))}: {fault.rule}"
    if fault.about_table:
        tables = [part for part in path if not _is_name(part)]
        return (
            f"[{'.'.join(tables)}] {fault.rule}" if not fault.rule.startswith("[") else fault.rule
        )
    return f"{place(path)} = {fault.shown}: {fault.rule}"


def place(path: tuple[str, ...]) -> str:
    """``[table] key``, with the position behind the key where it is one value of a list."""
    parts: list[str] = []
    for part in (part if len(part) <= 60 else f"{part[:60]}…" for part in path):
        if part.isdecimal() and parts:
            parts[-1] += f"[{part}]"
        elif part == path[-1] or not _is_name(part):
            parts.append(part)
    return f"[{'.'.join(parts[:-1])}] {parts[-1]}" if len(parts) > 1 else parts[0]


def _is_name(part: str) -> bool:
    """Whether a part of a path is the name of a rule, which stands there beside the keys."""
    return is_reference(part) or part in REGISTRY.names()


def _keys_beside(path: tuple[str, ...], root: type[BaseModel]) -> list[str]:
    """The valid keys of the table in which an unknown key was found."""
    model: Any = root
    for part in path[:-1]:
        if (rule := REGISTRY.known(part)) is not None:
            model = rule
            continue
        fields = {f.alias or n: f for n, f in model.model_fields.items()}
        if part in fields:
            model = _table_in(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The table that a key holds, also where it may be none or a list of such."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _table_in(arg))), None)
