"""Text to token ids, a column at a time."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedft.core.errors import MismatchError
from fedft.core.examples import Encoded, TokenExamples
from fedft.core.text.plain_text import Ids, PlainText, Words
from fedft.core.text.special_tokens import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096
"""Rows tokenised at once: bounds the memory of Python lists, and keeps the fast tokenizer busy."""

FIXED_DATE = "26 Jul 2024"
"""Llama 3's template writes the day into its system prompt; this is its own default. Without it
the data, and so their fingerprint, would change overnight."""


def labelled(
    texts: Sequence[str],
    labels: NDArray[Any],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
    seconds: Sequence[str] | None = None,
) -> Encoded[TokenExamples]:
    """Texts, or pairs of them, with what is learnt of each; longer rows are cut.

    Where the tokenizer marks which token is of which text of a pair, the model is told so.

    Args:
        texts: as users wrote them.
        labels: a class or other numbers a row, [n, …].
        tokenizer: of the model.
        max_length: tokens at which a row is cut, the longer text of a pair first.
        seconds: the second text of each row, where rows are pairs.
    """
    found = framed(texts, tokenizer, max_length, seconds)
    special = TextEncoder.of(tokenizer).special
    marked = found.types is not None and any(map(any, found.types))
    examples = TokenExamples.from_lists(
        found.rows,
        special.pad,
        labels=labels,
        side=special.side,
        beside={"token_type_ids": found.types} if found.types and marked else None,
    )
    return Encoded(examples, found.cut)


def framed(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
    seconds: Sequence[str] | None = None,
) -> Ids:
    """Token ids of texts, or of pairs of them, with what the tokenizer puts around them.

    Args:
        texts: as users wrote them; any number of them, and none.
        tokenizer: of the model.
        max_length: tokens at which a row is cut, the longer text of a pair first.
        seconds: the second text of each row, where rows are pairs.
    """
    plain = TextEncoder.of(tokenizer).plain
    parts = [
        plain.encode(
            texts[rows],
            special=True,
            max_length=max_length,
            seconds=None if seconds is None else seconds[rows],
        )
        for rows in chunks(len(texts))
    ]
    typed = bool(parts) and all(part.types is not None for part in parts)
    return Ids(
        [row for part in parts for row in part.rows],
        np.concatenate([np.zeros(0, np.bool_), *(part.cut for part in parts)]),
        [row for part in parts for row in part.types or ()] if typed else None,
    )


def of_words(
    rows: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Words:
    """Rows that are lists of words, see :meth:`fedft.core.text.plain_text.PlainText.words`."""
    plain = TextEncoder.of(tokenizer).plain
    parts = [plain.words(rows[chunk], max_length) for chunk in chunks(len(rows))]
    return Words(
        [row for part in parts for row in part.rows],
        np.concatenate([np.zeros(0, np.bool_), *(part.cut for part in parts)]),
        [firsts for part in parts for firsts in part.firsts],
    )


def targets(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase | TextEncoder", max_length: int
) -> tuple[Ids, list[bool]]:
    """Token ids of texts that a decoder is to write, ended as the tokenizer ends a target.

    Where it puts no end of text behind a text, one is put there: the model learns where to stop. A text
    that is too long loses its end, and is ended all the same.

    Returns:
        The rows, and of each whether a token of the text itself is left.
    """
    encoder = TextEncoder.of(tokenizer)
    own: Any = encoder.tokenizer
    end, ends = encoder.special.end, encoder.special.ends
    with _target_mode(own):
        plain = PlainText(own)
        frame: list[int] = own("")["input_ids"]
        closing = [] if end is None or ends & set(frame) else [end]
        room = max(0, max_length - len(closing))
        parts = [
            plain.encode(texts[rows], special=True, max_length=room) for rows in chunks(len(texts))
        ]
    rows = [row + closing for part in parts for row in part.rows]
    cut = np.concatenate([np.zeros(0, np.bool_), *(part.cut for part in parts)])
    return Ids(rows, cut), [len(row) > len(frame) + len(closing) for row in rows]


@contextmanager
def _target_mode(tokenizer: Any) -> Iterator[None]:
    """Some tokenizers treat what is to be written otherwise: another language, another table."""
    enter = getattr(tokenizer, "_switch_to_target_mode", None)
    leave = getattr(tokenizer, "_switch_to_input_mode", None)
    if enter is None or leave is None:
        yield
        return
    enter()
    try:
        yield
    finally:
        leave()


def answered(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Prompts with answers; the loss is on the answer and on the token that ends its turn.

    With a chat template the prompt is the user's turn and the answer the assistant's; without
    one a row is ``bos prompt newline answer eos``. Prompt and answer are tokenised apart, since
    that is what the model meets when it generates. An answer ends in the control token with which
    the template ends its turn; one that does not, in the end of text. A row longer than
    ``max_length`` loses the end of its answer.

    Raises:
        MismatchError: the chat template is not usable for training.
    """
    encoder = TextEncoder.of(tokenizer)
    parts = (turns(encoder, prompts[rows], answers[rows]) for rows in chunks(len(prompts)))
    return laid((row for part in parts for row in part), encoder, max_length)


