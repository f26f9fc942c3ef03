"""Text files as tables: JSON by lines or as one list, and CSV with any usual separator.

What a file holds decides over what its name says wherever the two can be told apart: a ``.jsonl``
file that is one list is read as such, and a ``.csv`` file may be separated by semicolons.
"""

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Protocol, cast

from fedft.core.data.raw import BadRows, RawTable
from fedft.core.errors import MismatchError
from fedft.core.names import kind_of

MAX_LINE_BYTES = 1_000_000
"""Longest line of a text file. A longer one is not a training example but another kind of file."""


class Stream(Protocol):
    """An open file of bytes, compressed or not, that can be read again from its start."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, or all that are left."""
        ...

    def readline(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, to the end of the line."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go to a place."""
        ...


Read = Callable[[str, Stream, BadRows], RawTable]
"""(source, open file, bad rows) → its rows."""

Row = Mapping[str, object]

_SNIFFED_LINES = 20


def table_of(source: str, rows: Sequence[Row], lines: Sequence[int]) -> RawTable:
    """Rows as columns; the columns are those of any row, in the order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return RawTable(source, {name: [row.get(name) for row in rows] for name in names}, lines)


def text_lines(stream: Stream, source: str, bad: BadRows) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each usable line; memory stays bounded on endless lines."""
    for number in count(1):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line.removesuffix(b"\n")) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            bad.add(
                f"{source}:{number}",
                "long-line",
                f"the line is longer than {MAX_LINE_BYTES:,} bytes, the limit",
            )
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            detail = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
            bad.add(f"{source}:{number}", "encoding", detail)


# JSON


def read_json(source: str, stream: Stream, bad: BadRows) -> RawTable:
    """One object a line, or one list of objects, whose rows are numbered from 1.

    Raises:
        MismatchError: the file is one object over several lines, or a list that cannot be read.
    """
    start = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    if start.startswith(b"["):
        rows = _whole(stream)
        if isinstance(rows, list):
            return _listed(source, cast(list[object], rows), bad)
        if re.match(rb"\[\s*(\{|\n|$)", start):  # a list that was meant, not a line of an array
            raise MismatchError(
                f"{source} begins as a JSON list and is none: {rows}",
                fix="complete the list, or write one object a line",
            )
        stream.seek(0)
    rows, lines = _by_line(source, stream, bad)
    if not rows and start.startswith(b"{"):
        stream.seek(0)
        if isinstance(_whole(stream), dict):
            raise MismatchError(
                f"{source} is one JSON object over several lines, not rows",
                fix="write a list of objects, or one object a line (of pandas: "
                'to_json(path, orient="records", lines=True))',
            )
    return table_of(source, rows, lines)


def _whole(stream: Stream) -> object:
    """The file as one JSON value; why it is none, as text, where it is not a list or an object."""
    try:
        return json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except (RecursionError, ValueError):
        return "too deep or with too long a number"


def _listed(source: str, values: Sequence[object], bad: BadRows) -> RawTable:
    rows: list[Row] = []
    lines: list[int] = []
    for number, value in enumerate(values, 1):
        if isinstance(value, dict):
            rows.append(cast(Row, value))
            lines.append(number)
        else:
            detail = f"a JSON object is expected, got {kind_of(value)}"
            bad.add(f"{source}:{number}", "malformed", detail)
    return table_of(source, rows, lines)


def _by_line(source: str, stream: Stream, bad: BadRows) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in text_lines(stream, source, bad):
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except json.JSONDecodeError as error:
            detail = f"malformed JSON: {error.msg} at column {error.colno}"
            bad.add(f"{source}:{number}", "malformed", detail)
            continue
        except (RecursionError, ValueError):  # nested, or an integer of thousands of digits
            bad.add(f"{source}:{number}", "malformed", "JSON too deep or with too long a number")
            continue
        if not isinstance(value, dict):
            detail = f"a JSON object is expected, got {kind_of(value)}"
            bad.add(f"{source}:{number}", "malformed", detail)
            continue
        rows.append(cast(Row, value))
        lines.append(number)
    return rows, lines


