"""Encoded examples: compact columns from which padded batches are cut.

Text is one flat array of token ids with offsets, so that a million rows are three arrays and no
objects. Images stay encoded and are opened when a batch needs them.
"""

import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.errors import SecurityRefusal
from fedft.core.files import MIB, read_plain
from fedft.core.types import IGNORED, Batch

Rows = NDArray[np.integer[Any]]


class Examples(ABC):
    """What a client trains on, or the server tests on. Rows are numbered from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def lengths(self) -> Rows:
        """What a row costs, in tokens; all ones where rows are of one size. [n]"""

    @abstractmethod
    def subset(self, rows: Rows) -> Self:
        """The given rows, in the given order, as examples of their own."""

    @abstractmethod
    def collate(self, rows: Rows) -> Batch:
        """The given rows as one batch, padded to the longest of them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the content, in hex."""


E = TypeVar("E", bound=Examples, covariant=True)


@dataclass(frozen=True, eq=False)
class Encoded(Generic[E]):
    """Rows of a data set as examples.

    Attributes:
        examples: one a row. A row of length 0 cannot be used.
        cut: which rows were longer than the limit, bool [n].
        faults: why a row of length 0 is so, by its number, where more can be said than that.
        notes: what a reader should know of how the rows were encoded, a sentence each.
    """

    examples: E
    cut: NDArray[np.bool_]
    faults: Mapping[int, str] = field(default_factory=dict[int, str])
    notes: tuple[str, ...] = ()

    @property
    def rows_cut(self) -> int:
        """How many rows were longer than the limit."""
        return int(self.cut.sum())

    def notes_of(self, split: str) -> tuple[str, ...]:
        """The notes, with the name of what the rows are."""
        return tuple(f"{split} rows: {note}" for note in self.notes)


@dataclass(frozen=True, eq=False)
class TokenExamples(Examples):
    """Tokenised text. Exactly one of ``labels``, ``answers`` and ``token_labels`` is given.

    Attributes:
        ids: token ids of all rows end to end, int32 [total].
        offsets: row i is ``ids[offsets[i]:offsets[i + 1]]``, int64 [n + 1].
        pad_id: token id of padding; the attention mask hides it.
        labels: what is learnt of each row: class ids, int64 [n], or other numbers, [n, …].
        answers: position in the row of the first token that takes a loss, int32 [n].
        side: where padding goes; rows with targets by token are padded on the right.
        token_labels: what is learnt of each token, ``IGNORED`` where nothing is. int64 [total]
        beside: further inputs of the model by name, one number a token, such as
            ``token_type_ids``; padded with 0. [total]
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    pad_id: int
    labels: NDArray[Any] | None = None
    answers: NDArray[np.int32] | None = None
    side: Literal["left", "right"] = "right"
    token_labels: NDArray[np.int64] | None = None
    beside: Mapping[str, NDArray[np.integer[Any]]] = field(
        default_factory=dict[str, NDArray[np.integer[Any]]]
    )

    def __post_init__(self) -> None:
        given = [x for x in (self.labels, self.answers, self.token_labels) if x is not None]
        if len(given) != 1:
            raise ValueError("give one of class labels, the start of the answers, token labels")
        if self.labels is None and self.side != "right":
            raise ValueError("rows with targets by token are padded on the right")
        rows = len(self) if self.token_labels is not None else len(given[0])
        if len(self.offsets) != rows + 1 or self.offsets[-1] != len(self.ids):
            raise ValueError(
                f"{len(self.offsets)} offsets up to {self.offsets[-1]} do not fit "
                f"{rows} rows with {len(self.ids)} tokens"
            )
        for name, array in self._by_token().items():
            if len(array) != len(self.ids):
                raise ValueError(f"{name} has {len(array)} values for {len(self.ids)} tokens")

    def _by_token(self) -> dict[str, NDArray[np.integer[Any]]]:
        """What has one number a token, by name; the token ids are not among it."""
        own = {} if self.token_labels is None else {"token_labels": self.token_labels}
        return {**own, **self.beside}

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[Sequence[int]],
        pad_id: int,
        *,
        labels: Sequence[int] | NDArray[Any] | None = None,
        answers: Sequence[int] | None = None,
        side: Literal["left", "right"] = "right",
        token_labels: Sequence[Sequence[int]] | None = None,
        beside: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> "TokenExamples":
        """Packs one list of token ids a row; what else has a number a token likewise."""
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(row) for row in ids], out=offsets[1:])
        if isinstance(labels, np.ndarray):
            targets: NDArray[Any] | None = labels
        else:
            targets = None if labels is None else np.asarray(labels, np.int64)
        return cls(
            flat(ids, np.int32),
            offsets,
            pad_id,
            targets,
            None if answers is None else np.asarray(answers, np.int32),
            side,
            None if token_labels is None else flat(token_labels, np.int64),
            {name: flat(rows, np.int32) for name, rows in (beside or {}).items()},
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def subset(self, rows: Rows) -> "TokenExamples":
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        # Position in the old array = position in the new one + how far its row has moved.
        old: NDArray[np.int64] = np.arange(int(offsets[-1])) + np.repeat(
            self.offsets[rows] - offsets[:-1], lengths
        )
        return replace(
            self,
            ids=self.ids[old],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[rows],
            answers=None if self.answers is None else self.answers[rows],
            token_labels=None if self.token_labels is None else self.token_labels[old],
            beside={name: array[old] for name, array in self.beside.items()},
        )

    def collate(self, rows: Rows) -> Batch:
        starts: NDArray[np.int64] = self.offsets[rows][:, None]  # [b, 1]
        ends: NDArray[np.int64] = self.offsets[rows + 1][:, None]  # [b, 1]
        position = np.arange(int((ends - starts).max()))  # [t]
        first = starts if self.side == "right" else ends - len(position)
        found = first + position  # [b, t]
        mask = (starts <= found) & (found < ends)  # [b, t]
        at = np.clip(found, 0, len(self.ids) - 1)

        def padded(values: NDArray[np.integer[Any]], padding: int) -> NDArray[np.int64]:
            return np.where(mask, values[at], padding).astype(np.int64)  # [b, t]

        ids = padded(self.ids, self.pad_id)
        inputs = {
            "input_ids": _tensor(ids),
            "attention_mask": _tensor(mask.astype(np.int64)),
            **{name: _tensor(padded(array, 0)) for name, array in self.beside.items()},
        }
        if self.labels is not None:
            return Batch(inputs, _tensor(self.labels[rows]))
        if self.token_labels is not None:
            return Batch(inputs, _tensor(padded(self.token_labels, IGNORED)))
        assert self.answers is not None
        learned = mask & (position >= self.answers[rows][:, None])
        return Batch(inputs, _tensor(np.where(learned, ids, IGNORED)))

    def packed(self, bins: Sequence[Rows]) -> Batch:
        """Several rows in each sequence, end to end, as one batch.

        ``position_ids`` start anew with each row, and there is no mask: by that, transformers'
        decoders tell that no row sees another. The first token of a row has no target, as there is
        nothing before it. Padding is a row of its own for each token.

        Args:
            bins: the rows of each sequence.

        Raises:
            ValueError: rows have targets of their own, not by token.
        """
        if self.labels is not None:
            raise ValueError("rows with targets of their own are not packed")
        own = self.subset(np.concatenate(bins))
        lengths = own.lengths
        position = np.arange(len(own.ids)) - np.repeat(own.offsets[:-1], lengths)  # within its row
        if own.token_labels is not None:
            learned = own.token_labels != IGNORED
        else:
            assert own.answers is not None
            learned = position >= np.repeat(own.answers, lengths)
        labels = np.where(learned & (position > 0), own.ids, IGNORED)
        ends = own.offsets[np.cumsum([len(rows) for rows in bins])]
        widths = np.diff(ends, prepend=0)
        mask = np.arange(int(widths.max())) < widths[:, None]  # [s, t]

        def laid(values: NDArray[Any], padding: int) -> Tensor:
            found = np.full(mask.shape, padding, np.int64)
            found[mask] = values
            return _tensor(found)

        inputs = {"input_ids": laid(own.ids, self.pad_id), "position_ids": laid(position, 0)}
        more = {name: laid(array, 0) for name, array in own.beside.items()}
        return Batch({**inputs, **more}, laid(labels, IGNORED))

    def fingerprint(self) -> str:
        named = self._by_token()
        arrays = (self.ids, self.offsets, self.labels, self.answers)
        more = (x for name in sorted(named) for x in (np.array(name), named[name]))
        return sha256(
            part
            for array in (*arrays, *more)
            if array is not None
            for part in (str(array.dtype).encode(), np.ascontiguousarray(array).data)
        )


@dataclass(frozen=True, eq=False)
class ImageExamples(Examples):
    """Images and their classes; an image is opened and transformed when a batch needs it.

    Attributes:
        images: as the source has them; see :func:`open_image`.
        labels: class ids, int64 [n].
        transform: an RGB image → pixel values [c, h, w], all of one shape.
        folder: where relative paths start.
    """

    images: Sequence[object]
    labels: NDArray[np.int64]
    transform: Callable[[Any], Tensor]
    folder: Path

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.ones(len(self), np.int64)

    def subset(self, rows: Rows) -> "ImageExamples":
        return replace(self, images=[self.images[int(i)] for i in rows], labels=self.labels[rows])

    def collate(self, rows: Rows) -> Batch:
        return Batch(_Opened(self, rows), _tensor(self.labels[rows]))

    def pixels(self, rows: Rows) -> Tensor:
        """The given images, opened and transformed. [n, c, h, w]"""
        images = (open_image(self.images[int(i)], self.folder) for i in rows)
        return torch.stack([self.transform(image) for image in images])

    def fingerprint(self) -> str:
        return sha256(
            [np.ascontiguousarray(self.labels).data]
            + [_content(image, self.folder) for image in self.images]
        )


@dataclass(frozen=True, eq=False)
class _Opened(Mapping[str, Tensor]):
    """``pixel_values`` of some images, which are opened each time they are asked for.

    An epoch of batches is made before it is trained on: it need not be in memory all at once, and
    where the engine has kept what it computed of an image, the image is not opened at all.
    """

    examples: ImageExamples
    rows: Rows

    def __getitem__(self, name: str) -> Tensor:
        if name != "pixel_values":
            raise KeyError(name)
        return self.examples.pixels(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(("pixel_values",))

    def __len__(self) -> int:
        return 1


def flat(rows: Sequence[Sequence[int]], dtype: type[np.integer[Any]]) -> NDArray[Any]:
    """Rows end to end. [total]"""
    return np.fromiter((i for row in rows for i in row), dtype, sum(map(len, rows)))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def sha256(parts: Iterable[bytes | memoryview]) -> str:
    """Of all parts, one after the other, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def open_image(value: object, folder: Path) -> Any:
    """An RGB ``PIL.Image``.

    Args:
        value: a PIL image; encoded bytes; a path; ``{"bytes": …, "path": …}`` as `datasets` has
            it; or nested integers 0 to 255, [h, w] or [h, w, 3].
        folder: where relative paths start. A path may not lead out of it: a data file from
            somebody else must not make a site open files of its own.

    Raises:
        SecurityRefusal: the path leads out of the folder.
        ValueError, OSError: not an image, or larger than PIL's limit against bombs.
    """
    return _opened(value, folder).convert("RGB")


def image_fault(value: object, folder: Path) -> str | None:
    """What is wrong with an image as :func:`open_image` takes it; reads it, but decodes nothing.

    Raises:
        SecurityRefusal: the path leads out of the folder.
    """
    try:
        _opened(value, folder).verify()
    # PIL raises SyntaxError on a broken PNG.
    except (ValueError, OSError, SyntaxError) as error:
        return f"not a readable image: {error}"
    return None


def _opened(value: object, folder: Path) -> Any:
    """The image, in its own mode and where possible not decoded."""
    from PIL import Image

    value = _unwrapped(value)
    if isinstance(value, Image.Image):
        return value.copy()
    if not isinstance(value, bytes | str):
        return Image.fromarray(_pixels(value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(_content(value, folder)))
        except Image.UnidentifiedImageError as error:
            # PIL's own text names the address of the buffer.
            raise ValueError("no known format") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError("more pixels than PIL opens") from error


LARGEST_IMAGE = 256 * MIB
"""Of the file of an image, in bytes."""


def _content(value: object, folder: Path) -> bytes:
    """The bytes of an image as it is kept: encoded, where it is."""
    value = _unwrapped(value)
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return read_plain(_inside(folder, value), largest=LARGEST_IMAGE)
    image = cast(Any, value)
    return _pixels(image).tobytes() if isinstance(value, list) else image.tobytes()


def image_bytes(value: object, folder: Path) -> bytes | None:
    """The content of an image as :func:`open_image` takes it; None where it cannot be had."""
    try:
        return _content(value, folder)
    except (OSError, ValueError, AttributeError, SecurityRefusal):
        return None


def _unwrapped(value: object) -> object:
    if not isinstance(value, dict):
        return value
    wrapped = cast("dict[str, object]", value)
    return wrapped.get("bytes") or wrapped.get("path")


def _inside(folder: Path, path: str) -> Path:
    root = folder.resolve()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise SecurityRefusal(
            f"an image path leads out of the folder of its data: {path[:100]!r}",
            fix="keep the images in the folder of the data file, with paths relative to it",
        )
    return resolved


def _pixels(value: object) -> NDArray[np.uint8]:
    if not isinstance(value, list | np.ndarray):
        raise ValueError(f"of type {type(value).__name__}")
    pixels: NDArray[Any] = np.asarray(cast(Any, value))  # ValueError on ragged lists
    whole = np.issubdtype(pixels.dtype, np.integer) and pixels.size
    if not whole or pixels.shape[2:] not in ((), (3,)) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("nested pixels must be integers 0 to 255 of shape [h, w] or [h, w, 3]")
    return pixels.astype(np.uint8)
