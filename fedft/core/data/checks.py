"""Which rows of a table a task can use, and what its labels are called.

Each value is looked at by its column's own check, each row by the task's, and labels become names:
see :mod:`fedft.core.data.labels`. What is wrong is told to :class:`~fedft.core.data.raw.BadRows`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedft.core.data import labels
from fedft.core.data.raw import BadRows, RawTable
from fedft.core.data.readers import local_path
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import Rows
from fedft.core.names import hint
from fedft.core.spec import DataSpec
from fedft.core.tasks import Column, RawRows, Task, taken
from fedft.core.tasks.columns import label_fault
from fedft.core.tasks.formats import Format, named, recognised

_OWNER = Column("owner", label_fault, classes="one")
_NAMED = {True: ("owner", "owners"), False: ("class", "classes")}
"""What the values of a column of names are names of, by whether it is that of the owners."""


def relabelled(table: RawTable, column: Column, name: str, relabel: Mapping[str, str]) -> RawTable:
    """The table with other words for some of its labels.

    Raises:
        ConfigError: a label that has another word is not there.
    """
    if not relabel or name not in table.columns:
        return table
    values = table.columns[name]
    names = _named(column, values, tuple(relabel))
    found = _flat(column, names)
    if absent := [old for old in relabel if old not in found]:
        raise ConfigError(
            f"{table.source} has no label {absent[0][:40]!r}, which is to be called "
            f"{relabel[absent[0]][:40]!r}",
            fix="Check --map-label, OLD=NEW.",
        )

    def other(value: Any, named: Any) -> Any:
        several = _listed(named) if column.classes == "many" else None
        if several is not None:
            return [other(*pair) for pair in zip(value, several, strict=True)]
        return relabel.get(named, value) if isinstance(named, str) else value

    new = [other(*pair) for pair in zip(values, names, strict=True)]
    return replace(table, columns={**table.columns, name: new})


def listed(table: RawTable, spec: DataSpec, task: Task) -> RawTable:
    """The table with lists where its cells spell them in JSON, as those of CSV do."""
    names = {spec.column(c.key) for c in _every(task) if c.lists} & table.columns.keys()
    new = {name: [_spelt(value) for value in table.columns[name]] for name in names}
    return replace(table, columns={**table.columns, **new}) if new else table


def _spelt(value: object) -> object:
    """The list that a text spells; another value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_columns(spec: DataSpec, task: Task) -> None:
    """Refuse a column that is named for a task that reads no such thing.

    Raises:
        ConfigError: naming it and what the task reads.
    """
    named(spec.format, task.formats)
    keys = [*dict.fromkeys(column.key for column in _every(task))]
    if spec.prefix and "text" not in keys:
        raise ConfigError(
            f"[data] prefix = {spec.prefix[:40]!r}: {task.name} reads no column 'text' to put it before",
            fix="Leave the key out.",
        )
    for key in spec.columns:
        if key not in keys:
            raise ConfigError(
                f"[data.columns] {key[:80]} (fedft join: --column): {task.name} reads no such column",
                fix=hint(key[:80], keys),
            )


def checked(
    table: RawTable,
    spec: DataSpec,
    task: Task,
    classes: Sequence[str] | None,
    owner: str | None,
    bad: BadRows,
) -> tuple[RawRows, list[str]]:
    """The usable rows of a table, and notes; ``owner`` None reads no owners."""
    folder = _folder(table.source)
    one = recognised(table.columns, table.source, spec, task.formats) if task.formats else None
    read = _read(table, spec, task, one)
    columns = [*read, *([] if owner is None else [_OWNER])]
    values: dict[str, Sequence[Any]] = {column.key: _values(table, spec, column) for column in read}
    if owner is not None:
        values["owner"] = table.column(owner, "data.partition.column", ConfigError)
    notes: list[str] = []
    if one is not None:
        names_read = ", ".join(spec.column(column.key) for column in read)
        notes.append(
            f"the rows of {table.source} are read as {one.title}: {one.name} ({names_read})"
        )
    for column in columns:
        if column.classes is None:
            continue
        is_owner = column is _OWNER
        names_of = _named(column, values[column.key], () if is_owner else classes or ())
        if is_owner or not classes:
            given, found = (_flat(column, v) for v in (values[column.key], names_of))
            notes += labels.notes(table.source, _NAMED[is_owner], given, found)
        values[column.key] = names_of
    usable = np.ones(len(table), np.bool_)
    for column in columns:
        if _absent(table, spec, column):
            continue
        fault = partial(_fault_of, column, folder)
        _strike(usable, table, values[column.key], column.key, fault, bad)
    if one is not None or type(task).fault is not Task.fault:
        _strike_rows(usable, table, values, read, task.fault if one is None else one.fault, bad)
    names: tuple[str, ...] = ()
    own = [column for column in read if column.classes]
    if own and usable.any():
        kept = np.flatnonzero(usable)
        flat = [name for c in own for name in _flat(c, taken(values[c.key], kept))]
        names = tuple(classes or _class_names(flat, table, bad, spec.key(own[0].key), task.name))
        for column in own:
            known = partial(_unknown, frozenset(names), column)
            _strike(usable, table, values[column.key], column.key, known, bad)
    found = _usable(table, values, read, names, folder, np.flatnonzero(usable), bad)
    rows = replace(found, format="" if one is None else one.name)
    return rows, [*notes, *task.remarks(rows)]


