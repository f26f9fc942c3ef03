"""Whose fault it is when a rule raises: of one from outside a sentence says it, with its own line."""

import inspect
import traceback
from collections.abc import Generator
from contextlib import contextmanager

from fedft.core.errors import ConfigError, FedftError
from fedft.core.plugins import reference_of
from fedft.strategies.base import Strategy


@contextmanager
def blamed(rule: Strategy, doing: str) -> Generator[None]:
    """An exception of a rule from outside becomes a sentence that names the rule and its line.

    One of fedft's own rules is a bug of ours, and keeps its traceback.

    Args:
        rule: that runs inside.
        doing: what, e.g. ``aggregating round 3``.

    Raises:
        ConfigError: the rule is not fedft's own, and raised anything but an error of fedft.
    """
    try:
        yield
    except FedftError:
        raise
    except Exception as error:
        if _own(rule):
            raise
        raise ConfigError(
            f"the rule {reference_of(type(rule))} failed while {doing}: "
            f"{type(error).__name__}: {error}{_line_of(error, type(rule))}",
            fix="Mend it; `fedft check-plugin` holds it to the laws of rules, and `fedft --debug` shows "
            "the traceback.",
        ) from error


def _own(rule: Strategy) -> bool:
    return type(rule).__module__.startswith("fedft.")


def _line_of(error: BaseException, kind: type) -> str:
    """Where in the rule's own file an exception came through, as `` (file:line)``."""
    try:
        own = inspect.getsourcefile(kind)
    except (OSError, TypeError):  # typed at a prompt
        return ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({own}:{lines[-1]})" if lines else ""
