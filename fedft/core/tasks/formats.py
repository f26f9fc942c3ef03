"""In which columns rows for a decoder come: one class a format, one row each in :data:`FORMATS`.

A table is of the format whose columns it has, or of the one that ``[data] format`` names.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import Encoded, Examples
from fedft.core.names import hint
from fedft.core.tasks import columns, turns
from fedft.core.tasks.columns import Column
from fedft.core.text import chat, tokens
from fedft.core.text.templates import Conversation

Values = Mapping[str, Sequence[Any]]
"""Values by key of a format's columns, one a row."""


class Format(ABC):
    """One way to write a row.

    Attributes:
        name: of ``[data] format``.
        title: what a row is, for whoever watches a run.
        columns: what is read; a table of this format has all that are not optional.
        leads: whether a table that is also of another format is of this one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    leads: ClassVar[bool] = False

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """As :meth:`fedft.core.tasks.Task.fault`."""
        return None

    @abstractmethod
    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        """As :meth:`fedft.core.tasks.Task.encode`."""

    @property
    def required(self) -> list[str]:
        """Keys of the columns that a table has to have."""
        return [column.key for column in self.columns if not column.optional]


class PromptAnswer(Format):
    """The user's one message and the assistant's answer, tokenised apart."""

    name = "prompt-answer"
    title = "prompts with one answer each"
    columns = (columns.text("prompt"), columns.text("answer"))
    leads = True  # it was the only one at first

    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        return tokens.answered(values["prompt"], values["answer"], encoder, max_length)


class Alpaca(Format):
    """An instruction, mostly with something to apply it to. Taori et al., "Stanford Alpaca", 2023.

    Instruction, an empty line and input are the user's message.
    """

    name = "alpaca"
    title = "instructions"
    columns = (
        columns.text("instruction"),
        Column("input", turns.optional_text_fault, optional=True),
        columns.text("output"),
    )

    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        given = values.get("input") or [None] * len(values["instruction"])
        pairs = zip(values["instruction"], given, strict=True)
        asked = [f"{what}\n\n{on}" if on and on.strip() else what for what, on in pairs]
        return tokens.answered(asked, values["output"], encoder, max_length)


class Messages(Format):
    """Conversations as the Hub has most of them, a list of ``role`` and ``content``."""

    name = "messages"
    title = "conversations"
    columns = (Column("messages", turns.messages_fault, lists=True),)

    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        (column,) = self.columns
        found = [Conversation(turns.messages(value)) for value in values[column.key]]
        return chat.conversed(found, encoder, max_length)


class ShareGPT(Messages):
    """Conversations as ShareGPT exports them, a list of ``from`` and ``value``."""

    name = "sharegpt"
    columns = (Column("conversations", turns.messages_fault, lists=True),)


class PromptCompletion(Format):
    """A text and how it goes on, or, where both are lists of messages, a conversation and its end."""

    name = "prompt-completion"
    title = "prompts with completions"
    columns = (
        Column("prompt", turns.opening_fault),
        Column("completion", turns.closing_fault),
    )

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            return "completion", "a text where the prompt is a list of messages, or the reverse"
        return None

    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        pairs = list(zip(values["prompt"], values["completion"], strict=True))
        as_texts = [isinstance(prompt, str) for prompt, _ in pairs]
        if all(as_texts):
            return chat.continued(values["prompt"], values["completion"], encoder, max_length)
        if any(as_texts):
            raise MismatchError(
                "some prompts are texts and others lists of messages",
                fix="write all rows of a file in one form",
            )
        asked = [turns.messages(prompt) for prompt, _ in pairs]
        rest = [turns.messages(completion) for _, completion in pairs]
        found = [Conversation(a + b, len(a)) for a, b in zip(asked, rest, strict=True)]
        return chat.conversed(found, encoder, max_length)


class Text(Format):
    """Plain texts, with the loss on every token."""

    name = "text"
    title = "plain texts"
    columns = (columns.text("text"),)

    def encode(self, values: Values, encoder: Any, max_length: int) -> Encoded[Examples]:
        return chat.told(values["text"], encoder, max_length)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (PromptAnswer(), Messages(), ShareGPT(), Alpaca(), PromptCompletion(), Text())
}
"""``[data] format`` → what it means."""

AUTO = "auto"
"""The ``[data] format`` that goes by the columns."""


class Names(Protocol):
    """What a configuration says of columns; see :class:`fedft.core.spec.DataSpec`."""

    @property
    def format(self) -> str:
        """A name in :data:`FORMATS`, or ``auto``."""
        ...

    def column(self, key: str) -> str:
        """Name in the data of a column."""
        ...

    @staticmethod
    def key(key: str) -> str:
        """The setting that names a column."""
        ...


def named(name: str, formats: Sequence[Format]) -> Format | None:
    """The format that ``[data] format`` names; None where it goes by the columns.

    Raises:
        ConfigError: the task has none of that name.
    """
    if name == AUTO:
        return None
    known = {one.name: one for one in formats}
    if name not in known:
        raise ConfigError(
            f"data.format = {name[:40]!r} is no format of this task",
            fix=hint(name[:40], [AUTO, *known]) if known else "leave the key out",
        )
    return known[name]


def recognised(
    present: Collection[str], source: str, spec: Names, formats: Sequence[Format]
) -> Format:
    """The format of a table.

    Args:
        present: names of its columns.
        source: what the user calls it.
        spec: what the configuration says of columns and format.
        formats: to choose from.

    Raises:
        ConfigError: the format that is named is none.
        MismatchError: the columns are those of no format, or of several.
    """
    if (chosen := named(spec.format, formats)) is not None:
        return chosen
    found = [one for one in formats if all(spec.column(k) in present for k in one.required)]
    first = next((one for one in found if one.leads), None)
    if first is not None or len(found) == 1:
        return first or found[0]
    if found:
        ways = " or ".join(_described(one, spec) for one in found)
        raise MismatchError(
            f"{source} has the columns of several formats: its rows can be read as {ways}",
            fix=f'set data.format (fedft join: --format) = "{found[0].name}", or the one you mean',
        )
    if (meant := _meant(present, spec, formats)) is not None:
        return meant
    shown = ", ".join(" ".join(name.split())[:40] or repr(name) for name in [*present][:20])
    lacking = formats[0].required[0]
    raise MismatchError(
        f"{source} has no column {spec.column(lacking)!r} ({spec.key(lacking)}), nor those of another "
        f"format; it has {shown}; rows are read as "
        + "; ".join(_described(one, spec) for one in formats),
        fix="rename the columns, or name them in the table [data] (fedft join: --column)",
    )


def _described(one: Format, spec: Names) -> str:
    return f"{one.name} ({', '.join(spec.column(key) for key in one.required)})"


def _meant(present: Collection[str], spec: Names, formats: Sequence[Format]) -> Format | None:
    """The only format of which the configuration names a column, or the table has one."""
    renamed = [one for one in formats if any(spec.column(key) != key for key in one.required)]
    if renamed:
        return next((one for one in renamed if one.leads), renamed[0])
    some = [one for one in formats if any(spec.column(key) in present for key in one.required)]
    leading = next((one for one in some if one.leads), None)
    return leading or (some[0] if len(some) == 1 else None)
