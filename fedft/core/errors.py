"""Every error that fedft raises on purpose, as one tree.

    FedftError                      exit code
    ├── ConfigError                 2    a key, value or command line that cannot be run
    ├── EnvironmentFailure          3    disk, Ray, device or a missing dependency; resumable
    ├── QuorumFailure               4    too few usable replies; resumable
    ├── MismatchError               5    model or data are not what the run needs
    ├── IntegrityError              6    stored state is damaged
    ├── SecurityRefusal             7    refused because it would be unsafe
    ├── Interrupted                 130  stopped by a signal; resumable
    └── UpdateRejected              —    one client's reply is unusable; the run goes on

An error says what is wrong, where, why, and what to do about it. The command line prints it
without a traceback and exits with the code of its class.
"""

from typing import ClassVar


class FedftError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: the value and the rule it breaks, in one sentence.
        fix: what the user can do about it, as an imperative sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  → {self.fix}" if self.fix else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (Ray); the default drops keyword arguments.
        return (_rebuild, (type(self), self.what, self.fix, self.__dict__))


def _rebuild(cls: type[FedftError], what: str, fix: str, fields: dict[str, object]) -> FedftError:
    error = cls.__new__(cls)
    FedftError.__init__(error, what, fix=fix)
    error.__dict__.update(fields)
    return error


class ConfigError(FedftError):
    """A configuration key, value or command line that cannot be run."""

    exit_code = 2


class EnvironmentFailure(FedftError):
    """The machine failed the run: disk, Ray, device or a missing dependency."""

    exit_code = 3


class QuorumFailure(FedftError):
    """Too few usable replies, also after retrying with a fresh cohort."""

    exit_code = 4


class MismatchError(FedftError):
    """The model or the data are not what the run needs."""

    exit_code = 5


class IntegrityError(FedftError):
    """Stored state is damaged and nothing intact is left to fall back to."""

    exit_code = 6


class SecurityRefusal(FedftError):
    """The request was refused because carrying it out would be unsafe."""

    exit_code = 7


class Interrupted(FedftError):
    """The run was stopped by a signal after its last commit."""

    exit_code = 130


class UpdateRejected(FedftError):
    """One client's reply cannot be used. The round goes on without it.

    Args:
        reason: one word, counted in ``rounds.jsonl`` (for example ``"nan"``, ``"shape"``).
        what: the sentence for the log.
    """

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
