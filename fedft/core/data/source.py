"""Data for one task: read, checked, divided into training and test rows, and encoded.

    source ──read──► RawTable ──load──► RawData(train, test) ──prepare──► Data(train, test: Examples)

Bad rows are told together, each with file, line and reason, or left out and counted with
``data.skip-bad``.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedft.core.data import labels
from fedft.core.data.raw import BadRows, RawTable, kind_of
from fedft.core.data.readers import local_path, read
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import Examples, ImageExamples, Rows, image_fault
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec
from fedft.core.text import tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedft.core.text.special_tokens import TextEncoder

Task = Literal["classification", "causal-lm", "image-classification"]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RawRows:
    """Checked rows, not yet encoded.

    Attributes:
        inputs: texts, prompts or images.
        labels: class ids, int64 [n]; None for causal-lm.
        answers: of causal-lm; None elsewhere.
        owners: values of ``partition.column``; None where no column is named.
        source, lines: where each row comes from, for messages. int64 [n]
    """

    inputs: Sequence[Any]
    labels: NDArray[np.int64] | None
    answers: Sequence[str] | None
    owners: Sequence[str] | None
    source: str
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Rows) -> "RawRows":
        """The given rows, in the given order."""
        return RawRows(
            _take(self.inputs, rows),
            None if self.labels is None else self.labels[rows],
            None if self.answers is None else _take(self.answers, rows),
            None if self.owners is None else _take(self.owners, rows),
            self.source,
            self.lines[rows],
        )

    def where(self, row: int) -> str:
        """``source:line`` of a row."""
        return f"{self.source}:{self.lines[row]}"


@dataclass(frozen=True, eq=False)
class RawData:
    """Both splits before encoding.

    Attributes:
        classes: class names; a class id is an index of this. Empty for causal-lm.
        skipped: bad rows that were left out, by reason.
        notes: what a reader should know of the data, a sentence each.
    """

    train: RawRows
    test: RawRows
    classes: tuple[str, ...]
    skipped: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Data:
    """Both splits, encoded.

    Attributes:
        train: what the sites hold between them; ``train.labels`` are what partitions go by.
        test: the server's central test set; empty without a test fraction or source.
        classes: class names; empty for causal-lm.
        owners: values of ``partition.column``, one a row of ``train``; None without a column.
        skipped: bad rows that were left out, by reason.
        fingerprint: SHA-256 over both splits and the class names, for the run record.
        notes: what a reader should know of the data, a sentence each.
        cut: rows of ``train`` and of ``test`` that were longer than ``data.max-length``.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...]
    owners: Sequence[str] | None
    skipped: Mapping[str, int]
    fingerprint: str
    cut: Mapping[str, int]
    notes: tuple[str, ...] = ()


def load(
    spec: DataSpec,
    task: Task,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    relabel: Mapping[str, str] | None = None,
    most_rows: int | None = None,
) -> RawData:
    """Reads and checks the data and sets the test rows aside.

    Args:
        spec: the data's table.
        task: what is fine-tuned.
        seed: of the run; the test split is a function of it and of the data.
        classes: the run's class names, where a site reads data of its own; None takes those of
            the data, in numerical order where all are integers, else in that of their text.
        relabel: label → class, of a site whose own words are others.
        most_rows: read no more rows than that, the first ones.

    Raises:
        ConfigError: the source or the partition's column cannot be.
        MismatchError: the data are absent, empty, lack a column or have bad rows.
    """
    bad = BadRows(spec.skip_bad)
    table = read(spec.source, spec.subset, spec.split, bad)
    table = _first(_relabelled(table, spec.label, relabel or {}), most_rows)
    rows, names, notes = _checked(table, spec, task, classes, spec.partition.column, bad)
    if spec.test_source is not None:
        test_table = read(spec.test_source, spec.subset, spec.split, bad, key="data.test-source")
        test, _, _ = _checked(test_table, spec, task, names, None, bad)
        train = rows
    else:
        held = test_rows(len(rows), spec.test_fraction, seed, rows.labels, rows.owners)
        train = rows.take(np.flatnonzero(~held))
        test = rows.take(np.flatnonzero(held))
    bad.check()
    return RawData(train, test, names, dict(bad.counts), tuple(notes))


