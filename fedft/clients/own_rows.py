"""The rows of a client as they stand in its file, for a trainer of its own."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedft.core import models
from fedft.core.data import labels
from fedft.core.data.raw import RawTable
from fedft.core.data.source import Data, raw_table
from fedft.core.errors import MismatchError
from fedft.core.examples import Rows
from fedft.core.spec import TaskSpec
from fedft.core.tasks import task_of
from fedft.core.text.special_tokens import TextEncoder


@dataclass(frozen=True, eq=False)
class ClientRows:
    """See :class:`fedft.clients.engines.trainer.OwnRows`. The file is read when rows are first asked for.

    Args:
        task: whose data they are.
        data: the same, encoded.
        rows_of: name of a client → the rows of ``data.train`` that it trains on.
    """

    task: TaskSpec
    data: Data
    rows_of: Callable[[str], Rows]

    @property
    def max_length(self) -> int:
        """Longest row, in tokens."""
        return self.task.data.max_length

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the run's classes."""
        return self.data.classes

    @cached_property
    def _table(self) -> tuple[RawTable, Mapping[int, int]]:
        """The file, and where in it each line stands."""
        task = self.task
        table = raw_table(task.data, task.model.task, task.relabel, task.most_rows)
        columns = dict(table.columns)
        for column in task_of(task.model.task).columns:
            if column.classes is not None:
                name = task.data.column(column.key)
                columns[name] = _names(columns[name], self.data.classes)
        named = RawTable(table.source, columns, table.lines)
        return named, {line: row for row, line in enumerate(table.lines)}

    def of(self, client: str) -> list[dict[str, Any]]:
        """The rows that a client trains on, in the order of the partition, with all columns.

        Values are as they were read; a class has the run's name for it.

        Raises:
            MismatchError: the file has other rows than when it was first read.
        """
        if len(self.data.lines) != len(self.data.train):
            raise MismatchError(
                f"the task {self.task.model.task} has examples that are not one for one row, and a trainer of "
                "one's own is given rows",
                fix="Choose another task, or leave [training] trainer out.",
            )
        table, place = self._table
        lines = self.data.lines[self.rows_of(client)].tolist()
        if missing := [line for line in lines if line not in place]:
            raise MismatchError(
                f"{table.source}:{missing[0]} is not there any more: the file has changed",
                fix="Put it back, or start a new run.",
            )
        names = list(table.columns)
        return [
            {name: copy.deepcopy(table.columns[name][place[line]]) for name in names}
            for line in lines
        ]

    @cached_property
    def _encoder(self) -> Any:
        encoder = models.input_encoder(self.task.model, models.resolve(self.task.model))
        return encoder.tokenizer if isinstance(encoder, TextEncoder) else encoder

    def tokenizer(self) -> Any:
        """A new copy of the model's tokenizer; of images, the function that prepares one."""
        return copy.deepcopy(self._encoder)


def _names(values: Sequence[object], classes: tuple[str, ...]) -> list[object]:
    """Labels as the names of the run's classes; of lists, each."""
    if not any(isinstance(value, list | tuple) for value in values):
        return labels.named(values, classes)
    return [labels.named(v, classes) if isinstance(v, list | tuple) else v for v in values]