def laid(
    rows: Iterable[tuple[list[int], list[int]]], encoder: TextEncoder, max_length: int
) -> Encoded[TokenExamples]:
    """Token ids of prompts and of their answers as rows, cut to ``max_length``."""
    ids: list[list[int]] = []
    starts: list[int] = []
    cut: list[bool] = []
    for prompt, answer in rows:
        row = prompt + answer
        cut.append(len(row) > max_length)
        ids.append(row[:max_length] if len(prompt) < max_length else [])
        starts.append(len(prompt))
    faults = {
        row: f"the prompt takes {starts[row]} tokens of data.max-length = {max_length}: no token of "
        "the answer is left"
        for row, tokens in enumerate(ids)
        if not tokens
    }
    examples = TokenExamples.from_lists(ids, encoder.special.pad, answers=starts)
    return Encoded(examples, np.array(cut, np.bool_), faults)


def turns(
    encoder: TextEncoder, prompts: Sequence[str], answers: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its answer with the end of its turn."""
    tokenizer: Any = encoder.tokenizer
    if tokenizer.chat_template is None:
        return continued(encoder, [f"{prompt}\n" for prompt in prompts], answers)
    return spoken(encoder, ("user",), [(prompt,) for prompt in prompts], answers)


def continued(
    encoder: TextEncoder, prompts: Sequence[str], answers: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of texts that answers go on with as they are, and of the answers with their end."""
    bos, plain = begins(encoder.tokenizer), encoder.plain
    asked = [bos + ids for ids in plain.encode(prompts).rows]
    return _closed(encoder, zip(asked, plain.encode(answers).rows, strict=True))


def spoken(
    encoder: TextEncoder,
    roles: Sequence[str],
    prompts: Sequence[tuple[str, ...]],
    answers: Sequence[str],
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of conversations by the chat template, and of the assistant's answers to them.

    Args:
        encoder: whose tokenizer has a chat template.
        roles: who speaks, of every conversation.
        prompts: what each says in turn.
        answers: of the assistant.

    Raises:
        MismatchError: the chat template is not usable for training.
        Exception: whatever the template raises of these roles.
    """
    rows = [(*prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    render = partial(_chat_texts, encoder.tokenizer, roles)
    return _closed(encoder, iter(encoder.plain.rendered(render, rows)))


def _closed(
    encoder: TextEncoder, rows: Iterable[tuple[list[int], ...]]
) -> Iterator[tuple[list[int], list[int]]]:
    # What users wrote gives no control token: one that is last here is the template's.
    ends = encoder.special.ends | encoder.plain.control
    closing = [] if encoder.special.end is None else [encoder.special.end]
    for prompt, answer in rows:
        ended = bool(answer) and answer[-1] in ends
        yield prompt, answer if ended else answer + closing


def _chat_texts(
    tokenizer: Any, roles: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """What the template writes before each answer, and the answer with what it writes after.

    White space after the end of the turn belongs to the next turn and is left out.
    """
    asked = [
        [{"role": role, "content": text} for role, text in zip(roles, row[:-1], strict=True)]
        for row in rows
    ]
    told = [
        [*turn, {"role": "assistant", "content": row[-1]}]
        for turn, row in zip(asked, rows, strict=True)
    ]
    options: dict[str, Any] = {"tokenize": False, "date_string": FIXED_DATE}
    before: list[str] = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole: list[str] = tokenizer.apply_chat_template(told, **options)
    if not all(text.startswith(prefix) for prefix, text in zip(before, whole, strict=True)):
        raise MismatchError(
            "the tokenizer's chat template does not continue its generation prompt with the answer, "
            "so that the answer's tokens cannot be told apart",
            fix="use a model whose template does, or a tokenizer without a chat template",
        )
    return [
        (prefix, text[len(prefix) :].rstrip()) for prefix, text in zip(before, whole, strict=True)
    ]


def begins(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where this tokenizer puts one before a text."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def chunks(rows: int) -> Iterator[slice]:
    """Rows, :data:`CHUNK` at a time."""
    return (slice(first, first + CHUNK) for first in range(0, rows, CHUNK))
