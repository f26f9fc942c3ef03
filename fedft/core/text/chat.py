"""Conversations to token ids, with the loss on what the assistant says and nowhere else.

The chat template itself tells where that is. Let T(m) be what it makes of messages m, and G(m) the
same followed by the prompt to answer. Of an answer m_j the text from the end of G(m_1 … m_{j-1}) to
the end of T(m_1 … m_j) is learnt: what the model adds when it is asked, with the control token that
ends its turn. White space after it belongs to the next turn. Both have to stand like that in
T(m_1 … m_n); a template that writes an earlier answer otherwise once more follows is told apart.
A template with ``{% generation %}`` says by these marks what is learnt, and is taken at its word.
"""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fedft.core.examples import Encoded, TokenExamples
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.text.tokens import FIXED_DATE, begins
from fedft.core.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_TELLING = 8
"""Characters from which on a text in a message is a quotation, and no word of the template's."""

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else the template reads, such as ``tool_calls``."""

Parts = tuple[str, ...]
"""A row in parts, every second of which is learnt."""


class Refused(Exception):
    """Why a conversation cannot be learnt with this template, in words that quote none of it."""


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        messages: in order.
        asked: how many of them are given; of the others the assistant's are learnt.
    """

    messages: tuple[Message, ...]
    asked: int = 0

    @property
    def learnt(self) -> list[int]:
        """Which messages the loss is on."""
        roles = [message["role"] for message in self.messages]
        return [i for i, role in enumerate(roles) if role == "assistant" and i >= self.asked]


