"""Texts that a model writes while it is evaluated: greedy, for metrics that judge texts.

The model's own ``generate`` runs, with keys and values kept, over the rows of one batch at a time. Its
files may ask for beams, sampling, penalties or a shortest length: none of that is done. The token
taken is the likeliest each time, so that a score depends on the model alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedft.core.errors import MismatchError
from fedft.core.metrics import Tally
from fedft.core.models import Base, positions
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import Batch

_KEPT = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What the model's own settings say of how texts begin."""


class Writing:
    """Has a base write answers, with whatever adapter is in it.

    Args:
        base: whose task ``writes``.
    """

    def __init__(self, base: Base) -> None:
        model: Any = base.model
        if not hasattr(model, "generate") or not model.can_generate():
            raise MismatchError(
                f"{type(model).__name__} generates no text, and a metric of this run judges texts",
                fix="Leave that metric out of [evaluation] metrics, or choose another model.",
            )
        self._base, self._task = base, base.kind

    @staticmethod
    def of(base: Base) -> "Writing | None":
        """That of a base whose task's metrics judge texts; None where none does."""
        return Writing(base) if base.kind.needs_texts else None

    def tally(self, batch: Batch, *, whole: bool) -> Tally:
        """The sums of metrics over texts.

        Args:
            batch: of an evaluation.
            whole: whether all blocks run. Where some do not, no keys and values are kept: their number
                is read from a block that may be one of those.
        """
        return self._task.read(self.texts(batch, whole=whole))

    def texts(self, batch: Batch, *, whole: bool = True) -> list[tuple[str, str]]:
        """(what the model says, what is wanted), as the tokenizer reads them, of each row that asks."""
        text = TextEncoder.of(self._base.encoder)
        asked = self._task.asked(batch, text.special.pad)
        if not asked.wanted:
            return []
        # A chat template may end a turn in a control token that is no end of text.
        closing = {row[-1] for row in asked.wanted} & text.plain.control
        ends = sorted(text.special.ends | closing)
        written = self._written(asked.inputs, asked.ahead, ends, text.special.pad, whole)
        said = [self._decoded(text, _until(row, ends)) for row in written]
        return list(zip(said, (self._decoded(text, row) for row in asked.wanted), strict=True))

    def _written(
        self, inputs: Any, ahead: int, ends: Sequence[int], pad: int, whole: bool
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        model: Any = self._base.model
        limit, room = self._base.new_tokens, positions(model.config)
        if room is not None:
            limit = min(limit, room - 2 - ahead)  # some count from the pad token
        if limit < 1:
            return [[] for _ in range(len(next(iter(inputs.values()))))]
        own: Any = getattr(model, "generation_config", None)
        said = {
            name: getattr(own, name, None) or getattr(model.config, name, None) for name in _KEPT
        }
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            pad_token_id=pad,
            eos_token_id=list(ends) or None,
            use_cache=whole and not _deep(model.config),
            **{name: value for name, value in said.items() if value is not None},
        )
        given = {name: tensor.to(self._base.device) for name, tensor in inputs.items()}
        with _instead(model, settings):
            found: Tensor = model.generate(**given, generation_config=settings)
        return found[:, ahead:].tolist()

    @staticmethod
    def _decoded(text: TextEncoder, row: Sequence[int]) -> str:
        tokenizer: Any = text.tokenizer
        return tokenizer.decode(list(row), skip_special_tokens=True).strip()


def _deep(config: Any) -> bool:
    """Whether a decoder has more blocks than its encoder: transformers keeps too few keys and values."""
    depths = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers"))
    return any(n is not None and n > config.num_hidden_layers for n in depths)


@contextmanager
def _instead(model: Any, settings: Any) -> Iterator[None]:
    """For the time of the context, a model's own settings of generation are these: it adds to them."""
    before = getattr(model, "generation_config", None)
    model.generation_config = settings
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.generation_config = before


def _until(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What stands before the first token that ends a text."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])
