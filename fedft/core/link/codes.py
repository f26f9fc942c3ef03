"""What a client says about what it does not do: one word of a closed list, and no more.

An error of a client can quote its data, name its files or its columns. Its text stays on its own
screen; the server gets the word, and knows the sentence to it. Only the client's operator can add
the text (``fedft join --send-details``).
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from fedft.core.drawn import Overtime
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    FedftError,
    Interrupted,
    MismatchError,
    SecurityRefusal,
)

SENTENCES: Mapping[str, str] = {
    "stopped": "it was stopped by its owner",
    "done": "it left as the server asked",
    "looked": "it only looked at the task",
    "task": "its policy, or its version of fedft, does not take this task",
    "changed": "the task is not the one that it was asked to join",
    "clients": "its policy wants more clients in a round than this run needs",
    "model": "it does not have this model, or its policy does not allow it",
    "code": "the model would run code of its own there",
    "data": "its data do not fit the task",
    "plan": "the plan cannot be read, or is none of this run",
    "privacy": "its policy wants more privacy than the plan gives",
    "limits": "the plan asks for more work than its policy allows",
    "metrics": "its policy keeps losses and scores there",
    "time": "the work took longer than its policy allows",
    "ledger": "its privacy ledger cannot be written",
    "environment": "its machine failed",
    "failed": "it failed",
    "trainer": "its policy does not name the trainer of this run",
    "training": "the trainer of this run failed there",
}
"""Word → what a server's operator is told."""

NUMBERS: Mapping[str, int] = {word: 120 + i for i, word in enumerate(SENTENCES)}
"""Word → code of a failure on the wire."""

OTHER = "failed"
LONGEST = 500
"""Characters of a reason on the wire."""

_CODE = "code"
_BY_TYPE: tuple[tuple[type[FedftError], str], ...] = (
    (Overtime, "time"),
    (Interrupted, "stopped"),
    (EnvironmentFailure, "environment"),
    (SecurityRefusal, "task"),
    (MismatchError, "data"),
    (ConfigError, "data"),
)


def coded(error: FedftError, word: str) -> FedftError:
    """The error, which the server will know by this word; one that has a word already keeps it."""
    assert word in SENTENCES, word
    vars(error).setdefault(_CODE, word)
    return error


@contextmanager
def under(word: str) -> Generator[None]:
    """Errors inside are known to the server by this word."""
    try:
        yield
    except FedftError as error:
        coded(error, word)
        raise


def word_of(error: BaseException) -> str:
    """What a server is told of an error."""
    if isinstance(error, FedftError):
        own = vars(error).get(_CODE)
        if own in SENTENCES:
            return str(own)
        return next((word for kind, word in _BY_TYPE if isinstance(error, kind)), OTHER)
    return "environment" if isinstance(error, MemoryError | OSError) else OTHER


def reason(word: str, details: str = "", *, send_details: bool = False) -> str:
    """What goes on the wire.

    Args:
        word: of the list; any other text becomes ``failed``.
        details: for the client's screen.
        send_details: whether its operator lets them leave.
    """
    word = word if word in SENTENCES else OTHER
    return f"{word}: {details}"[:LONGEST] if send_details and details else word


def told(said: str) -> str:
    """A reason as a server's operator reads it; what is none of the list is told as it came."""
    word, _, details = said[:LONGEST].partition(": ")
    if word not in SENTENCES:
        return said[:LONGEST]
    return f"{SENTENCES[word]} ({word})" + (f": {details}" if details else "")
