"""A class for each word of a text: entities, parts of speech.

Ramshaw and Marcus, "Text Chunking using Transformation-Based Learning", WVLC 1995,
arXiv:cmp-lg/9505040, for tags that begin and continue a chunk.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.examples import Encoded, Examples, TokenExamples
from fedft.core.metrics import METRICS
from fedft.core.tasks import columns
from fedft.core.tasks.base import Task
from fedft.core.tasks.multi_label import rarest_class, several
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import IGNORED


class TokenClassification(Task):
    """Each word is scored at its first token; what follows of it, and control tokens, are ignored.

    Words beyond ``data.max-length`` are neither learnt nor scored. They are counted in a note.
    """

    name = "token-classification"
    auto = "AutoModelForTokenClassification"
    peft = "TOKEN_CLS"
    columns = (columns.words("tokens"), columns.labels("tags"))
    metrics = (
        METRICS["entity-f1"],
        METRICS["entity-precision"],
        METRICS["entity-recall"],
        METRICS["accuracy"],
        METRICS["macro-f1"],
    )

    usage = (
        "A row is a list of words (`is_split_into_words=True`), and a word's class is read at its first "
        "token. Where the tokenizer tells words by the space before them, as those of GPT-2 and RoBERTa, "
        'each word but the first is given with it: `[words[0], *(" " + w for w in words[1:])]`.'
    )

    @property
    def predicts(self) -> frozenset[str]:
        """One class for each word, and with the words of a row in order, tags."""
        return frozenset({"class", "tags"})

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        words, tags = row["tokens"], row["tags"]
        if len(words) == len(tags):
            return None
        return "tags", f"{len(tags)} for {len(words)} words: there must be one for each"

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        text = TextEncoder.of(encoder)
        words, tags = rows.values["tokens"], several(rows)
        found = tokens.of_words(words, text, max_length)
        ids: list[list[int]] = []
        marks: list[list[int]] = []
        for row, firsts, own in zip(found.rows, found.firsts, tags, strict=True):
            learnt = [IGNORED] * len(row)
            for word, token in firsts.items():
                learnt[token] = int(own[word])
            ids.append(row if firsts else [])
            marks.append(learnt if firsts else [])
        # A row of which nothing is left is refused, and has its own message.
        lost = np.array(
            [len(w) - len(f) if f else 0 for w, f in zip(words, found.firsts, strict=True)]
        )
        examples = TokenExamples.from_lists(ids, text.special.pad, token_labels=marks)
        faults = {
            row: f"none of its {len(words[row])} words has a token within data.max-length = {max_length}"
            for row, own in enumerate(ids)
            if not own
        }
        return Encoded(examples, found.cut, faults, _remarks(lost, found.cut))

    def strata(self, rows: RawRows) -> NDArray[np.int64]:
        """The rarest class of a row: what is everywhere, such as ``O``, tells no two rows apart."""
        return rarest_class(rows)

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        flat = labels.flatten()
        return torch.arange(len(flat), device=flat.device), flat


def _remarks(lost: NDArray[np.int64], cut: NDArray[np.bool_]) -> tuple[str, ...]:
    """What happened to words that are not scored.

    Args:
        lost: of each row how many of its words have no token in it. [n]
        cut: which rows were longer than the limit. [n]
    """
    beyond, silent = int(lost[cut].sum()), int(lost[~cut].sum())
    told = (
        f"{beyond:,} words lie beyond data.max-length, and their tags are not used"
        if beyond
        else "",
        f"{silent:,} words give no token, and their tags are not used" if silent else "",
    )
    return tuple(filter(None, told))
