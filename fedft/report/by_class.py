"""Scores class by class: the table, and the picture of what was taken for what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedft.report import charts
from fedft.report.figures import Figure
from fedft.report.formats import score
from fedft.report.records import Record, clean

_ROWS = 200
"""Classes in the table; the rest are counted."""

_SHOWN = 64
"""Classes in the picture, at most: of more nobody can read a name."""

_WRITTEN = 12
"""Of so many classes each cell says its number of items."""


@dataclass(frozen=True)
class Class:
    """One class in the newest evaluation that counted them.

    Attributes:
        name: of the class.
        precision, recall, f1: shares; 0 where not defined.
        support: items of the class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def round_of(record: Record) -> int | None:
    """The newest round whose test items were counted by class; None where none were."""
    return next((line["round"] for line in reversed(record.rounds) if "by_class" in line), None)


def classes_of(record: Record) -> list[Class]:
    """The classes in their order; none where they were not counted, or the record makes no sense."""
    line = next((line for line in reversed(record.rounds) if "by_class" in line), None)
    if line is None:
        return []
    found = line["by_class"]
    columns = found["hits"], found["support"], found["predicted"]
    if len({len(column) for column in columns}) != 1 or any(min(c, default=0) < 0 for c in columns):
        return []
    names = _names(record, len(found["hits"]))
    return [
        Class(name, _over(hit, said), _over(hit, right), _over(2 * hit, right + said), right)
        for name, hit, right, said in zip(names, *columns, strict=True)
    ]


def _over(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _names(record: Record, count: int) -> list[str]:
    given = record.environment.get("classes")
    names = [clean(name, 40) for name in given] if isinstance(given, list) else []
    return names if len(names) == count else [str(k) for k in range(count)]


def section(record: Record) -> str:
    """The table as HTML; empty where classes were not counted."""
    classes = classes_of(record)
    if not classes:
        return ""
    head = "".join(
        f"<th scope='col'>{t}</th>" for t in ("Class", "Precision", "Recall", "F1", "Support")
    )
    rows = "".join(
        f"<tr><td>{escape(c.name)}</td>"
        + "".join(f"<td>{score(x, True)}</td>" for x in (c.precision, c.recall, c.f1))
        + f"<td>{c.support:,}</td></tr>"
        for c in classes[:_ROWS]
    )
    more = len(classes) - _ROWS
    rest = f" {more:,} further classes are in <code>rounds.jsonl</code>." if more > 0 else ""
    return (
        f"<h2>By class</h2><p class='small'>On the test set, after round {round_of(record)}. A share of "
        f"nothing counts as 0.{rest}</p><div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def confusion(record: Record) -> Figure | None:
    """What the items of each class were taken for, as shares of the class."""
    line = next((line for line in reversed(record.rounds) if "by_class" in line), None)
    cells = line["by_class"].get("confusion") if line is not None else None
    if line is None or not cells or len(cells) > _SHOWN:
        return None
    n = len(cells)
    if any(len(row) != n or min(row) < 0 for row in cells):
        return None
    names = _names(record, n)
    worst = _most_confused(cells)
    alt = f"Confusion matrix of {n} classes after round {line['round']}."
    if worst is not None:
        right, said = worst
        alt += (
            f" Most often mistaken: {names[right]} for {names[said]}, {cells[right][said]} items."
        )
    with charts.canvas(4.7, min(7.5, max(3.4, 1.6 + 0.24 * n))) as (figure, ax):
        shares = [[_over(x, sum(row)) for x in row] for row in cells]
        ax.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        every = -(-n // 32)
        shown = range(0, n, every)
        short = [clean(names[k], 18) for k in shown]
        ax.set_yticks(shown, short, fontsize=7.5)
        ax.set_xticks(shown, short, rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5)
        ax.set_xlabel("Predicted")
        ax.set_ylabel("Right")
        if n <= _WRITTEN:
            for i, row in enumerate(cells):
                for j, items in enumerate(row):
                    dark = shares[i][j] > 0.55
                    ax.text(
                        *(j, i, f"{items:,}"),
                        ha="center", va="center", fontsize=7.5, color="white" if dark else charts.INK,
                    )  # fmt: skip
        return Figure(
            "confusion",
            "Confusion matrix",
            f"Items of the test set after round {line['round']}; darker is a larger share of the class.",
            charts.svg(figure, "confusion", alt),
        )


def _most_confused(cells: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The cell off the diagonal with the most items."""
    off: Mapping[tuple[int, int], int] = {
        (i, j): x for i, row in enumerate(cells) for j, x in enumerate(row) if i != j and x
    }
    return max(off, key=lambda place: off[place], default=None)
