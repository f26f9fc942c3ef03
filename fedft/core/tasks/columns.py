"""The columns that a task reads, and what is wrong with a value of one.

No message quotes the text of an example; of labels, which are names, a few characters are shown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast

from fedft.core.examples import image_fault
from fedft.core.names import kind_of

Fault = Callable[[object, Path], str | None]
"""(value, folder where relative paths start) → what is wrong with it; None where nothing is."""


@dataclass(frozen=True)
class Column:
    """One column of a task's data.

    Attributes:
        key: what the configuration and ``fedft join`` call it; also the column's usual name.
        fault: of a value.
        classes: whether a value is the name of one class, or a list of such names, rather than
            something that the model reads.
        files: whether values are files or their content, so that a row is known by the content.
        lists: whether a value is a list; a file that has none, such as CSV, spells it in JSON.
        optional: whether it is read only where ``[data.columns]`` names it; of a format, where the
            table has it.
        implied: whether data may be without it, since the others say the same: all its values are
            then None, and not looked at.
    """

    key: str
    fault: Fault
    classes: Literal["one", "many"] | None = None
    files: bool = False
    lists: bool = False
    optional: bool = False
    implied: bool = False


def text(key: str, *, optional: bool = False) -> Column:
    """A column of texts that say something."""
    return Column(key, text_fault, optional=optional)


def words(key: str) -> Column:
    """A column with a list of words a row."""
    return Column(key, _words_fault, lists=True)


def number(key: str) -> Column:
    """A column of finite numbers, which a CSV file has as text: see :func:`number_of`."""
    return Column(key, _number_fault)


def label(key: str = "label") -> Column:
    """A column with the one class of a row, by name."""
    return Column(key, label_fault, classes="one")


def labels(key: str = "labels") -> Column:
    """A column with a list of classes a row, by name: any number of them, or one for each word."""
    return Column(key, _labels_fault, classes="many", lists=True)


def image(key: str = "image") -> Column:
    """A column of images, see :func:`fedft.core.examples.open_image`."""
    return Column(key, image_fault, files=True)


def text_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a text."""
    if value is None or value == "" or value != value:  # NaN, an export's word for nothing
        return "missing or empty"
    if not isinstance(value, str):
        return f"text is expected, got {kind_of(value)}"
    if not value.strip():
        return "nothing but white space"
    return _unicode_fault(value)


def label_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a label as :func:`fedft.core.data.labels.named` has it."""
    if value is None:
        return "missing or empty"
    if not isinstance(value, str):
        return f"text or an integer is expected, got {kind_of(value)}"
    return _unicode_fault(value)


def _labels_fault(value: object, folder: Path) -> str | None:
    if not isinstance(value, list | tuple):
        return _list_expected("labels", value)
    items = cast("list[Any]", value)
    return next((told for one in items if (told := label_fault(one, folder)) is not None), None)


def _words_fault(value: object, folder: Path) -> str | None:
    if not isinstance(value, list | tuple):
        return _list_expected("words", value)
    items = cast("list[Any]", value)
    if not items:
        return "no word at all"
    found = ((place, text_fault(word, folder)) for place, word in enumerate(items, 1))
    return next((f"word {place}: {told}" for place, told in found if told is not None), None)


def _list_expected(what: str, value: object) -> str:
    if value is None or value == "":
        return "missing or empty"
    told = f"a list of {what} is expected, got {kind_of(value)}"
    if isinstance(value, str):
        told += ' (in a cell of CSV a list is spelt in JSON: ["a", "b"])'
    return told


def number_of(value: object) -> float | None:
    """A value as a number, where it is one or spells one; not a number and infinities are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


_LARGEST = 1e18
"""Squares of larger numbers leave float32, and with them the loss."""


def _number_fault(value: object, _: Path) -> str | None:
    if value is None or value == "" or value != value:
        return "missing or empty"
    found = number_of(value)
    if found is None:
        if isinstance(value, float | Decimal):
            return "a finite number is expected, got an infinite one"
        if type(value) is int:
            return f"larger than {_LARGEST:g}"
        return f"a number is expected, got {kind_of(value)}"
    return None if abs(found) <= _LARGEST else f"larger than {_LARGEST:g}"


def _unicode_fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not a valid Unicode text"
    return None
