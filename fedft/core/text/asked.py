"""Prompts of one turn or of several, and answers to them, as token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedft.core.errors import FedftError
from fedft.core.examples import Encoded, TokenExamples
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder

ROLES = ("system", "user", "assistant")
"""Who speaks in a conversation."""

_NOBODY: tuple[list[int], list[int]] = ([], [])


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        texts: of its turns, in order; without ``roles`` one text that the answer goes on with.
        roles: who says each; empty where the text is as it is, no turn of anybody.
    """

    texts: tuple[str, ...]
    roles: tuple[str, ...] = ()


def answering(
    asked: Sequence[Asked], answers: Sequence[str], encoder: TextEncoder, max_length: int
) -> Encoded[TokenExamples]:
    """Prompts with answers; the loss is on the answer and on the token that ends its turn.

    What one user asks is encoded as :func:`fedft.core.text.tokens.answered` does it, with or without a
    chat template; longer conversations need one.

    Raises:
        MismatchError: the chat template is not usable for training.
    """
    found: list[tuple[list[int], list[int]]] = []
    faults: dict[int, str] = {}
    for first in range(0, len(asked), tokens.CHUNK):
        part = slice(first, first + tokens.CHUNK)
        for row, ids in enumerate(_rows(asked[part], answers[part], encoder), first):
            if isinstance(ids, str):
                faults[row] = ids
            found.append(_NOBODY if isinstance(ids, str) else ids)
    encoded = tokens.laid(found, encoder, max_length)
    if not faults:
        return encoded
    return Encoded(encoded.examples, encoded.cut, {**encoded.faults, **faults})


def _rows(
    asked: Sequence[Asked], answers: Sequence[str], encoder: TextEncoder
) -> list[tuple[list[int], list[int]] | str]:
    """Token ids of each prompt and of its answer; or why there are none."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for row, prompt in enumerate(asked):
        alike.setdefault(prompt.roles, []).append(row)
    found: list[tuple[list[int], list[int]] | str] = [_NOBODY] * len(asked)
    for roles, rows in alike.items():
        texts = [asked[row].texts for row in rows]
        try:
            own = list(_of_roles(encoder, roles, texts, [answers[row] for row in rows]))
        except FedftError:
            raise
        except Exception as error:  # templates raise of roles that they do not know
            said = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            own = [f"the chat template refuses turns of {', '.join(roles)} ({said})"] * len(rows)
        for row, ids in zip(rows, own, strict=True):
            found[row] = ids
    return found


def _of_roles(
    encoder: TextEncoder,
    roles: tuple[str, ...],
    texts: Sequence[tuple[str, ...]],
    answers: Sequence[str],
) -> "Iterator[tuple[list[int], list[int]]] | list[str]":
    if not roles:
        return tokens.continued(encoder, [text for (text,) in texts], answers)
    if roles == ("user",):
        return tokens.turns(encoder, [text for (text,) in texts], answers)
    tokenizer: Any = encoder.tokenizer
    if tokenizer.chat_template is None:
        return ["a conversation needs a chat template, and this tokenizer has none"] * len(texts)
    return tokens.spoken(encoder, roles, texts, answers)
