"""A prompt and two answers, as data sets have them: texts, messages, or two whole conversations.

    prompt, chosen, rejected     texts: the prompt is the user's turn, an answer the assistant's
    prompt, chosen, rejected     messages: the prompt's, and those that an answer adds
    chosen, rejected             texts or messages that begin alike: what they share is the prompt

These are the forms that TRL takes. An answer is one message of the assistant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from fedft.core.names import kind_of
from fedft.core.tasks.columns import text_fault
from fedft.core.text.asked import ROLES, Asked


@dataclass(frozen=True)
class Pair:
    """What was preferred to what.

    Attributes:
        prompt: that both answer.
        chosen, rejected: the answers.
    """

    prompt: Asked
    chosen: str
    rejected: str


class Unfit(ValueError):
    """These values are no pair of answers to one prompt.

    Args:
        key: of the column that is at fault.
        reason: what is wrong with it, without the text of the example.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key, self.reason = key, reason


def value_fault(value: object, _: object = None) -> str | None:
    """What is wrong with the value of a column, whatever the others are."""
    if not isinstance(value, list | tuple):
        return text_fault(value)
    messages = cast("Sequence[object]", value)
    if not messages:
        return "no message at all"
    told = ((at, _message_fault(message)) for at, message in enumerate(messages, 1))
    return next((f"message {at}: {fault}" for at, fault in told if fault), None)


def _message_fault(message: object) -> str | None:
    if not isinstance(message, dict):
        return f"a table with role and content is expected, got {kind_of(message)}"
    own = cast("dict[str, object]", message)
    role = own.get("role")
    if role not in ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else "no name"
        return f"its role is {shown}; roles are {', '.join(ROLES)}"
    fault = text_fault(own.get("content"))
    return None if fault is None else f"its content is {fault}"


def pair_of(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    """The pair that checked values come to.

    Args:
        prompt: text or messages; None where both answers have it in them.
        chosen: text or messages.
        rejected: likewise.

    Raises:
        Unfit: they come to none.
    """
    spoken = isinstance(chosen, list | tuple)
    if spoken != isinstance(rejected, list | tuple):
        raise Unfit("rejected", "chosen and rejected are not both texts, or both messages")
    found = _spoken(prompt, chosen, rejected) if spoken else _written(prompt, chosen, rejected)
    if found.chosen == found.rejected:
        raise Unfit("rejected", "chosen and rejected are the same: neither is preferred")
    return found


# ----------------------------------------------------------------------------------- texts


def _written(prompt: Any, chosen: str, rejected: str) -> Pair:
    if isinstance(prompt, str):
        return Pair(Asked((prompt,), ("user",)), chosen, rejected)
    if prompt is not None:
        raise Unfit("prompt", "messages, where chosen and rejected are texts")
    if chosen == rejected:
        raise Unfit("rejected", "chosen and rejected are the same: neither is preferred")
    at = _parting(chosen, rejected)
    if not chosen[:at].strip():
        raise Unfit("rejected", "there is no prompt, and chosen and rejected do not begin alike")
    if not (chosen[at:].strip() and rejected[at:].strip()):
        raise Unfit("rejected", "one of the answers is empty after what both begin with")
    return Pair(Asked((chosen[:at],)), chosen[at:], rejected[at:])


def _parting(a: str, b: str) -> int:
    """Where two texts part: at the start of the word in which they do, its space included.

    Tokens of a word are its own, and those of most tokenizers have the space before it: a prompt
    that ended within a word would be made of tokens that the whole text does not have.
    """
    least = min(len(a), len(b))
    at = next((i for i in range(least) if a[i] != b[i]), least)
    at = min(at, least - 1)  # a text that the other one goes on with has its last word to itself
    while at and not a[at - 1].isspace():
        at -= 1
    return at - 1 if at and a[at - 1] == " " else at


# -------------------------------------------------------------------------------- messages

Turn = tuple[str, str]
"""(role, text)"""


def _turns(messages: Any) -> list[Turn]:
    return [(message["role"], message["content"]) for message in messages]


def _spoken(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    mine, theirs = _turns(chosen), _turns(rejected)
    if mine == theirs:
        raise Unfit("rejected", "chosen and rejected are the same: neither is preferred")
    asked: list[Turn] = []
    if isinstance(prompt, list | tuple):
        asked = _turns(prompt)
    elif prompt is None or mine[0][0] != "assistant":
        # With the whole conversation in both answers, a prompt beside them says it once more.
        asked, mine, theirs = _shared(mine, theirs)
        if prompt is not None and ("user", prompt) not in asked:
            raise Unfit("prompt", "not what chosen and rejected begin with")
    else:
        asked = [("user", prompt)]
    for key, turns in (("chosen", mine), ("rejected", theirs)):
        if [role for role, _ in turns] != ["assistant"]:
            raise Unfit(key, "one message of the assistant is expected after the prompt")
    if asked[-1][0] == "assistant":
        raise Unfit("prompt" if prompt is not None else "chosen", "the prompt ends in an answer")
    roles, texts = zip(*asked, strict=True)
    return Pair(Asked(texts, roles), mine[0][1], theirs[0][1])


def _shared(a: list[Turn], b: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """What two conversations begin with, and the rest of each."""
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    count = min(len(a), len(b)) if count is None else count
    if not count:
        raise Unfit("rejected", "there is no prompt, and chosen and rejected do not begin alike")
    return a[:count], a[count:], b[count:]
