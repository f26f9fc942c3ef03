"""Sums that add up over batches, slices and clients, and the scores that are made of them.

What no sums make, such as a rank correlation, is made of *columns*: a few numbers of every item, in
float64. They are kept up to :data:`MOST_GATHERED` numbers, and never leave a client: only whoever
holds the test set has them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedft.core.errors import MismatchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Number = int | float
Sums = Mapping[str, Number | tuple[Number, ...]]
"""Name → what was added up: one number, or as many as the :class:`Sum` says."""

Columns = Mapping[str, "Sequence[NDArray[np.float64]]"]
"""Name → some numbers of every item, in pieces of [m, width], in the order of the items."""

MOST_GATHERED = 2**24
"""Numbers of columns that are kept, of all items together: 128 MiB. Beyond, a metric is refused."""


@dataclass(frozen=True)
class Tally:
    """Sums over scored items: examples, or tokens with a target.

    Attributes:
        loss_sum: of the items' losses.
        count: of items.
        sums: what the task's metrics add up, by name.
        columns: what the task's metrics gather of every item, by name; empty where that stays.
    """

    loss_sum: float = 0.0
    count: int = 0
    sums: Sums = field(default_factory=dict[str, Number | tuple[Number, ...]])
    columns: Columns = field(
        default_factory=dict[str, "Sequence[NDArray[np.float64]]"], compare=False
    )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally.total((self, other))

    @staticmethod
    def total(tallies: Iterable["Tally"]) -> "Tally":
        """The sum, in the order given.

        Raises:
            MismatchError: more numbers would be gathered than are kept.
        """
        result = Tally()
        pieces: dict[str, list[NDArray[np.float64]]] = {}
        gathered = 0
        for tally in tallies:
            result = result._and_sums(tally)
            for name, column in tally.columns.items():
                pieces.setdefault(name, []).extend(column)
                gathered += sum(piece.size for piece in column)
            if gathered > MOST_GATHERED:
                raise MismatchError(
                    f"a metric needs {', '.join(sorted(pieces))} of every item, and after "
                    f"{result.count:,} items these are more than {MOST_GATHERED:,} numbers",
                    fix="Set [evaluation] max-rows, or leave the metric out.",
                )
        return replace(result, columns=pieces)

    def _and_sums(self, other: "Tally") -> "Tally":
        names = {**self.sums, **other.sums}
        return Tally(
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            {name: _added(self.sums.get(name), other.sums.get(name)) for name in names},
        )

    def column(self, name: str) -> "NDArray[np.float64]":
        """What was gathered under a name, of all items. [n, width]"""
        import numpy as np

        return np.concatenate(self.columns[name])

    def numbers(self, name: str) -> tuple[Number, ...]:
        """A sum that is a list of numbers."""
        found = self.sums[name]
        assert isinstance(found, tuple)
        return found

    def number(self, name: str) -> Number:
        """A sum that is one number."""
        found = self.sums[name]
        assert not isinstance(found, tuple)
        return found


def _added(
    a: Number | tuple[Number, ...] | None, b: Number | tuple[Number, ...] | None
) -> Number | tuple[Number, ...]:
    if a is None or b is None:
        found = b if a is None else a
        assert found is not None
        return found
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x + y for x, y in zip(a, b, strict=True))
    assert not isinstance(a, tuple) and not isinstance(b, tuple)
    return a + b


@dataclass(frozen=True)
class Sum:
    """What a metric adds up: what a server may expect in a client's reply.

    Attributes:
        length: of the list of numbers, from the number of classes; None is one number alone.
        whole: each number counts items, so that it is whole, and from 0 to their number. Otherwise
            it is any finite number.
    """

    length: Callable[[int], int] | None = None
    whole: bool = True

    def read(self, value: Any, count: int, classes: int) -> Number | tuple[Number, ...]:
        """A value as it came from a client.

        Args:
            value: of the record.
            count: of items.
            classes: number of classes; 0 where there are none.

        Raises:
            ValueError, TypeError, OverflowError: it cannot be such a sum.
        """
        if self.length is None:
            return self._number(value, count)
        # A message cannot tell a list of one number from the number.
        numbers = cast("list[Any]", value if isinstance(value, list) else [value])
        if len(numbers) != self.length(classes):
            raise ValueError("not as many numbers as there should be")
        return tuple(self._number(number, count) for number in numbers)

    def _number(self, value: Any, count: int) -> Number:
        number = int(value) if self.whole else float(value)
        if not (0 <= number <= count if self.whole else math.isfinite(number)):
            raise ValueError("a number that no items come to")
        return number


def packed(tally: Tally, sums: Mapping[str, Sum]) -> dict[str, Number | list[Number]]:
    """A tally as the numbers of a reply.

    Args:
        tally: may lack sums where nothing was scored.
        sums: of the task's metrics.
    """
    empty: Mapping[str, Number | tuple[Number, ...]] = {
        name: 0 if one.length is None else () for name, one in sums.items()
    }
    found = {name: tally.sums.get(name, nothing) for name, nothing in empty.items()}
    return {
        "num-examples": tally.count,
        "loss-sum": tally.loss_sum,
        **{name: list(x) if isinstance(x, tuple) else x for name, x in found.items()},
    }


def unpacked(record: Mapping[str, Any], sums: Mapping[str, Sum], classes: int) -> Tally | None:
    """The tally in a client's reply; None where it holds none that can be used.

    Args:
        record: as :func:`packed` makes it; whatever else it holds is left alone.
        sums: of the task's metrics.
        classes: number of classes; 0 where there are none.
    """
    try:
        count, loss_sum = int(record["num-examples"]), float(record["loss-sum"])
        if count == 0:
            return Tally(loss_sum)
        nothing: dict[str, Any] = {name: [] for name, one in sums.items() if one.length is not None}
        found = {
            name: one.read({**nothing, **record}[name], count, classes)
            for name, one in sums.items()
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return Tally(loss_sum, count, found) if count > 0 else None


@dataclass(frozen=True, eq=False)
class Predictions:
    """The scored items of one batch; or, for metrics over texts, what was generated for its rows.

    Attributes:
        losses: of each, [m].
        predicted: what the model says, [m, …]: the likeliest class, or whatever the task's targets are.
        targets: what is right, [m, …].
        classes: width of the outputs.
        outputs: of the model, [m, …]; None unless a metric ``needs_outputs``.
        rows: of which row of the batch each item is, [m] int64, ascending; None where a row is one.
        names: of the classes; empty where the task has none.
        texts: (what the model says, what is wanted) of each row that asks for a text. Given to metrics
            that ``needs_texts``, and to no others; they are given nothing else.
    """

    losses: "Tensor"
    predicted: "Tensor"
    targets: "Tensor"
    classes: int
    outputs: "Tensor | None" = None
    rows: "Tensor | None" = None
    names: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Declared:
    """What a record says about a metric, so that whoever reads it needs no code of the task.

    Attributes:
        name: key of the value among a round's scores.
        title: in words.
        higher: whether more is better.
        percent: whether it is a share, shown in percent and its differences in points.
        by: name of the score that is compared in its place; empty compares its own value.
    """

    name: str
    title: str
    higher: bool
    percent: bool = False
    by: str = ""

    def better(self, scores: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Whether ``scores`` are better than the best ones so far. The first ones always are.

        A value that is not defined (NaN, or null in a record) is better than none, and worse than any.
        """
        if best is None:
            return True
        key = self.by or self.name
        now, then = _known(scores[key]), _known(best[key])
        if now is None or then is None:
            return then is None and now is not None
        return now > then if self.higher else now < then

    def shown(self, value: float | None) -> str:
        """The value for people; a dash where it is not defined."""
        if _known(value) is None:
            return "–"
        return f"{value:.2%}" if self.percent else f"{value:.3f}"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


