"""Text to token ids, a column at a time."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedft.core.errors import MismatchError
from fedft.core.examples import TokenExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096
"""Rows tokenised at once: bounds the memory of Python lists, and keeps the fast tokenizer busy."""

_FIXED_DATE = "26 Jul 2024"
"""Llama 3's template writes the day into its system prompt; this is its own default. Without it
the data, and so their fingerprint, would change overnight."""


def classified(
    texts: Sequence[str],
    labels: NDArray[np.int64],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> TokenExamples:
    """Texts with one class each; longer ones are cut to ``max_length`` tokens."""
    ids: list[list[int]] = []
    for rows in _chunks(len(texts)):
        encoded: Any = tokenizer(
            list(texts[rows]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids += encoded["input_ids"]
    return TokenExamples.from_lists(ids, _pad_id(tokenizer), labels=labels)


def answered(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> tuple[TokenExamples, dict[int, int]]:
    """Prompts with answers; the loss is on the answer and on the token that ends its turn.

    With a chat template the prompt is the user's turn and the answer the assistant's; without
    one a row is ``bos prompt newline answer eos``. Prompt and answer are tokenised apart, since
    that is what the model meets when it generates. A row longer than ``max_length`` loses the
    end of its answer.

    Returns:
        The examples; and of each row whose prompt alone fills ``max_length``, so that no token of
        its answer is left, the length of the prompt in tokens. Such a row has no tokens.

    Raises:
        MismatchError: the chat template is not usable for training.
    """
    ids: list[list[int]] = []
    starts: list[int] = []
    for rows in _chunks(len(prompts)):
        turns = _turns(tokenizer, prompts[rows], answers[rows])
        for prompt, answer in zip(*turns, strict=True):
            ids.append((prompt + answer)[:max_length] if len(prompt) < max_length else [])
            starts.append(len(prompt))
    spilled = {row: starts[row] for row, tokens in enumerate(ids) if not tokens}
    return TokenExamples.from_lists(ids, _pad_id(tokenizer), answers=starts), spilled


def _turns(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the answers, each answer with the end of its turn."""
    bos: list[int] = []
    if tokenizer.chat_template is None:
        prompts = [f"{prompt}\n" for prompt in prompts]
        bos = _bos(tokenizer)
    else:
        prompts, answers = _chat_texts(tokenizer, prompts, answers)
    prompt_ids = [bos + ids for ids in _encode(tokenizer, prompts)]
    ends = set(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id}
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer_ids = [
        ids if ids and ids[-1] in ends else ids + closing for ids in _encode(tokenizer, answers)
    ]
    return prompt_ids, answer_ids


def _chat_texts(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What the template writes before the answer, and the answer with what it writes after.

    White space after the end of the turn belongs to the next turn and is left out.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    told = [
        [*turn, {"role": "assistant", "content": answer}]
        for turn, answer in zip(asked, answers, strict=True)
    ]
    options: dict[str, Any] = {"tokenize": False, "date_string": _FIXED_DATE}
    before: list[str] = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole: list[str] = tokenizer.apply_chat_template(told, **options)
    if not all(text.startswith(prefix) for prefix, text in zip(before, whole, strict=True)):
        raise MismatchError(
            "the tokenizer's chat template does not continue its generation prompt with the answer, "
            "so that the answer's tokens cannot be told apart",
            fix="use a model whose template does, or a tokenizer without a chat template",
        )
    return before, [
        text[len(prefix) :].rstrip() for prefix, text in zip(before, whole, strict=True)
    ]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with none that are not written in it."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # A prompt may well be longer than the model takes: it is measured here and refused above.
        verbose=False,
    )["input_ids"]


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where this tokenizer puts one before a text."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _pad_id(tokenizer: Any) -> int:
    """The padding token, or where there is none the end of text: the mask hides either."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(first, first + CHUNK) for first in range(0, rows, CHUNK))
