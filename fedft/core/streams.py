"""Rows of several texts that a model reads apart: a source and its target, a text and another one.

Each text is a stream: one flat array of token ids with offsets, as in
:class:`~fedft.core.examples.TokenExamples`, padded on its own when a batch is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.examples import Examples, Rows, flat, sha256
from fedft.core.types import IGNORED, Batch


@dataclass(frozen=True, eq=False)
class Stream:
    """One text a row.

    Attributes:
        ids: token ids of all rows end to end, int32 [total].
        offsets: row i is ``ids[offsets[i]:offsets[i + 1]]``, int64 [n + 1].
        pad_id: token id of padding.
        side: where it goes.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    pad_id: int
    side: Literal["left", "right"] = "right"

    @staticmethod
    def of(
        rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
    ) -> "Stream":
        """Packs one list of token ids a row."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return Stream(flat(rows, np.int32), offsets, pad_id, side)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row. [n]"""
        return np.diff(self.offsets)

    def subset(self, rows: Rows) -> "Stream":
        """The given rows, in the given order."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        # Position in the old array = position in the new one + how far its row has moved.
        old: NDArray[np.int64] = np.arange(int(offsets[-1])) + np.repeat(
            self.offsets[rows] - offsets[:-1], lengths
        )
        return replace(self, ids=self.ids[old], offsets=offsets)

    def padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Token ids of the given rows and which of them are real, [b, t] int64 each."""
        starts: NDArray[np.int64] = self.offsets[rows][:, None]  # [b, 1]
        ends: NDArray[np.int64] = self.offsets[rows + 1][:, None]  # [b, 1]
        width = int((ends - starts).max())
        found = (starts if self.side == "right" else ends - width) + np.arange(width)  # [b, t]
        mask = (starts <= found) & (found < ends)
        at = np.clip(found, 0, len(self.ids) - 1)
        ids = np.where(mask, self.ids[at], self.pad_id).astype(np.int64)
        return _tensor(ids), _tensor(mask.astype(np.int64))

    def arrays(self) -> list[NDArray[Any]]:
        """What a fingerprint is taken of."""
        return [self.ids, self.offsets]


@dataclass(frozen=True, eq=False)
class SequencePairs(Examples):
    """A source that an encoder reads, and the target that a decoder writes.

    Attributes:
        source: of the encoder. A row of length 0 cannot be used.
        target: of the decoder; padded on the right.
    """

    source: Stream
    target: Stream

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of both streams; 0 where the source has none."""
        own = self.source.lengths
        return np.where(own == 0, 0, own + self.target.lengths)

    def subset(self, rows: Rows) -> "SequencePairs":
        return SequencePairs(self.source.subset(rows), self.target.subset(rows))

    def collate(self, rows: Rows) -> Batch:
        """``labels`` are among the inputs: the model's own rule makes the decoder's inputs of them."""
        ids, mask = self.source.padded(rows)
        wanted, real = self.target.padded(rows)
        labels = wanted.masked_fill(real == 0, IGNORED)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "decoder_attention_mask": real,
        }
        return Batch(inputs, labels)

    def fingerprint(self) -> str:
        return _fingerprint({"source": self.source, "target": self.target}, None)


@dataclass(frozen=True, eq=False)
class TextGroups(Examples):
    """Several texts a row, each of which is read alone by the same model.

    Attributes:
        streams: by name, in the order in which a batch has them: ``text``, ``positive`` and, where
            there is one, ``negative``.
        codes: of each text but the first, the same for texts of the same tokens, [n, k - 1] int64.
    """

    streams: Mapping[str, Stream]
    codes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of the longest text of a row; 0 where one has no token."""
        each = [stream.lengths for stream in self.streams.values()]
        return np.where(np.min(each, axis=0) == 0, 0, np.max(each, axis=0))

    def subset(self, rows: Rows) -> "TextGroups":
        own = {name: stream.subset(rows) for name, stream in self.streams.items()}
        return TextGroups(own, self.codes[rows])

    def collate(self, rows: Rows) -> Batch:
        """Inputs go by ``NAME.input_ids`` and ``NAME.attention_mask``; each text has its own width."""
        inputs: dict[str, Tensor] = {}
        for name, stream in self.streams.items():
            inputs[f"{name}.input_ids"], inputs[f"{name}.attention_mask"] = stream.padded(rows)
        return Batch(inputs, _tensor(self.codes[rows]))

    def fingerprint(self) -> str:
        return _fingerprint(self.streams, self.codes)


def _fingerprint(streams: Mapping[str, Stream], codes: NDArray[Any] | None) -> str:
    arrays = [a for stream in streams.values() for a in stream.arrays()]
    arrays = [np.array(list(streams)), *arrays, *([] if codes is None else [codes])]
    return sha256(
        part
        for array in arrays
        for part in (str(array.dtype).encode(), np.ascontiguousarray(array).data)
    )


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
