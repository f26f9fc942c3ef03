"""Who watches a run."""

from collections.abc import Mapping
from typing import Any, Protocol

from fedft.core.record.rundir import RunDir
from fedft.core.types import ServerState
from fedft.server.config import RunConfig


class Observer(Protocol):
    """What watches a run: a progress bar, plain lines, nothing."""

    def started(self, run: RunDir, config: RunConfig, state: ServerState) -> None:
        """The workers are up, and rounds begin."""
        ...

    def completed(self, record: Mapping[str, Any]) -> None:
        """A round is committed; ``record`` is its line in ``rounds.jsonl``."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """Watches nothing."""

    def started(self, run: RunDir, config: RunConfig, state: ServerState) -> None:
        """See :class:`Observer`."""

    def completed(self, record: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""

    def note(self, text: str) -> None:
        """See :class:`Observer`."""