# CSV


def read_csv(source: str, stream: Stream, bad: BadRows) -> RawTable:
    """Rows under a header, separated by commas, semicolons, tabs or bars, whichever fits best."""
    return _separated(source, stream, bad, ",;\t|")


def read_tsv(source: str, stream: Stream, bad: BadRows) -> RawTable:
    """The same, where a tab is the likeliest separator."""
    return _separated(source, stream, bad, "\t,;|")


def _separated(source: str, stream: Stream, bad: BadRows, separators: str) -> RawTable:
    line = 0  # where the reader stands: the last line of the row it gave
    numbered = text_lines(stream, source, bad)
    first = [*islice(numbered, _SNIFFED_LINES)]
    if bad.counts and (not first or first[0][0] > 1):
        bad.check()
        raise MismatchError(
            f"{source}:1: the header cannot be read", fix="save the file as CSV in UTF-8 again"
        )
    while first and not first[0][1].strip():
        del first[0]
    separator = _sniffed([text for _, text in first], separators)
    if first and (told := re.fullmatch(r"sep=(.)\s*", first[0][1])):  # how Excel says it
        separator = told[1]
        del first[0]

    def text() -> Iterator[str]:
        nonlocal line
        for line, content in chain(first, numbered):  # noqa: B007
            yield content

    reader = csv.reader(text(), delimiter=separator)
    header = _header(source, reader, lambda: line)
    rows: list[Row] = []
    lines: list[int] = []
    while True:
        before = line
        try:
            fields = next(reader, None)
        except csv.Error as error:
            bad.add(f"{source}:{line}", "malformed", f"malformed CSV: {_plain(error)}")
            continue
        if fields is None:
            return table_of(source, rows, lines)
        if len(fields) == len(header):
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(line)
        elif fields:
            detail = f"{len(fields)} fields where the header has {len(header)}"
            if line - before > 1:
                detail += f"; the row begins at line {before + 1}: is a quote left open?"
            bad.add(f"{source}:{line}", "malformed", detail)


def _header(source: str, reader: Iterator[list[str]], line: Callable[[], int]) -> list[str]:
    """The names of the columns, without white space around them.

    A column without a name is one that pandas wrote its index to, or that a spreadsheet left
    empty; it gets the name that pandas gives it.
    """
    try:
        fields = next(reader, None)
    except csv.Error as error:
        raise MismatchError(
            f"{source}:{line()}: malformed CSV: {_plain(error)}",
            fix="save the file as plain CSV again",
        ) from error
    if fields is None:
        raise MismatchError(f"{source} has no rows", fix="give data with at least one row")
    header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(fields)]
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise MismatchError(
            f"{source}:{line()}: the first line must name every column once, and "
            f"{twice[0][:40]!r} stands there {header.count(twice[0])} times",
            fix="rename one of these columns, or add a header line",
        )
    return header


def _sniffed(lines: Sequence[str], separators: str) -> str:
    """The separator by which most rows have as many fields as the header; commas where none does.

    Args:
        lines: the first of the file.
        separators: candidates, the likeliest first.
    """

    def fit(separator: str) -> tuple[float, int]:
        found: list[list[str]] = []
        with contextlib.suppress(csv.Error):
            found.extend(row for row in csv.reader(lines, delimiter=separator) if row)
        header, rows = found[0] if found else [], found[1:]
        if len(header) < 2:
            return 0.0, 0
        agree = sum(len(row) == len(header) for row in rows)
        return (1 + agree) / (1 + len(rows)), len(header)

    return max(separators, key=fit)


def _plain(error: csv.Error) -> str:
    """Without advice to whoever wrote the reader."""
    text = str(error)
    return "a line ends in CR alone" if "new-line character" in text else text
