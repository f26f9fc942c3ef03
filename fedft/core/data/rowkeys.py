"""Which rows a data set has, whatever file they lie in: what a client's ledger goes by.

A row is known by its values, in any order, case and spacing and under any column names, and by its
longest text alone where that is long enough to be nobody else's. A renamed, sorted, converted,
extended or partly replaced file is therefore recognised by the rows that it shares with an earlier one.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedft.core.data.readers import BadRows, RawTable, read
from fedft.core.examples import image_bytes
from fedft.core.spec import DataSpec
from fedft.core.tasks import task_of

Keys = NDArray[np.uint64]
"""Sorted and distinct. [n]"""

_TELLING = 32
"""Characters from which on a text alone tells a row from others."""


def row_keys(spec: DataSpec, task: str) -> Keys:
    """The keys of all rows of a source that can be read.

    Raises:
        ConfigError, MismatchError: as :func:`fedft.core.data.readers.read`.
    """
    table = read(spec.source, spec.subset, spec.split, BadRows(skip=True))
    files = [spec.column(column.key) for column in task_of(task).columns if column.files]
    path = Path(spec.source).expanduser()
    return keys_of(table, files, path if path.is_dir() else path.parent)


def keys_of(table: RawTable, files: Collection[str], folder: Path) -> Keys:
    """The keys of a table's rows.

    Args:
        table: as it was read.
        files: columns whose values are files, known by their content.
        folder: where relative paths of files start.
    """
    keys: set[int] = set()
    for row in range(len(table)):
        values = sorted(
            value
            for name, column in table.columns.items()
            if (value := _value(column[row], folder if name in files else None))
        )
        keys.add(_key("row", *values))
        longest = max(values, key=len, default="")
        if len(longest) >= _TELLING:
            keys.add(_key("text", longest))
    return np.array(sorted(keys), np.uint64)


def fingerprint(keys: Keys) -> str:
    """A name for a set of rows, in any order. 64 hexadecimal digits"""
    return hashlib.sha256(keys.astype("<u8").tobytes()).hexdigest()


def _value(cell: object, images: Path | None) -> str:
    """A cell as text that is the same in JSON, CSV and Parquet; empty where there is none."""
    if cell is None or cell == "":
        return ""
    content = image_bytes(cell, images) if images is not None else _bytes(cell)
    if content is not None:
        return hashlib.sha256(content).hexdigest()
    if isinstance(cell, str):
        return " ".join(cell.split()).casefold()
    if isinstance(cell, Mapping | list):
        return json.dumps(cell, sort_keys=True, default=str)
    return str(cell).casefold()


def _bytes(cell: object) -> bytes | None:
    if isinstance(cell, Mapping):
        cell = cast("Mapping[str, Any]", cell).get("bytes")
    return cell if isinstance(cell, bytes) else None


def _key(kind: str, *values: str) -> int:
    digest = hashlib.sha256(kind.encode())
    for value in values:
        text = value.encode(errors="surrogatepass")
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest()[:8], "little")