def conversed(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Conversations with the loss on every answer of the assistant.

    A row is encoded as one text, so that its ids are those of the template. One of more than
    ``max_length`` tokens loses its end. Without a chat template a message is its text and a new
    line, and an answer its text and the end of text.
    """
    encoder = TextEncoder.of(tokenizer)
    own: Any = encoder.tokenizer
    if own.chat_template is None:
        rows, faults = _without_template(encoder, conversations)
        return _labelled(encoder, rows, max_length, faults)
    template = _Template(own, encoder.plain.controls)
    faults: dict[int, str] = {}

    def render(given: list[Parts]) -> list[Parts]:
        return [tuple(_render(row)) for row in given]

    def _render(row: Parts) -> Sequence[str]:
        index, *leaves = row
        conversation = conversations[int(index)]
        texts = iter(leaves)
        filled = [_filled(message, texts) for message in conversation.messages]
        try:
            return template.parts(Conversation(tuple(filled), conversation.asked))
        except Refused as error:
            faults[int(index)] = str(error)
            return ("",)

    leaves = [(str(i), *_leaves(c.messages)) for i, c in enumerate(conversations)]
    return _labelled(
        encoder, encoder.plain.rendered(render, leaves, whole=True), max_length, faults
    )


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
    found = encoder.plain.rendered(lambda rows: rows, both, whole=True)
    return _labelled(encoder, [(first + prompt, rest) for prompt, rest in found], max_length, {})


def told(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | TextEncoder",
    max_length: int,
) -> Encoded[TokenExamples]:
    """Plain texts with what the tokenizer puts around them and an end of text; the loss is on every token."""
    encoder = TextEncoder.of(tokenizer)
    found = encoder.plain.encode(texts, special=True).rows
    return _labelled(encoder, [([], row) for row in found], max_length, {})


# ------------------------------------------------------------------------------------ templates


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: of transformers.
        controls: finds control tokens in a text; None where there are none.
    """

    tokenizer: Any
    controls: re.Pattern[str] | None

    def parts(self, conversation: Conversation) -> list[str]:
        """The conversation's text up to the end of its last answer, every second part learnt.

        Raises:
            Refused: there is no such text.
        """
        template = self.tokenizer.get_chat_template()
        if _MARKS.search(template):
            whole, spans = self._marked(conversation, template)
        else:
            whole = self._text(conversation.messages)
            spans = [self._answer(conversation, j, whole) for j in conversation.learnt]
        ends = [0, *(end for span in spans for end in span)]
        if any(a > b for a, b in pairwise(ends)) or not spans:
            raise Refused("the model's chat template writes the answers in another order")
        return [whole[a:b] for a, b in pairwise(ends)]

    def _text(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """What the template makes of messages; with ``asks`` the prompt to answer follows."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=asks,
                tokenize=False,
                date_string=FIXED_DATE,
            )
        except Exception as error:  # whatever the code of a template raises
            raise _refusal(error, messages) from error
        return text

    def _marked(
        self, conversation: Conversation, template: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where the template says that it is the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, "date_string": FIXED_DATE}
        try:
            found: Any = render_jinja_template(
                [[dict(message) for message in conversation.messages]],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **options,
            )
        except Exception as error:  # whatever the code of a template raises
            raise _refusal(error, conversation.messages) from error
        (whole,), (marks,) = found
        given = 0
        if asked := conversation.messages[: conversation.asked]:
            given = _alike(self._text(asked, asks=True), whole)
        spans = [(max(start, given), end) for start, end in marks if end > given]
        if not any(end > start for start, end in spans):
            raise Refused("the marks of the model's chat template hold nothing of the assistant's")
        return whole, spans

    def _answer(self, conversation: Conversation, j: int, whole: str) -> tuple[int, int]:
        """From where to where message j stands in the whole text."""
        messages = conversation.messages
        before = self._text(messages[:j], asks=True)
        until = self._text(messages[: j + 1])
        which = f"message {j + 1} of {len(messages)}"
        if not (until.startswith(before) and whole.startswith(before)):
            raise Refused(
                f"the model's chat template does not go on from its prompt to answer with {which}, so "
                "that no one text holds all answers as they are given; "
                "give one answer a row, or a template with {% generation %} marks"
            )
        end = self._end(until, whole, len(before))
        if end is None:
            raise Refused(
                f"the model's chat template writes {which} otherwise once more follows (reasoning that "
                "it takes out, messages that it merges), so that no one text holds all answers as they "
                "are given; give one answer a row, or a template with {% generation %} marks"
            )
        start = len(before)
        if before == self._text(messages[:j]):
            start += self._heading(until[start:end], str(messages[j].get("content") or ""))
        if not whole[start:end]:
            raise Refused(f"the model's chat template writes nothing of {which}")
        return start, end

    def _end(self, until: str, whole: str, start: int) -> int | None:
        """Where an answer ends that ``until`` ends with; None where it is not so in the whole text.

        What the template puts at the end of a conversation, and not between its turns, is left out.
        """
        same = _alike(until, whole)
        rest = until.rstrip()
        if same >= len(rest):
            return max(start, len(rest))
        for text in (until, whole):  # two control tokens may begin alike
            for found in self.controls.finditer(text, start) if self.controls else ():
                if found.start() < same < found.end():
                    same = found.start()
        closing = until[same:]
        if self.controls is not None:
            closing = self.controls.sub("", closing)
        return None if closing.strip() or same <= start else max(start, len(until[:same].rstrip()))

    @staticmethod
    def _heading(answer: str, content: str) -> int:
        """Length of the role's name before an answer, of a template that has no prompt to answer."""
        at = answer.find(content.strip())
        return at if at > 0 and answer[:at].strip() else 0


def _alike(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 (these are no paths)


def _refusal(error: Exception, messages: Sequence[Message]) -> Refused:
    """What a template says where it refuses by ``raise_exception``, unless it quotes a message."""
    said = " ".join(str(error).split())[:120]
    quoted = any(len(text) >= _TELLING and text in said for text in _leaves(messages))
    if type(error).__name__ != "TemplateError" or quoted or not said:
        return Refused(f"the model's chat template fails on it ({type(error).__name__})")
    return Refused(f"the model's chat template refuses it: {said}")


# -------------------------------------------------------------------------------------- leaves


def _leaves(messages: Sequence[Message]) -> Iterator[str]:
    """All that a user wrote in a message; names of roles and of a message's own fields are known."""
    for message in messages:
        for key, field in message.items():
            if key != "role":
                yield from _texts(field)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, field in value.items():
            yield str(key)
            yield from _texts(field)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


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