def prepare(
    spec: DataSpec,
    task: Task,
    encoder: "TextEncoder | PreTrainedTokenizerBase | Callable[[Any], Tensor]",
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    relabel: Mapping[str, str] | None = None,
    most_rows: int | None = None,
) -> Data:
    """Loads and encodes: what a simulation, a server and a site start from.

    Args:
        spec: the data's table.
        task: what is fine-tuned.
        encoder: the model's tokenizer, with what was decided about its special tokens or without; for image-classification a function from an RGB image
            to pixel values [c, h, w].
        seed: as for :func:`load`.
        classes: as for :func:`load`.
        relabel: as for :func:`load`.
        most_rows: as for :func:`load`.

    Raises:
        ConfigError, MismatchError: as :func:`load`; or a row has no token of its answer left.
    """
    raw = load(spec, task, seed=seed, classes=classes, relabel=relabel, most_rows=most_rows)
    bad = BadRows(spec.skip_bad)
    train, kept, cut = _encode(raw.train, task, encoder, spec.max_length, bad)
    test, _, cut_of_test = _encode(raw.test, task, encoder, spec.max_length, bad)
    bad.check()
    if not len(train):
        raise MismatchError(
            f"{spec.source} has no training rows left after skipping {dict(bad.counts)}",
            fix="raise data.max-length, or correct the data",
        )
    identity = "\n".join([train.fingerprint(), test.fingerprint(), *raw.classes])
    return Data(
        train,
        test,
        raw.classes,
        None if raw.train.owners is None else _take(raw.train.owners, kept),
        dict(Counter(raw.skipped) + bad.counts),
        hashlib.sha256(identity.encode()).hexdigest(),
        {"train": cut, "test": cut_of_test},
        raw.notes,
    )


def _relabelled(table: RawTable, column: str, relabel: Mapping[str, str]) -> RawTable:
    """The table with other words for some of its labels.

    Raises:
        ConfigError: a label that has another word is not there.
    """
    if not relabel or column not in table.columns:
        return table
    values = table.columns[column]
    names = labels.named(values, relabel)
    if absent := [old for old in relabel if old not in names]:
        raise ConfigError(
            f"{table.source} has no label {absent[0][:40]!r}, which is to be called "
            f"{relabel[absent[0]][:40]!r}",
            fix="Check --map-label, OLD=NEW.",
        )
    new = [
        relabel.get(name, value) if isinstance(name, str) else value
        for name, value in zip(names, values, strict=True)
    ]
    return replace(table, columns={**table.columns, column: new})


def _first(table: RawTable, rows: int | None) -> RawTable:
    if rows is None or rows >= len(table):
        return table
    columns = {name: values[:rows] for name, values in table.columns.items()}
    return RawTable(table.source, columns, table.lines[:rows])


def check_test(spec: DataSpec, test: int, rows: int) -> None:
    """Refuse a run that could never be scored: every path to round 1 asks this first.

    Args:
        spec: the data's table.
        test: rows of the central test set.
        rows: of both splits.

    Raises:
        ConfigError: there is to be no test set.
        MismatchError: nothing of it is left.
    """
    if test:
        return
    if spec.test_source is not None:
        raise MismatchError(
            f"data.test-source = {spec.test_source!r} has no row that can be tested on",
            fix="correct its rows, or leave the key out: data.test-fraction of the rows are then held out",
        )
    if not spec.test_fraction:
        raise ConfigError(
            "data.test-fraction = 0 leaves the server no test set, and a run without one could not say "
            "what it came to",
            fix="set data.test-fraction = 0.1, or name a file in data.test-source",
        )
    raise MismatchError(
        f"data.test-fraction = {spec.test_fraction:g} of {rows:,} rows leaves the server no test row (one "
        "of every class and owner stays in training)",
        fix="raise data.test-fraction, give more rows, or name a file in data.test-source",
    )


def test_rows(
    rows: int,
    fraction: float,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    owners: Sequence[str] | None = None,
) -> NDArray[np.bool_]:
    """Which rows are the central test set: a stratified sample.

    Strata are the classes, else the owners. Systematic sampling along the rows in order of
    stratum gives each its share to within one row. Of every class and every owner one row stays
    in training, so that the split makes none of them vanish.

    Returns:
        bool [rows]; about ``fraction`` of them true.
    """
    rng = numpy_generator(seed, "test-split")
    order = rng.permutation(rows)
    groups = [g for g in (labels, codes(owners)) if g is not None]
    free = np.ones(rows, np.bool_)
    for group in groups:
        _, first = np.unique(group[order], return_index=True)
        free[order[first]] = False
    candidates = order[free[order]]
    if groups:
        candidates = candidates[np.argsort(groups[0][candidates], kind="stable")]
    held = np.zeros(rows, np.bool_)
    if len(candidates):
        share = min(1.0, fraction * rows / len(candidates))
        ticks = np.floor(np.arange(len(candidates) + 1) * share + rng.random())
        held[candidates[np.diff(ticks) > 0]] = True
    return held


def codes(values: Sequence[str] | None) -> NDArray[np.int64] | None:
    """Each value's index among the distinct values in order of their text. [n]"""
    if values is None:
        return None
    index = {value: code for code, value in enumerate(sorted(set(values)))}
    return np.fromiter((index[value] for value in values), np.int64, len(values))


# Checking

_NAMES = {"label": ("class", "classes"), "owner": ("owner", "owners")}
"""Columns whose values are names of something, and what of."""

_COLUMNS: Mapping[Task, tuple[str, str]] = {
    "classification": ("text", "label"),
    "image-classification": ("image", "label"),
    "causal-lm": ("prompt", "answer"),
}


