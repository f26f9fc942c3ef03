"""Rows of data as a task gets them: checked, and not yet encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedft.core.examples import Rows

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RawRows:
    """Checked rows.

    Attributes:
        values: by key of the task's columns, one value a row: texts, images. The column with the
            classes is not among them.
        labels: class ids, int64: [n] where a row has one class; of tasks with several a row one
            array each; None where the task has no classes.
        classes: class names; an id is an index of this.
        owners: values of ``partition.column``; None where no column is named.
        source, lines: where each row comes from, for messages. int64 [n]
        folder: where relative paths start.
        format: of the task's :attr:`~fedft.core.tasks.Task.formats`; empty where it has none.
    """

    values: Mapping[str, Sequence[Any]]
    labels: NDArray[np.int64] | Sequence[NDArray[np.int64]] | None
    classes: tuple[str, ...]
    owners: Sequence[str] | None
    source: str
    lines: NDArray[np.int64]
    folder: Path
    format: str = ""

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def one_label(self) -> NDArray[np.int64]:
        """The labels of a task with one class a row. [n]"""
        assert isinstance(self.labels, np.ndarray), "this task has not one class a row"
        return self.labels

    def take(self, rows: Rows) -> "RawRows":
        """The given rows, in the given order."""
        labels = self.labels
        if labels is not None:
            labels = labels[rows] if isinstance(labels, np.ndarray) else taken(labels, rows)
        return replace(
            self,
            values={key: taken(column, rows) for key, column in self.values.items()},
            labels=labels,
            owners=None if self.owners is None else taken(self.owners, rows),
            lines=self.lines[rows],
        )

    def where(self, row: int) -> str:
        """``source:line`` of a row."""
        return f"{self.source}:{self.lines[row]}"


def joined(labels: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The classes of all rows, end to end. [total]"""
    return np.concatenate([np.zeros(0, np.int64), *labels])


def taken(values: Sequence[T], rows: Rows) -> list[T]:
    """The given values of a column, in the given order."""
    return [values[row] for row in rows.tolist()]
