"""Rows as they were read, and what is wrong with some of them.

No message quotes the text of an example.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedft.core.errors import ConfigError, MismatchError
from fedft.core.names import near

LISTED = 10
"""Bad rows that a message lists; it counts the others."""

_SHOWN_COLUMNS = 20
_SHOWN_CHARACTERS = 40


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
        # Where a CSV has no header, its "columns" are a row of the data.
        shown = [_cut(column) for column in self.columns][:_SHOWN_COLUMNS]
        more = len(self.columns) - len(shown)
        nearest = near(name, self.columns, 1)
        raise error(
            f"{self.source} has no column {name!r} ({key}); it has {', '.join(shown)}"
            + (f" and {more} more" if more else ""),
            fix=f'set {key} = "{_cut(nearest[0])}", or the column you mean'
            if nearest
            else f"set {key} to the column you mean, or correct the names in the data",
        )


def _cut(text: str) -> str:
    text = " ".join(text.split()) or repr(text)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


class BadRows:
    """Collects the bad rows of some sources, to stop at all of them together, or counts them.

    Args:
        skip: count instead of stopping (``data.skip-bad``).
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[tuple[str, str]]] = {}  # of each reason, in order

    def add(self, where: str, reason: str, detail: str) -> None:
        """Takes note of one bad row, which is to be left out.

        Args:
            where: ``source:line``.
            reason: one word to count it by.
            detail: what is wrong, without the text of the example.
        """
        self.counts[reason] += 1
        first = self._first.setdefault(reason, [])
        if len(first) < LISTED:
            first.append((where, detail))

    def check(self) -> None:
        """Stops where there are bad rows that are not to be skipped.

        Raises:
            MismatchError: the first of them with line and reason, and how many there are.
        """
        if self.skip or not self.counts:
            return
        total = self.counts.total()
        rows = sorted((row for some in self._first.values() for row in some), key=_place)[:LISTED]
        listed = [f"{where}: {detail}" for where, detail in rows]
        this, one = ("this row", "the row") if total == 1 else ("these rows", "such rows")
        recode = "save the file as UTF-8, " if "encoding" in self.counts else ""
        raise MismatchError(
            listed[0]
            if total == 1
            else "\n  ".join([f"{total:,} bad rows ({self.summary()}):", *listed, *self._rest()]),
            fix=f"{recode}correct {this}, or set data.skip-bad = true (fedft join: --skip-bad) to "
            f"leave {one} out and count them",
        )

    def summary(self) -> str:
        """How many by reason: ``label 3, malformed 1``."""
        return ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.counts.items()))

    def _rest(self) -> list[str]:
        more = self.counts.total() - LISTED
        return [f"… and {more:,} more"] if more > 0 else []


def _place(row: tuple[str, str]) -> tuple[str, int]:
    source, _, line = row[0].rpartition(":")
    return (source, int(line)) if line.isdecimal() else (row[0], 0)