def _checked(
    table: RawTable,
    spec: DataSpec,
    task: Task,
    classes: Sequence[str] | None,
    column: str | None,
    bad: BadRows,
) -> tuple[RawRows, tuple[str, ...], list[str]]:
    """The usable rows of a table, the class names and notes; ``column`` None reads no owners."""
    faults: dict[str, Callable[[object], str | None]] = {
        "label": _label_fault,
        "owner": _label_fault,
    }
    if task == "image-classification":
        faults["image"] = partial(image_fault, folder=_folder(table.source))
    values: dict[str, Sequence[Any]] = {
        key: table.column(getattr(spec, key), f"data.{key}", MismatchError)
        for key in _COLUMNS[task]
    }
    if column is not None:
        values["owner"] = table.column(column, "data.partition.column", ConfigError)
    notes: list[str] = []
    for key, what in _NAMES.items():
        if key in values:
            names_of = labels.named(values[key], classes or () if key == "label" else ())
            if key == "owner" or not classes:
                notes += labels.notes(table.source, what, values[key], names_of)
            values[key] = names_of
    usable = np.ones(len(table), np.bool_)
    for key, column_values in values.items():
        _strike(usable, table, column_values, key, faults.get(key, _text_fault), bad)
    names: tuple[str, ...] = ()
    if "label" in values and usable.any():
        names = tuple(
            classes or _class_names(_take(values["label"], np.flatnonzero(usable)), table, bad)
        )
        known = frozenset(names)
        _strike(usable, table, values["label"], "label", partial(_label_fault, known=known), bad)
    return _usable(table, values, names, np.flatnonzero(usable), bad), names, notes


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


def _usable(
    table: RawTable,
    values: Mapping[str, Sequence[Any]],
    names: tuple[str, ...],
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
    kept = {key: _take(column, rows) for key, column in values.items()}
    inputs, target = list(kept.values())[:2]
    return RawRows(
        inputs=inputs,
        labels=np.array([index[v] for v in target], np.int64) if names else None,
        answers=None if names else target,
        owners=list(kept["owner"]) if "owner" in kept else None,
        source=table.source,
        lines=np.asarray(table.lines, np.int64)[rows],
    )


def _text_fault(value: object) -> str | None:
    if value is None or value == "" or value != value:  # NaN, an export's word for nothing
        return "missing or empty"
    if not isinstance(value, str):
        return f"text is expected, got {kind_of(value)}"
    if not value.strip():
        return "nothing but white space"
    return _unicode_fault(value)


def _label_fault(value: object, known: Collection[str] | None = None) -> str | None:
    """Of a label as :func:`fedft.core.data.labels.named` has it; ``known``: the class names, once they are."""
    if value is None:
        return "missing or empty"
    if not isinstance(value, str):
        return f"text or an integer is expected, got {kind_of(value)}"
    if known is not None and value not in known:
        few = ", ".join(name[:40] for name in sorted(known)[:5]) + (", …" if len(known) > 5 else "")
        return f"{value[:40]!r} is none of the {len(known)} classes ({few}) of the training data"
    return _unicode_fault(value)


def _unicode_fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not a valid Unicode text"
    return None


def _class_names(values: Sequence[str], table: RawTable, bad: BadRows) -> list[str]:
    names = sorted(set(values))
    if len(names) < 2:
        bad.check()
        raise MismatchError(
            f"{table.source} has {len(names)} class; classification needs two or more",
            fix="check data.label, the column with the classes",
        )
    integers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    return sorted(names, key=int) if integers else names


# Encoding


def _encode(
    rows: RawRows, task: Task, encoder: Any, max_length: int, bad: BadRows
) -> tuple[Examples, Rows, int]:
    """The rows as examples, which of them were encoded, and how many of these were cut."""
    every = np.arange(len(rows))
    if task == "image-classification":
        assert rows.labels is not None
        return ImageExamples(rows.inputs, rows.labels, encoder, _folder(rows.source)), every, 0
    if rows.answers is not None:
        encoded = tokens.answered(rows.inputs, rows.answers, encoder, max_length)
    else:
        assert rows.labels is not None
        encoded = tokens.classified(rows.inputs, rows.labels, encoder, max_length)
    examples, spilled = encoded.examples, encoded.spilled
    empty = np.flatnonzero(examples.lengths == 0)
    if not len(empty):
        return examples, every, int(encoded.cut.sum())
    for row in empty.tolist():
        prompt = f"the prompt takes {spilled.get(row)} tokens of data.max-length = {max_length}"
        detail = f"{prompt}: no token of the answer is left" if row in spilled else "no tokens"
        bad.add(rows.where(row), "tokens", detail)
    kept = np.flatnonzero(examples.lengths)
    return examples.subset(kept), kept, int(encoded.cut[kept].sum())


def _folder(source: str) -> Path:
    """Where the relative paths of a source start."""
    path = local_path(source)
    if path is not None and path.is_dir():
        return path
    if path is not None and path.is_file():
        return path.parent
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def _take(values: Sequence[T], rows: Rows) -> list[T]:
    return [values[row] for row in rows.tolist()]
