"""Data for one task: read, checked, divided into training and test rows, and encoded.

    source ──read──► RawTable ──load──► RawData(train, test) ──prepare──► Data(train, test: Examples)

Bad rows are told together, each with file, line and reason, or left out and counted with
``data.skip-bad``.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedft.core.data.checks import check_columns, checked, listed, relabelled
from fedft.core.data.raw import BadRows, RawTable
from fedft.core.data.readers import read
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import Encoded, Examples, Rows
from fedft.core.seeds import numpy_generator
from fedft.core.spec import DataSpec
from fedft.core.tasks import RawRows, Task, taken, task_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedft.core.text.special_tokens import TextEncoder


@dataclass(frozen=True, eq=False)
class RawData:
    """Both splits before encoding.

    Attributes:
        classes: class names; a class id is an index of this. Empty where the task has none.
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
        train: what the clients hold between them.
        test: the server's central test set; empty without a test fraction or source.
        classes: class names; empty where the task has none.
        owners: values of ``partition.column``, one a row of ``train``; None without a column.
        strata: what a skewed partition goes by without a column, a number a row of ``train``, as
            the task has it; None where it has nothing.
        per_class: how often each class is a label in ``train``, in the order of ``classes``.
        skipped: bad rows that were left out, by reason.
        fingerprint: SHA-256 over both splits and the class names, for the run record.
        notes: what a reader should know of the data, a sentence each.
        cut: rows of ``train`` and of ``test`` that were longer than ``data.max-length``.
        lines: where each row of ``train`` stands in its source, see :func:`raw_table`. int64
        every_test: rows of the test set that ``test`` is, or is a sample of.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...]
    owners: Sequence[str] | None
    strata: NDArray[np.int64] | None
    per_class: tuple[int, ...]
    skipped: Mapping[str, int]
    fingerprint: str
    cut: Mapping[str, int]
    notes: tuple[str, ...] = ()
    lines: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    every_test: int = 0


def raw_table(
    spec: DataSpec,
    task: str,
    relabel: Mapping[str, str] | None = None,
    most_rows: int | None = None,
    bad: BadRows | None = None,
) -> RawTable:
    """The data as they stand in their source, every column and nothing checked.

    Args:
        spec: the data's table.
        task: name of what is fine-tuned.
        relabel: label → class, of a site whose own words are others.
        most_rows: read no more rows than that, the first ones.
        bad: takes what is no row at all; None leaves it out.
    """
    kind = task_of(task)
    table = listed(read(spec.source, spec.subset, spec.split, bad or BadRows(True)), spec, kind)
    for column in kind.columns:
        if column.classes is not None:
            table = relabelled(table, column, spec.column(column.key), relabel or {})
    return _first(table, most_rows)


def load(
    spec: DataSpec,
    task: str,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    relabel: Mapping[str, str] | None = None,
    most_rows: int | None = None,
) -> RawData:
    """Reads and checks the data and sets the test rows aside.

    Args:
        spec: the data's table.
        task: name of what is fine-tuned, see :func:`fedft.core.tasks.task_of`.
        seed: of the run; the test split is a function of it and of the data.
        classes: the run's class names, where a site reads data of its own; None takes those of
            the data, in numerical order where all are integers, else in that of their text.
        relabel: label → class, of a site whose own words are others.
        most_rows: read no more rows than that, the first ones.

    Raises:
        ConfigError: the source or the partition's column cannot be.
        MismatchError: the data are absent, empty, lack a column or have bad rows.
    """
    kind, bad = task_of(task), BadRows(spec.skip_bad)
    check_columns(spec, kind)
    table = raw_table(spec, task, relabel, most_rows, bad)
    rows, notes = checked(table, spec, kind, classes, spec.partition.column, bad)
    names = rows.classes
    if spec.test_source is not None:
        test_table = read(spec.test_source, spec.subset, spec.split, bad, key="data.test-source")
        test_table = listed(test_table, spec, kind)
        test, said = checked(test_table, spec, kind, names, None, bad)
        notes += [note for note in said if kind.formats]
        train = rows
    else:
        held = test_rows(len(rows), spec.test_fraction, seed, kind.strata(rows), rows.owners)
        train = rows.take(np.flatnonzero(~held))
        test = rows.take(np.flatnonzero(held))
    bad.check()
    train, test = (_prefixed(part, spec) for part in (train, test))
    return RawData(train, test, names, dict(bad.counts), tuple(notes))


