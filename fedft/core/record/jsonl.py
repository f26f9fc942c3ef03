"""JSON and JSONL files that a crash may have cut short, and that may come from somebody else."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fedft.core import system
from fedft.core.errors import IntegrityError
from fedft.core.files import MIB, disk, open_plain, read_plain

Record = dict[str, Any]
"""One line of a JSONL file: plain JSON values."""

LARGEST = 64 * MIB
"""Bytes of a file that is read at once."""
_LONGEST = 16 * MIB
"""Bytes of a line. What is longer is damage."""


def plain(value: object, where: str = "record") -> Any:
    """A value as JSON can say it: NaN and infinities become null, tuples lists.

    Null stands for "there is no such number", which JSON has no other word for.

    Raises:
        TypeError: a value that is no JSON, named by its key; tensors are to be turned into numbers
            by whoever knows what they mean.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in items}
    if isinstance(value, list | tuple):
        items = enumerate(cast(Sequence[object], value))
        return [plain(item, f"{where}[{index}]") for index, item in items]
    raise TypeError(f"{where} is a {type(value).__name__}, which is no JSON value")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}, and keys of JSON are strings")
    return key


def _dumps(value: object, indent: int | None = None) -> str:
    # ASCII only (json's default), so that no text a client sent can steer a terminal.
    return json.dumps(value, allow_nan=False, indent=indent)


def pretty(record: Mapping[str, object]) -> bytes:
    """A JSON file for people, ASCII, with a line break at its end."""
    return _dumps(plain(record), indent=2).encode() + b"\n"


def append(file: Path, record: Mapping[str, object]) -> None:
    """Adds one line; numbers that are not finite become null. On disk after :func:`sync`.

    Args:
        file: a JSONL file, made where it is missing.
        record: at least ``round``.
    """
    if type(record.get("round")) is not int:
        raise TypeError(f"a record needs its round, a whole number; got {record.get('round')!r}")
    line = _dumps(plain(record)).encode() + b"\n"
    with disk(f"write {file}"), file.open("ab", buffering=0) as out:
        size = out.tell()
        try:
            # A short write means a full disk; the next one then says so.
            written = out.write(line)
            while written < len(line):
                written += out.write(line[written:])
        except OSError:
            out.truncate(size)
            raise


def read_object(path: Path) -> Record:
    """A JSON object from a file of its own; empty where there is no such file."""
    with disk(f"read {path}"):
        if not path.exists():
            return {}
        text = read_plain(path, largest=LARGEST)
    record = _parsed(text)
    if record is None:
        raise IntegrityError(
            f"{path} is damaged: it is not a JSON object",
            fix="Restore it from a copy of the run directory.",
        )
    return record


def _parsed(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(Record, record) if isinstance(record, dict) else None


def lines(path: Path, until: int | None = None) -> Iterator[tuple[bytes, Record]]:
    """The lines of a JSONL file with what they say, of the rounds up to ``until``.

    What follows the last synced line may be anything after a crash: half a line, or blocks of
    zeros. Damage is therefore an error only where a wanted line comes after it.
    """
    with disk(f"read {path}"):
        if not path.exists():
            return
        damaged = 0
        with open_plain(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
                record = _parsed(line) if line.endswith(b"\n") else None
                if record is None or type(record.get("round")) is not int:
                    damaged = damaged or number
                elif until is None or record["round"] <= until:
                    if damaged:
                        raise _damaged_line(path, damaged)
                    yield line, record


def _damaged_line(path: Path, number: int) -> IntegrityError:
    return IntegrityError(
        f"{path}, line {number} is damaged: it is not the record of a round",
        fix="Where a crash did this, `fedft resume` repairs it; else restore the file from a copy.",
    )


def cut_torn_line(path: Path) -> None:
    """Removes what stands after the last line break: a record that a crash cut short."""
    with disk(f"repair {path}"):
        if not path.exists():
            return
        with path.open("rb+") as file:
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)


def sync(path: Path) -> None:
    """Puts what was appended to a file on disk."""
    descriptor = system.open_file(path, os.O_RDWR)  # Windows syncs what is open for writing only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
