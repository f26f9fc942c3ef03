"""Names that were most likely meant: one idea of *near*, for keys, columns, layers and methods."""

from collections.abc import Iterable
from difflib import SequenceMatcher

_NEAR = 0.6
"""Least similarity of two near names. `answer` and `prompt` have 0.17, `sentense` and `sentence` 0.88."""


def near(given: str, names: Iterable[str], most: int = 2) -> list[str]:
    """The names that ``given`` is likely a misspelling of, the nearest first; none where none is near.

    Case, and whether words are joined by ``-`` or ``_``, do not count. Nothing far is ever offered: a
    wrong hint costs more than none.

    Args:
        given: what was written.
        names: that exist.
        most: names to return.
    """
    scores = {name: _similarity(_folded(given), _folded(name)) for name in names}
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return [name for name in ranked if scores[name] >= _NEAR][:most]


def hint(given: str, names: Iterable[str]) -> str:
    """``did you mean 'count'?``, or what is known where nothing is near."""
    known = list(names)
    found = near(given, known)
    if found:
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"known: {', '.join(sorted(known))}"


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else type(value).__name__


def _folded(name: str) -> str:
    return name.strip().casefold().replace("-", "_")[:100]


def _similarity(a: str, b: str) -> float:
    if a == b:
        return 1.0
    # Whole words that stand in the other: `label` in `label_text`, `query` in `query_proj`.
    words = {*a.split("_")} & {*b.split("_")}
    shared = max(map(len, words), default=0)
    overlap = 2 * shared / (len(a) + len(b)) if a and b else 0.0
    inside = _NEAR if shared >= 4 and shared in (len(a), len(b)) else 0.0
    return max(SequenceMatcher(None, a, b).ratio(), overlap, inside)
