"""A conversation as a value of a column: what is wrong with it, and its messages in one form.

A message is ``{"role": …, "content": …}``, or ``{"from": …, "value": …}`` with ShareGPT's names of
roles. No message to the reader quotes the text of an example; of roles, which are names, a few
characters are shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fedft.core.names import kind_of
from fedft.core.tasks.columns import text_fault
from fedft.core.text.templates import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Name of a role in the data → its name for a chat template."""

_FORMS = (("role", "content"), ("from", "value"))


def messages(value: object) -> tuple[Message, ...]:
    """The messages of a value that has passed its check; what is null is left out."""
    return tuple(_message(cast("Mapping[str, Any]", one)) for one in _listed(value) or ())


def messages_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a conversation of which the assistant's part is learnt."""
    return _fault(value, answers=True, opens=True)


def opening_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a text, or with the beginning of a conversation."""
    return text_fault(value) if isinstance(value, str) else _fault(value, answers=False, opens=True)


def closing_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a text, or with the end of a conversation."""
    return text_fault(value) if isinstance(value, str) else _fault(value, answers=True, opens=False)


def optional_text_fault(value: object, _: Path | None = None) -> str | None:
    """What is wrong with a text that may be absent."""
    blank = value is None or value != value or (isinstance(value, str) and not value.strip())
    return None if blank else text_fault(value)


def _fault(value: object, *, answers: bool, opens: bool) -> str | None:
    if value is None or value == "" or value == []:
        return "missing or empty"
    found = _listed(value)
    if found is None:
        return f"a list of messages is expected, got {kind_of(value)}"
    roles: list[str] = []
    for number, one in enumerate(found, 1):
        if (told := _message_fault(one)) is not None:
            return f"message {number}: {told}"
        roles.append(_message(cast("Mapping[str, Any]", one))["role"])
    spoken = [role for role in roles if role != "system"]
    if opens and spoken[:1] == ["assistant"]:
        return "the assistant speaks first, and there is nothing that it answers"
    if answers and "assistant" not in roles:
        return "no message is the assistant's: there is nothing to learn"
    if opens and not spoken:
        return "no message is a user's"
    return None


def _message_fault(one: object) -> str | None:
    if not isinstance(one, Mapping):
        return f"role and content are expected, got {kind_of(one)}"
    message = cast("Mapping[str, object]", one)
    form = _form(message)
    if form is None:
        return "it has no role (role and content, or from and value)"
    role = message[form[0]]
    if not isinstance(role, str):
        return f"the role is {kind_of(role)}, and a text is expected"
    if (known := ROLES.get(role)) is None:
        return f"the role {role[:40]!r} is none of {', '.join(ROLES)}"
    content = message.get(form[1])
    if isinstance(content, list | tuple):
        return "the content is a list of parts (images, sound), and causal-lm reads texts"
    if content is None or content == "":
        if known == "assistant" and message.get("tool_calls"):
            return _nested_fault(message)
        if known in ("system", "tool") and content == "":
            return None
    elif known in ("system", "tool") and isinstance(content, str) and not content.strip():
        return None
    told = text_fault(content)
    return f"content: {told}" if told is not None else _nested_fault(message)


def _nested_fault(message: Mapping[str, object]) -> str | None:
    """What is wrong with the texts of further fields, such as the arguments of a call."""
    for text in _texts(message):
        try:
            text.encode()
        except UnicodeEncodeError:
            return "not a valid Unicode text"
    return None


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, field in cast("Mapping[object, object]", value).items():
            yield str(key)
            yield from _texts(field)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[object]", value):
            yield from _texts(item)


def _form(message: Mapping[str, object]) -> tuple[str, str] | None:
    return next((form for form in _FORMS if message.get(form[0]) is not None), None)


def _message(one: Mapping[str, Any]) -> Message:
    role, content = _form(one) or _FORMS[0]
    rest = {k: v for k, v in one.items() if k not in (role, content) and v is not None}
    return {"role": ROLES[one[role]], "content": one.get(content) or "", **rest}


def _listed(value: object) -> Sequence[object] | None:
    return cast("Sequence[object]", value) if isinstance(value, list | tuple) else None
