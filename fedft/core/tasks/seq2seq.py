"""An encoder reads a text, a decoder writes another one: T5, BART and their relatives.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
JMLR 21, 2020, arXiv:1910.10683.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core.errors import MismatchError
from fedft.core.examples import Encoded, Examples
from fedft.core.metrics import METRICS
from fedft.core.streams import SequencePairs, Stream
from fedft.core.tasks import columns
from fedft.core.tasks.asked import Asked
from fedft.core.tasks.base import Task
from fedft.core.tasks.rows import RawRows
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import IGNORED, Batch


class Seq2Seq(Task):
    """The loss is on the tokens of the target, each predicted from the text and the tokens before it.

    What the decoder reads is the target, shifted by the model's own rule: behind its
    ``decoder_start_token_id``, or whatever else a model of its kind begins with. Text and target are
    cut at ``data.max-length`` tokens each.
    """

    name = "seq2seq"
    auto = "AutoModelForSeq2SeqLM"
    peft = "SEQ_2_SEQ_LM"
    columns = (columns.text("text"), columns.text("target"))
    metrics = (METRICS["perplexity"], METRICS["accuracy"])
    head = False
    one_table = False
    words = True
    writes = True

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        read = tokens.framed(rows.values["text"], encoder, max_length)
        wanted, left = tokens.targets(rows.values["target"], encoder, max_length)
        pad = TextEncoder.of(encoder).special.pad
        faults = {
            row: f"no token of the target is left: data.max-length = {max_length}"
            for row, some in enumerate(left)
            if not some
        }
        sources = [[] if row in faults else ids for row, ids in enumerate(read.rows)]
        examples = SequencePairs(Stream.of(sources, pad), Stream.of(wanted.rows, pad))
        return Encoded(examples, read.cut | wanted.cut, faults)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits, or what enters the output layer, of each token of the target. [b, t, V]"""
        own = dict(inputs)
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise MismatchError(
                f"{type(model).__name__} does not say what its decoder reads for given targets",
                fix="Choose another model, such as T5 or BART.",
            )
        own["decoder_input_ids"] = shift(labels=own.pop("labels"))
        return model(**own).logits

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Token t of the decoder predicts label t: the model has shifted what it reads."""
        return torch.arange(labels.numel(), device=labels.device), labels.flatten()

    def asked(self, batch: Batch, pad: int) -> Asked:
        rows = [[int(t) for t in row[row != IGNORED]] for row in batch.labels]
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        return Asked(inputs, rows, ahead=1)
