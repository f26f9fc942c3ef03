"""Vectors of texts: those that belong together are to be near each other, and far from all others.

van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
arXiv:1807.03748 (InfoNCE); Henderson et al., "Efficient Natural Language Response Suggestion for Smart
Reply", 2017, arXiv:1705.00652 (the other rows of a batch as negatives).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedft.core.errors import MismatchError
from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS, Predictions, Tally
from fedft.core.precise import widened
from fedft.core.streams import Stream, TextGroups
from fedft.core.tasks import columns
from fedft.core.tasks.base import Reduction, Task, wide
from fedft.core.tasks.pooling import Embedding, EmbeddingSpec, pooling_of
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder

_AT_ONCE = 1024
"""Rows that are compared with all candidates at a time."""


class SentenceEmbeddings(Task):
    """Each text is to be nearest to its own positive among all texts of the batch.

    With texts a, positives p and negatives n, as unit vectors, and a scale s (``[model] embedding``):

        loss_i = -log( exp(s a_i p_i) / sum_j (exp(s a_i p_j) + exp(s a_i n_j)) )

    In training j goes over the rows of the batch. An evaluation takes all of its rows at once: its
    scores do not depend on how rows are put into batches. Texts of the same tokens are the same
    answer there.
    """

    name = "sentence-embeddings"
    auto = "AutoModel"
    peft = "FEATURE_EXTRACTION"
    columns = (
        columns.text("text"),
        columns.text("positive"),
        columns.text("negative", optional=True),
    )
    metrics = (METRICS["mrr"], METRICS["accuracy"])
    head = False
    alone = False
    together = True
    reads_model = frozenset({"embedding"})
    made_up = (2, 8)

    @property
    def predicts(self) -> frozenset[str]:
        """How high its own positive stands for each text, among all."""
        return frozenset({"rank"})

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        special = TextEncoder.of(encoder).special
        streams: dict[str, Stream] = {}
        cut = np.zeros(len(rows), np.bool_)
        known: dict[tuple[int, ...], int] = {}
        codes: list[list[int]] = []
        for column in self.columns:
            if column.key in rows.values:
                found = tokens.framed(rows.values[column.key], encoder, max_length)
                streams[column.key] = Stream.of(found.rows, special.pad, special.side)
                cut |= found.cut
                if column.key != "text":
                    codes.append([known.setdefault(tuple(ids), len(known)) for ids in found.rows])
        return Encoded(TextGroups(streams, np.array(codes, np.int64).T), cut)

    def settle(self, model: nn.Module, embedding: EmbeddingSpec | None, folder: Path) -> None:
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise MismatchError(
                f"the model in {folder} writes with a decoder, and {self.name} takes an encoder or a decoder alone",
                fix="Choose another model.",
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = cast(Any, None)  # nothing reads it, and a checkpoint may lack it
        told = None if embedding is None else embedding.pooling
        pooling = pooling_of(folder) if told is None else told
        own = Embedding(pooling) if embedding is None else Embedding(pooling, embedding.scale)
        vars(model)[_EMBEDDING] = own

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The vectors of a row's texts, whose products are scaled cosines. [b, 2 or 3, d]"""
        embedding: Embedding = getattr(model, _EMBEDDING)
        found: list[Tensor] = []
        for column in self.columns:
            if f"{column.key}.input_ids" in inputs:
                ids, mask = (inputs[f"{column.key}.{n}"] for n in ("input_ids", "attention_mask"))
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state
                found.append(embedding.vectors(states, mask))
        return torch.stack(found, 1)

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        each = torch.cat([s.logsumexp(1) - s[at] for s, at in _logits(wide(outputs))])
        return each if reduction == "none" else each.mean()

    def tally(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        rows: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> Tally:
        """All rows of an evaluation: their losses, and the ranks of their own positives."""
        losses: list[Tensor] = []
        ranks: list[Tensor] = []
        for s, (row, own) in _logits(wide(outputs)):
            found = s[row, own]
            losses.append(s.logsumexp(1) - found)
            ahead = ~(s < found[:, None])  # a tie is no success, and neither is what is no number
            ahead &= targets.T.flatten() != targets[own, :1]
            ranks.append(1 + ahead.sum(1))
        each, rank, right = torch.cat(losses), torch.cat(ranks), targets[:, 0]
        said = torch.where(rank == 1, right, torch.full_like(right, -1))
        items = Predictions(each, said, right, len(right), rank[:, None], names=names)
        return self.counted(items, float(widened(each).sum()))


_EMBEDDING = "fedft_embedding"
"""Where a model says how its vectors are made."""


def _logits(outputs: Tensor) -> Any:
    """Some rows at a time: products with all candidates, positives first, and where their own ones are."""
    candidates = outputs[:, 1:].transpose(0, 1).flatten(0, 1)  # [(k - 1) n, d]
    for first in range(0, len(outputs), _AT_ONCE):
        own = torch.arange(first, min(first + _AT_ONCE, len(outputs)), device=outputs.device)
        yield outputs[own, 0] @ candidates.T, (own - first, own)
