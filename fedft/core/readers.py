"""Rows from where they lie: vendored, in a file, in a Python package, or on a hub.

Every source becomes one :class:`RawTable`. What is wrong with a row is told to :class:`BadRows`,
which stops at the first or counts them. No message quotes the text of an example.
"""

# pyright: standard
# datasets, pyarrow and yaml have no types; rows are Any here and checked in data.py.
import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from fedft.core.errors import ConfigError, MismatchError
from fedft.core.packages import package_folder

MAX_LINE_BYTES = 1_000_000
"""Longest line of a text file. A longer one is not a training example but another kind of file."""

WORDNET = "wordnet-supersenses"
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, eq=False)
class RawTable:
    """Columns as they were read.

    Attributes:
        source: what the user calls the source, for messages.
        columns: name → one value a row; None where a row does not have the column.
        lines: of each row, its line in a text file or its number elsewhere, from 1.
    """

    source: str
    columns: Mapping[str, Sequence[object]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """``source:line`` of a row."""
        return f"{self.source}:{self.lines[row]}"

    def column(
        self, name: str, key: str, error: type[MismatchError | ConfigError]
    ) -> Sequence[Any]:
        """The values of a column.

        Args:
            name: of the column.
            key: the configuration key that names it.
            error: the class to raise.
        """
        if name in self.columns:
            return self.columns[name]
        nearest = get_close_matches(name, self.columns, n=1, cutoff=0.0)
        raise error(
            f"{self.source} has no column {name!r} ({key}); it has {', '.join(self.columns)}",
            fix=f'set {key} = "{nearest[0]}", or the column you mean',
        )


class BadRows:
    """Stops at the first bad row, or leaves it out and counts it by reason.

    Args:
        skip: count instead of stopping (``data.skip-bad``).
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()

    def add(self, where: str, reason: str, detail: str) -> None:
        """Tells of one bad row.

        Args:
            where: ``source:line``.
            reason: one word to count it by.
            detail: what is wrong, without the text of the example.

        Raises:
            MismatchError: bad rows are not skipped.
        """
        if not self.skip:
            raise MismatchError(
                f"{where}: {detail}",
                fix="correct this row, or set data.skip-bad = true to leave such rows out and count them",
            )
        self.counts[reason] += 1


def read(source: str, subset: str | None, split: str, bad: BadRows) -> RawTable:
    """All rows of a source (see :class:`fedft.core.spec.DataSpec`).

    Raises:
        ConfigError: no known kind of source.
        MismatchError: it is absent, unreadable, empty or has a bad row.
    """
    path = Path(source).expanduser()
    if source == WORDNET:
        table = _read_wordnet(bad)
    elif source.startswith("wheel:"):
        table = _read_wheel(source, bad)
    elif path.suffix in _FILES:
        table = _read_file(source, path, bad)
    elif source and path.is_dir():
        table = _read_datasets(source, subset, split, local=True)
    elif _HUB_ID.fullmatch(source) and not path.exists():
        table = _read_datasets(source, subset, split, local=False)
    else:
        raise ConfigError(
            f"data.source = {source!r} is none of the known kinds",
            fix=f'use "{WORDNET}", a .jsonl, .csv or .parquet file, "wheel:NAME", a folder or a hub id',
        )
    if not len(table):
        skipped = f" left after skipping {bad.counts.total()}" if bad.counts else ""
        raise MismatchError(f"{source} has no rows{skipped}", fix="give data with at least one row")
    return table


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def _table(source: str, rows: Sequence[Mapping[str, object]], lines: Sequence[int]) -> RawTable:
    """Rows as columns; the columns are those of any row, in the order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return RawTable(source, {name: [row.get(name) for row in rows] for name in names}, lines)


# Text files


def _text_lines(
    stream: BinaryIO | gzip.GzipFile, source: str, bad: BadRows
) -> Iterator[tuple[int, str]]:
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


def _read_jsonl(source: str, stream: BinaryIO | gzip.GzipFile, bad: BadRows) -> RawTable:
    rows: list[Mapping[str, object]] = []
    lines: list[int] = []
    for number, line in _text_lines(stream, source, bad):
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
            detail = f"a JSON object is expected, got {type(value).__name__}"
            bad.add(f"{source}:{number}", "malformed", detail)
            continue
        rows.append(value)
        lines.append(number)
    return _table(source, rows, lines)


def _read_csv(source: str, stream: BinaryIO, bad: BadRows) -> RawTable:
    line = 0  # where the reader stands: the last line of the row it gave

    def text() -> Iterator[str]:
        nonlocal line
        for line, content in _text_lines(stream, source, bad):  # noqa: B007
            yield content

    reader = csv.reader(text())
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise MismatchError(
            f"{source}:{line}: malformed CSV: {error}", fix="save the file as plain CSV again"
        ) from error
    if not header or "" in header or len(set(header)) < len(header):
        raise MismatchError(
            f"{source}:1: the first line must name every column once, got {header or []}",
            fix="add a header line",
        )
    rows: list[Mapping[str, object]] = []
    lines: list[int] = []
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            bad.add(f"{source}:{line}", "malformed", f"malformed CSV: {error}")
            continue
        if fields is None:
            return _table(source, rows, lines)
        if len(fields) == len(header):
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(line)
        elif fields:
            detail = f"{len(fields)} fields where the header has {len(header)}"
            bad.add(f"{source}:{line}", "malformed", detail)


def _read_parquet(source: str, stream: BinaryIO, _: BadRows) -> RawTable:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table: Any = parquet.read_table(io.BytesIO(stream.read()))
    except (pa.ArrowException, OSError) as error:
        raise MismatchError(
            f"{source} is not a readable Parquet file: {_first_line(error)}", fix="write it again"
        ) from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return RawTable(source, columns, range(1, table.num_rows + 1))


_FILES: Mapping[str, Callable[[str, BinaryIO, BadRows], RawTable]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_file(source: str, path: Path, bad: BadRows) -> RawTable:
    try:
        with path.open("rb") as stream:
            return _FILES[path.suffix](source, stream, bad)
    except OSError as error:
        raise MismatchError(
            f"cannot read the data file {source}: {error.strerror or error}",
            fix="check the path, which is relative to the current folder, and its permissions",
        ) from error


def _read_wordnet(bad: BadRows) -> RawTable:
    packed = files("fedft.core") / "wordnet" / "definitions.jsonl.gz"
    with packed.open("rb") as raw, gzip.open(raw) as stream:
        return _read_jsonl(WORDNET, stream, bad)


# Python packages that carry data


def _read_wheel(source: str, bad: BadRows) -> RawTable:
    name = source.removeprefix("wheel:")
    if name not in _WHEELS:
        raise ConfigError(
            f"data.source = {source!r}: no reader for the data of that package",
            fix=f"use one of: {', '.join(f'wheel:{known}' for known in _WHEELS)}",
        )
    # Found, not imported: the code of a data package has no business here.
    return _WHEELS[name](source, package_folder(name), bad)


def _read_chatterbot(source: str, folder: Path, bad: BadRows) -> RawTable:
    """English question-answer pairs with their topic, which serves as the natural owner.

    A conversation of more than two turns gives a pair for each further turn: the first is the
    prompt. Blank turns, of which the corpus has a few, are left out.
    """
    import yaml

    rows: list[Mapping[str, object]] = []
    for path in sorted((folder / "data" / "english").glob("*.yml")):
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            turns: Iterable[Any] = content["conversations"]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            bad.add(f"{source}/{path.name}", "malformed", f"malformed YAML: {_first_line(error)}")
            continue
        rows.extend(
            {"prompt": str(prompt), "answer": str(answer), "topic": path.stem}
            for prompt, *answers in turns
            for answer in answers
            if str(prompt).strip() and str(answer or "").strip()
        )
    return _table(source, rows, range(1, len(rows) + 1))


_WHEELS: Mapping[str, Callable[[str, Path, BadRows], RawTable]] = {
    "chatterbot-corpus": _read_chatterbot,
}


# The datasets library


def _read_datasets(source: str, subset: str | None, split: str, *, local: bool) -> RawTable:
    import datasets

    arguments = ", ".join([repr(source), *([repr(subset)] if subset else []), f"split={split!r}"])
    try:
        with _offline_unless(local or _hub_answers()):
            data: Any = datasets.load_dataset(source, subset, split=split)
    except ConnectionError as error:
        raise MismatchError(
            f"data.source = {source!r} is not in the local cache, and the hub cannot be reached",
            fix=f'where there is a network: python -c "import datasets; datasets.load_dataset({arguments})"',
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise MismatchError(
            f"datasets.load_dataset({arguments}) failed: {_first_line(error)}",
            fix="check data.source, data.subset and data.split",
        ) from error
    return _from_dataset(source, data)


def _from_dataset(source: str, data: Any) -> RawTable:
    """Class ids become names, and images stay encoded: thousands of decoded ones fill memory."""
    import datasets

    columns: dict[str, Sequence[object]] = {}
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        values: list[Any] = data[name][:]
        if isinstance(feature, datasets.ClassLabel):
            names: list[str] = feature.names
            # -1 is how the library marks a row without a label.
            values = [None if v is None or v < 0 else names[v] for v in values]
        columns[name] = values
    return RawTable(source, columns, range(1, len(data) + 1))


def _hub_answers() -> bool:
    """Whether the hub can be reached: one short request, where the library would try for long."""
    import httpx
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode():
        return False
    try:
        session: Any = huggingface_hub.get_session()
        session.head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except (httpx.HTTPError, OSError):
        return False
    return True


@contextmanager
def _offline_unless(online: bool) -> Generator[None]:
    """Sends the library straight to its cache; it reads its setting at import, so it is set there."""
    from datasets import config
    from huggingface_hub import constants

    if online:
        yield
        return
    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
