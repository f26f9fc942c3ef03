"""Conversations to token ids, with the loss on what the assistant says and nowhere else.

Where that is, :mod:`fedft.core.text.templates` finds out.
"""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedft.core.errors import MismatchError
from fedft.core.examples import Encoded, TokenExamples
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.text.templates import Conversation, Message, Refused, Template, leaves
from fedft.core.text.tokens import begins, chunks
from fedft.core.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = tuple[str, ...]
"""A row in parts, every second of which is learnt."""


def conversed(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Conversations with the loss on every answer of the assistant.

    A row is encoded as one text, so that its ids are those of the template. One of more than
    ``max_length`` tokens loses its end. Without a chat template a message is its text and a new
    line, and an answer its text and the end of text.

    Raises:
        MismatchError: it is not clear which chat template is meant.
    """
    encoder = TextEncoder.of(tokenizer)
    own: Any = encoder.tokenizer
    if own.chat_template is None:
        rows, faults = _without_template(encoder, conversations)
        return _labelled(encoder, rows, max_length, faults)
    try:
        source: str = own.get_chat_template()
    except ValueError as error:  # several, of which none is the one to use
        raise MismatchError(
            "the tokenizer has several chat templates, and none is called default",
            fix="save the tokenizer with one chat template",
        ) from error
    template = Template(own, source, encoder.plain.controls)
    faults: dict[int, str] = {}

    def render(given: list[Parts]) -> list[Parts]:
        return [tuple(_render(row)) for row in given]

    def _render(row: Parts) -> Sequence[str]:
        index, *said = row
        conversation = conversations[int(index)]
        texts = iter(said)
        filled = [_filled(message, texts) for message in conversation.messages]
        try:
            return template.parts(Conversation(tuple(filled), conversation.asked))
        except Refused as error:
            faults[int(index)] = str(error)
            return ("",)

    written = [(str(i), *leaves(c.messages)) for i, c in enumerate(conversations)]
    return _labelled(encoder, _rendered(encoder, render, written), max_length, faults)


def continued(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Texts and how they go on, put together as they are; the loss is on the second and on the end of text."""
    encoder = TextEncoder.of(tokenizer)
    both = list(zip(prompts, completions, strict=True))
    first = begins(encoder.tokenizer)
    found = _rendered(encoder, lambda rows: rows, both)
    return _labelled(encoder, [(first + prompt, rest) for prompt, rest in found], max_length, {})


def told(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Plain texts with what the tokenizer puts around them and an end of text; the loss is on every token."""
    encoder = TextEncoder.of(tokenizer)
    parts = (encoder.plain.encode(texts[own], special=True) for own in chunks(len(texts)))
    found = [row for part in parts for row in part.rows]
    return _labelled(encoder, [([], row) for row in found], max_length, {})


def _rendered(
    encoder: TextEncoder, render: Callable[[list[Parts]], list[Parts]], rows: Sequence[Parts]
) -> list[tuple[list[int], ...]]:
    """Token ids by part, of rows that are encoded as one text each."""
    parts = (encoder.plain.rendered(render, rows[own], whole=True) for own in chunks(len(rows)))
    return [row for part in parts for row in part]


# -------------------------------------------------------------------------------------- leaves


def _filled(message: Message, texts: Iterator[str]) -> dict[str, Any]:
    """The message with other texts in place of its own, in the order of :func:`_leaves`."""
    return {k: v if k == "role" else _replaced(v, texts) for k, v in message.items()}


def _replaced(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {next(texts): _replaced(field, texts) for field in value.values()}
    if isinstance(value, list | tuple):
        return [_replaced(item, texts) for item in value]
    return value


# --------------------------------------------------------------------------------------- labels


def _without_template(
    encoder: TextEncoder, conversations: Sequence[Conversation]
) -> tuple[list[tuple[list[int], ...]], dict[int, str]]:
    """Rows of a tokenizer that has no chat template, and which of them need one."""
    faults = {
        i: f"message {k + 1} calls tools, and the tokenizer has no chat template to write that"
        for i, c in enumerate(conversations)
        for k, message in enumerate(c.messages)
        if message.get("tool_calls")
    }
    closing = [] if encoder.special.end is None else [encoder.special.end]
    first = begins(encoder.tokenizer)
    rows: list[tuple[list[int], ...]] = []
    for conversation in conversations:
        learnt = set(conversation.learnt)
        texts = [
            str(message["content"]) + ("" if message["role"] == "assistant" else "\n")
            for message in conversation.messages
        ]
        parts: list[list[int]] = [first]
        for i, ids in enumerate(encoder.plain.encode(texts).rows):
            own = ids + closing if conversation.messages[i]["role"] == "assistant" else ids
            if (len(parts) % 2 == 0) != (i in learnt):
                parts.append([])
            parts[-1] = parts[-1] + own
        rows.append(tuple(parts))
    return rows, faults


def _ended(encoder: TextEncoder, row: Sequence[int], ends: Collection[int]) -> bool:
    """Whether a row ends in a control token, white space after it not counted."""
    for token in reversed(row):
        if token in ends:
            return True
        if str(encoder.tokenizer.decode([token])).strip():
            return False
    return False


def _labelled(
    encoder: TextEncoder,
    rows: Sequence[Sequence[list[int]]],
    max_length: int,
    faults: Mapping[int, str],
) -> Encoded[TokenExamples]:
    """Rows in parts, every second of which is learnt, as examples with a target for each token.

    An answer that does not end in a control token is followed by the end of text, if it is the
    last one. What follows the last answer is left out.
    """
    ends: Collection[int] = encoder.special.ends | encoder.plain.control
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    cut: list[bool] = []
    told = dict(faults)
    for i, parts in enumerate(rows):
        row = [token for part in parts for token in part]
        wanted = [token if k % 2 else IGNORED for k, part in enumerate(parts) for token in part]
        while wanted and wanted[-1] == IGNORED:
            wanted.pop()
        row = row[: len(wanted)]
        if row and not _ended(encoder, row, ends) and encoder.special.end is not None:
            row.append(encoder.special.end)
            wanted.append(encoder.special.end)
        asked = next((k for k, label in enumerate(wanted) if label != IGNORED), len(wanted))
        cut.append(len(row) > max_length and i not in told)
        row, wanted = row[:max_length], wanted[:max_length]
        if all(label == IGNORED for label in wanted[1:]):
            told.setdefault(
                i,
                f"what comes before the first answer takes {asked} tokens of data.max-length = "
                f"{max_length}: no token of an answer is left"
                if cut[-1] or asked
                else "one token alone, before which there is nothing to predict it from",
            )
        ids.append([] if i in told else row)
        labels.append([] if i in told else wanted)
    examples = TokenExamples.from_lists(ids, encoder.special.pad, token_labels=labels)
    return Encoded(examples, np.array(cut, np.bool_), told)
