"""Where the answers of the assistant stand in what a chat template makes of a conversation.

The template itself tells. Let T(m) be what it makes of messages m, and G(m) the same followed by the
prompt to answer. Of an answer m_j the text from the end of G(m_1 … m_{j-1}) to the end of
T(m_1 … m_j) is learnt: what the model adds when it is asked, with the control token that ends its
turn. White space after it belongs to the next turn. Both have to stand like that in T(m_1 … m_n); a
template that writes an earlier answer otherwise once more follows is told apart.
A template with ``{% generation %}`` says by these marks what is learnt, and is taken at its word.
"""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedft.core.text.tokens import FIXED_DATE

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_TELLING = 8
"""Characters from which on a text in a message is a quotation, and no word of the template's."""

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else the template reads, such as ``tool_calls``."""


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


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: of transformers.
        source: its text.
        controls: finds control tokens in a text; None where there are none.
    """

    tokenizer: Any
    source: str
    controls: re.Pattern[str] | None

    def parts(self, conversation: Conversation) -> list[str]:
        """The conversation's text up to the end of its last answer, every second part learnt.

        Raises:
            Refused: there is no such text.
        """
        if _MARKS.search(self.source):
            whole, spans = self._marked(conversation)
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

    def _marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where the template says that it is the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, "date_string": FIXED_DATE}
        try:
            found: Any = render_jinja_template(
                [[dict(message) for message in conversation.messages]],
                chat_template=self.source,
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
    quoted = any(len(text) >= _TELLING and text in said for text in leaves(messages))
    if type(error).__name__ != "TemplateError" or quoted or not said:
        return Refused(f"the model's chat template fails on it ({type(error).__name__})")
    return Refused(f"the model's chat template refuses it: {said}")


def leaves(messages: Sequence[Message]) -> Iterator[str]:
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