class Metric(ABC):
    """One way of judging a model.

    Attributes:
        name: key of its value among a round's scores.
        title: in words; ``name`` where empty.
        higher: whether more is better.
        percent: whether it is a share, shown in percent.
        by: name of the score that is compared in its place, where rounding or overflow would make
            different values equal; empty compares its own value.
        sums: what is added up over the items, by name. Two metrics may name the same.
        needs_outputs: whether it reads the outputs. The losses of a vocabulary are then not taken
            slice by slice.
        needs_texts: whether it judges texts that the model writes, :attr:`Predictions.texts`. An
            evaluation then generates them. The count of a tally is of tokens: such a metric sums up
            the texts itself.
        judges: kinds of predictions that it can judge, see
            :attr:`~fedft.core.tasks.base.Task.predicts`; empty is any.
        gathers: columns that it needs of every item: name → how many numbers, from the number of
            classes. Such a metric is scored on the test set alone. Two metrics may name the same.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    higher: ClassVar[bool]
    percent: ClassVar[bool] = False
    by: ClassVar[str] = ""
    sums: ClassVar[Mapping[str, Sum]] = {}
    needs_outputs: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = False
    judges: ClassVar[frozenset[str]] = frozenset()
    gathers: ClassVar[Mapping[str, Callable[[int], int]]] = {}

    def tally(self, found: Predictions) -> Sums:
        """The sums over these items; they must add up over slices."""
        return {}

    def gather(self, found: Predictions) -> "Mapping[str, NDArray[np.float64]]":
        """The columns of these items, each [m, width]."""
        return {}

    @abstractmethod
    def value(self, tally: Tally) -> float:
        """The score that the sums come to; NaN where it is not defined. There is at least one item."""

    @property
    def declared(self) -> Declared:
        """For the record."""
        return Declared(self.name, self.title or self.name, self.higher, self.percent, self.by)
