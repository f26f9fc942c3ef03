"""Examples of several rows of the model each, such as the two answers of a preference."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedft.core.examples import Examples, Rows, TokenExamples
from fedft.core.types import Batch


@dataclass(frozen=True, eq=False)
class GroupedExamples(Examples):
    """Tokenised rows, a fixed number of which are an example.

    An example's rows lie one below another, in a batch too, so that whatever is kept of the tokens
    of an example is kept end to end.

    Attributes:
        rows: of all examples, those of an example in a row. [n * each]
        each: rows of an example.
    """

    rows: TokenExamples
    each: int

    def __post_init__(self) -> None:
        if len(self.rows) % self.each:
            raise ValueError(f"{len(self.rows)} rows are not {self.each} an example")

    def __len__(self) -> int:
        return len(self.rows) // self.each

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.rows.lengths.reshape(-1, self.each).sum(1)

    def _spread(self, examples: Rows) -> NDArray[np.int64]:
        """Their rows, in order."""
        first = np.asarray(examples, np.int64)[:, None] * self.each
        return (first + np.arange(self.each)).reshape(-1)

    def subset(self, rows: Rows) -> "GroupedExamples":
        return replace(self, rows=self.rows.subset(self._spread(rows)))

    def collate(self, rows: Rows) -> Batch:
        return replace(self.rows.collate(self._spread(rows)), each=self.each)

    def fingerprint(self) -> str:
        return self.rows.fingerprint()


def emptied(examples: TokenExamples, which: NDArray[np.bool_]) -> TokenExamples:
    """The same rows, some of which have no token left.

    Args:
        examples: rows with the start of an answer or with labels.
        which: of them, [n].
    """
    if not which.any():
        return examples
    lengths = np.where(which, 0, examples.lengths)
    kept = np.repeat(~which, examples.lengths)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    beside = {name: values[kept] for name, values in examples.beside.items()}
    return replace(examples, ids=examples.ids[kept], offsets=offsets, beside=beside)
