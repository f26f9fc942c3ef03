"""Entities of tagged words: right where type, first and last word are.

An entity is what the tags of its words say, as CoNLL's own script reads them and seqeval by
default: ``B-X`` begins one of type X, ``I-X`` continues it, and begins one where nothing of type X
comes before it; ``E-X`` ends one and ``S-X`` is one alone. Tags without any ``B-X`` or ``I-X`` among
them, such as parts of speech, have no entities of several words: each word that is not ``O`` is one.

    Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", CoNLL 2003,
    arXiv:cs/0306050.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedft.core.metrics.base import Metric, Predictions, Sum, Sums, Tally

_OUTSIDE = "O"


class _OfEntities(Metric):
    """Made of how many entities are right, predicted, and to be found.

    Needs the classes' names, and which items are of one row: a row is a text.
    """

    higher = True
    percent = True
    judges = frozenset({"tags"})
    sums: ClassVar = {"entities": Sum(lambda _: 3)}

    def tally(self, found: Predictions) -> Sums:
        if len(found.names) != found.classes:
            raise ValueError(f"{self.name}: {len(found.names)} names for {found.classes} classes")
        rows = np.arange(len(found.targets)) if found.rows is None else found.rows.cpu().numpy()
        names = tuple(found.names)
        mine, theirs = (
            spans(tags.cpu().numpy(), rows, names) for tags in (found.predicted, found.targets)
        )
        return {"entities": (len(mine & theirs), len(mine), len(theirs))}

    def of(self, tally: Tally) -> tuple[float, float, float]:
        """Entities that are right, predicted, and to be found."""
        counts = tally.sums["entities"]
        assert isinstance(counts, tuple)
        right, predicted, wanted = counts
        return right, predicted, wanted


class EntityF1(_OfEntities):
    """``2 right / (predicted + to be found)`` over the entities of all types; 0 without any."""

    name = "entity-f1"
    title = "entity F1"

    def value(self, tally: Tally) -> float:
        right, predicted, wanted = self.of(tally)
        return 2 * right / (predicted + wanted) if predicted + wanted else 0.0


class EntityPrecision(_OfEntities):
    """The share of predicted entities that are right; 0 where none is predicted."""

    name = "entity-precision"
    title = "entity precision"

    def value(self, tally: Tally) -> float:
        right, predicted, _ = self.of(tally)
        return right / predicted if predicted else 0.0


class EntityRecall(_OfEntities):
    """The share of entities that are found; 0 where there are none."""

    name = "entity-recall"
    title = "entity recall"

    def value(self, tally: Tally) -> float:
        right, _, wanted = self.of(tally)
        return right / wanted if wanted else 0.0


def spans(
    tags: NDArray[np.int64], rows: NDArray[np.int64], names: tuple[str, ...]
) -> set[tuple[int, int, int]]:
    """Entities as (type, first, last), by the words' places.

    Args:
        tags: class ids, [m].
        rows: which row each is of, [m], ascending.
        names: of the classes.
    """
    scheme = _scheme(names)
    ends_row = np.flatnonzero(np.diff(rows)) + 1
    outside = len(names)  # between rows, and around all of them
    line = np.concatenate([[outside], np.insert(tags, ends_row, outside), [outside]])
    before, now = line[:-1], line[1:]
    places = np.arange(len(now))
    begins = scheme.starts[before, now] | (now == outside)
    begun = np.maximum.accumulate(np.where(begins, places, 0))
    last = np.flatnonzero(scheme.ends[before, now]) - 1
    found = (scheme.types[line[last + 1]], begun[last], last)
    return set(zip(*(part.tolist() for part in found), strict=True))


class _Scheme:
    """What tags say: tables over the classes, and nothing after the last of them.

    Attributes:
        types: of each class, [classes + 1].
        starts: whether an entity begins at a tag, by the tag before it and itself.
            [classes + 1, classes + 1]
        ends: likewise whether one has ended before a tag.
    """

    def __init__(self, names: Sequence[str]) -> None:
        chunked = any(name.startswith(("B-", "I-")) for name in names)
        tags = [(_read if chunked else _alone)(name) for name in (*names, _OUTSIDE)]
        kinds = sorted({kind for _, kind in tags})
        self.types = np.array([kinds.index(kind) for _, kind in tags], np.int64)
        self.starts: NDArray[Any] = np.array([[_starts(a, b) for b in tags] for a in tags], bool)
        self.ends: NDArray[Any] = np.array([[_ends(a, b) for b in tags] for a in tags], bool)


_scheme = lru_cache(maxsize=8)(_Scheme)

Tag = tuple[str, str]
"""What a tag says of its word (B, I, E, S, O) and the type of the entity."""


def _read(name: str) -> Tag:
    return name[0], name[1:].split("-", 1)[-1] or "_"


def _alone(name: str) -> Tag:
    return (name, "_") if name == _OUTSIDE else ("S", name)


def _starts(before: Tag, now: Tag) -> bool:
    return (
        now[0] in "BS"
        or (before[0] in "ESO" and now[0] in "EI")
        or (now[0] not in "O." and before[1] != now[1])
    )


def _ends(before: Tag, now: Tag) -> bool:
    return (
        before[0] in "ES"
        or (before[0] in "BI" and now[0] in "BSO")
        or (before[0] not in "O." and before[1] != now[1])
    )