def prepare(
    spec: DataSpec,
    task: str,
    encoder: "TextEncoder | PreTrainedTokenizerBase | Callable[[Any], Tensor]",
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    relabel: Mapping[str, str] | None = None,
    most_rows: int | None = None,
    most_test_rows: int | None = None,
) -> Data:
    """Loads and encodes: what a simulation, a server and a site start from.

    Args:
        spec: the data's table.
        task: name of what is fine-tuned, see :func:`fedft.core.tasks.task_of`.
        encoder: of the model's input: its tokenizer, with what was decided about its special tokens
            or without; or a function from an RGB image to pixel values [c, h, w].
        seed: as for :func:`load`.
        classes: as for :func:`load`.
        relabel: as for :func:`load`.
        most_rows: as for :func:`load`.
        most_test_rows: keep a sample of so many test rows, see :func:`sampled`; None keeps all.

    Raises:
        ConfigError, MismatchError: as :func:`load`; or a row has no token of its answer left.
    """
    raw = load(spec, task, seed=seed, classes=classes, relabel=relabel, most_rows=most_rows)
    kind, bad = task_of(task), BadRows(spec.skip_bad)
    train, kept, of_train = _encode(raw.train, kind, encoder, spec.max_length, bad)
    test, tested, of_test = _encode(raw.test, kind, encoder, spec.max_length, bad)
    bad.check()
    if not len(train):
        raise MismatchError(
            f"{spec.source} has no training rows left after skipping {dict(bad.counts)}",
            fix="raise data.max-length, or correct the data",
        )
    identity = "\n".join([train.fingerprint(), test.fingerprint(), *raw.classes])
    strata = kind.strata(raw.train)
    every, cut_of_test = len(test), of_test.cut
    if most_test_rows is not None and most_test_rows < every:
        groups = kind.strata(raw.test)
        chosen = sampled(every, most_test_rows, seed, None if groups is None else groups[tested])
        test, cut_of_test = test.subset(chosen), cut_of_test[chosen]
    return Data(
        train,
        test,
        raw.classes,
        None if raw.train.owners is None else taken(raw.train.owners, kept),
        None if strata is None else strata[kept],
        tuple(map(int, kind.counts(raw.train.take(kept)))) if kind.classes else (),
        dict(Counter(raw.skipped) + bad.counts),
        hashlib.sha256(identity.encode()).hexdigest(),
        {"train": of_train.rows_cut, "test": int(cut_of_test.sum())},
        (*raw.notes, *of_train.notes_of("training"), *of_test.notes_of("test")),
        raw.train.lines[kept],
        every,
    )


def _prefixed(rows: RawRows, spec: DataSpec) -> RawRows:
    """The rows with ``data.prefix`` before each text."""
    if not spec.prefix:
        return rows
    if "text" not in rows.values:
        raise ConfigError(
            f"[data] prefix = {spec.prefix[:40]!r}: these rows have no column 'text' to put it before",
            fix="Leave the key out.",
        )
    texts = [spec.prefix + text for text in rows.values["text"]]
    return replace(rows, values={**rows.values, "text": texts})


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


def sampled(
    rows: int, most: int, seed: int, strata: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """A fixed sample of the test rows, ascending: ``most`` of them, of every stratum its share to within
    one row. Systematic sampling along the rows in order of stratum, as in :func:`test_rows`.

    Args:
        rows: of the test set, at least ``most``.
        most: rows to keep.
        seed: of the run.
        strata: a number a row; None samples from all alike.
    """
    rng = numpy_generator(seed, "test-sample")
    order = rng.permutation(rows)
    if strata is not None:
        order = order[np.argsort(strata[order], kind="stable")]
    ticks = (np.arange(rows + 1) * most + int(rng.integers(rows))) // rows
    return np.sort(order[np.diff(ticks) > 0])


def codes(values: Sequence[str] | None) -> NDArray[np.int64] | None:
    """Each value's index among the distinct values in order of their text. [n]"""
    if values is None:
        return None
    index = {value: code for code, value in enumerate(sorted(set(values)))}
    return np.fromiter((index[value] for value in values), np.int64, len(values))


def _encode(
    rows: RawRows, task: Task, encoder: Any, max_length: int, bad: BadRows
) -> tuple[Examples, Rows, Encoded[Examples]]:
    """The rows as examples, which of them were encoded, and how."""
    encoded = task.encode(rows, encoder, max_length)
    examples = encoded.examples
    kept = np.flatnonzero(examples.lengths)
    if len(kept) == len(rows):
        return examples, kept, encoded
    for row in np.flatnonzero(examples.lengths == 0).tolist():
        bad.add(rows.where(row), "tokens", encoded.faults.get(row, "no tokens"))
    return examples.subset(kept), kept, replace(encoded, cut=encoded.cut[kept])