def _every(task: Task) -> list[Column]:
    """The columns of a task and of its formats."""
    return [*task.columns, *(column for one in task.formats for column in one.columns)]


def _read(table: RawTable, spec: DataSpec, task: Task, one: Format | None) -> list[Column]:
    """What is read of a table, which has the columns of a format where the task has formats."""
    if one is None:
        return [c for c in task.columns if not c.optional or c.key in spec.columns]
    return [c for c in one.columns if not c.optional or spec.column(c.key) in table.columns]


def _absent(table: RawTable, spec: DataSpec, column: Column) -> bool:
    """Whether the data do without a column that they may do without, and nobody gave a name to."""
    name = spec.column(column.key)
    return column.implied and name == column.key and name not in table.columns


def _values(table: RawTable, spec: DataSpec, column: Column) -> Sequence[Any]:
    if _absent(table, spec, column):
        return [None] * len(table)
    return table.column(spec.column(column.key), spec.key(column.key), MismatchError)


def _fault_of(column: Column, folder: Path, value: object) -> str | None:
    return column.fault(value, folder)


def _flat(column: Column, values: Sequence[Any]) -> list[Any]:
    """The labels of a column, also where a row has several."""
    if column.classes != "many":
        return list(values)
    return [name for value in values for name in _listed(value) or ()]


def _listed(value: object) -> Sequence[Any] | None:
    """A value that is a list of labels; None of another one."""
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else None


def _named(column: Column, values: Sequence[Any], known: Sequence[str]) -> list[Any]:
    """Values with their labels as names; what is no list of labels stays what it is."""
    names = labels.named(_flat(column, values), known)
    if column.classes != "many":
        return names
    following = iter(names)
    return [
        value if (own := _listed(value)) is None else [next(following) for _ in own]
        for value in values
    ]


def _strike(
    usable: NDArray[np.bool_],
    table: RawTable,
    values: Sequence[Any],
    key: str,
    fault: Callable[[Any], str | None],
    bad: BadRows,
) -> None:
    """Takes the faulty rows of one column out of ``usable``."""
    for row in np.flatnonzero(usable).tolist():
        detail = fault(values[row])
        if detail is not None:
            bad.add(table.where(row), key, f"{key}: {detail}")
            usable[row] = False


def _strike_rows(
    usable: NDArray[np.bool_],
    table: RawTable,
    values: Mapping[str, Sequence[Any]],
    read: Sequence[Column],
    fault: Callable[[Mapping[str, Any]], tuple[str, str] | None],
    bad: BadRows,
) -> None:
    """Takes the rows out whose columns do not fit together."""
    for row in np.flatnonzero(usable).tolist():
        found = fault({c.key: values[c.key][row] for c in read})
        if found is not None:
            key, detail = found
            bad.add(table.where(row), key, f"{key}: {detail}")
            usable[row] = False


def _usable(
    table: RawTable,
    values: Mapping[str, Sequence[Any]],
    read: Sequence[Column],
    names: tuple[str, ...],
    folder: Path,
    rows: Rows,
    bad: BadRows,
) -> RawRows:
    if not len(rows):
        bad.check()
        raise MismatchError(
            f"{table.source} has no rows left after skipping {dict(bad.counts)}",
            fix="correct the data, or the column names in the table [data]",
        )
    index = {name: i for i, name in enumerate(names)}
    kept = {key: taken(column, rows) for key, column in values.items()}
    ids: NDArray[np.int64] | list[NDArray[np.int64]] | None = None
    for column in read:
        if column.classes == "one":
            ids = np.array([index[name] for name in kept[column.key]], np.int64)
        elif column.classes == "many":
            ids = [np.array([index[n] for n in own], np.int64) for own in kept[column.key]]
    return RawRows(
        values={c.key: kept[c.key] for c in read if c.classes is None},
        labels=ids,
        classes=names,
        owners=kept.get("owner"),
        source=table.source,
        lines=np.asarray(table.lines, np.int64)[rows],
        folder=folder,
    )


def _unknown(known: frozenset[str], column: Column, value: Any) -> str | None:
    """What is wrong with labels that are names, where some of them are no class of the run."""
    found = next((name for name in _flat(column, [value]) if name not in known), None)
    if found is None:
        return None
    few = ", ".join(name[:40] for name in sorted(known)[:5]) + (", …" if len(known) > 5 else "")
    return f"{found[:40]!r} is none of the {len(known)} classes ({few}) of the training data"


def _class_names(
    values: Sequence[str], table: RawTable, bad: BadRows, key: str, task: str
) -> list[str]:
    names = sorted(set(values))
    if len(names) < 2:
        bad.check()
        raise MismatchError(
            f"{table.source} has "
            f"{f'only the class {names[0][:40]!r}' if names else 'no class at all'}; {task} needs two "
            "or more",
            fix=f"check {key}, the column with the classes",
        )
    integers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    return sorted(names, key=int) if integers else names


def _folder(source: str) -> Path:
    """Where the relative paths of a source start."""
    path = local_path(source)
    if path is not None and path.is_dir():
        return path
    if path is not None and path.is_file():
        return path.parent
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)
