"""The columns that a task reads, and what is wrong with a value of one.

No message quotes the text of an example; of labels, which are names, a few characters are shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    """

    key: str
    fault: Fault
    classes: Literal["one", "many"] | None = None
    files: bool = False


def text(key: str) -> Column:
    """A column of texts that say something."""
    return Column(key, text_fault)


def label(key: str = "label") -> Column:
    """A column with the one class of a row, by name."""
    return Column(key, label_fault, classes="one")


def labels(key: str = "labels") -> Column:
    """A column with a list of classes a row, by name: any number of them, or one for each word."""
    return Column(key, _labels_fault, classes="many")


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
    if value is None:
        return "missing or empty"
    if not isinstance(value, list | tuple):
        return f"a list of labels is expected, got {kind_of(value)}"
    items = cast("list[Any]", value)
    return next((told for one in items if (told := label_fault(one, folder)) is not None), None)


def _unicode_fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not a valid Unicode text"
    return None
