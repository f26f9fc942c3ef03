"""``audit.jsonl`` of a run: who was let in or turned away, when and why; bounded, whoever writes.

What a line says comes in part from clients. So each text is cut, a client can have a few lines of a
kind a minute and no more, and the file is rotated by its size. What is told less often than it
happened is counted in the next line, as ``left_out``.
"""

import contextlib
import json
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from fedft.core.errors import EnvironmentFailure
from fedft.core.files import disk

logger = logging.getLogger(__name__)

FILE_BYTES = 4 * 1024 * 1024
"""At which a file is full. A crowd of strangers at the door fills it in a day."""

FILES = 4
"""``audit.jsonl``, and ``audit-1.jsonl`` to ``audit-3.jsonl``, which is the oldest."""

REPEAT_S = 10.0
"""Within which a line that says the same again is left out."""

WINDOW_S, LINES = 60.0, 30
"""Seconds, and how many lines of one kind about one client are written in that time."""

REMEMBERED = 1000
"""Kinds of lines, and last lines, of which it is known when they were written."""

_WHO, _WHY, _FACT = 200, 500, 500


@dataclass(eq=False)
class _Window:
    """Lines of one kind about one client: when the first came, how many, and how many did not."""

    begun: float
    lines: int = 0
    left_out: int = 0


@dataclass
class Audit:
    """The record. Safe for several processes and threads.

    Args:
        run_dir: of the run.
    """

    run_dir: Path
    _recent: OrderedDict[tuple[str, str, str], float] = field(
        default_factory=OrderedDict[tuple[str, str, str], float], init=False
    )
    _windows: OrderedDict[tuple[str, str], _Window] = field(
        default_factory=OrderedDict[tuple[str, str], _Window], init=False
    )
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def path(self) -> Path:
        """The file that grows."""
        return self.run_dir / "audit.jsonl"

    def __call__(self, event: str, who: str, why: str = "", **facts: str | int | float) -> None:
        """Add a line, unless there were too many like it just now.

        Raises:
            EnvironmentFailure: the disk refused.
        """
        who, why = who[:_WHO], why[:_WHY]
        with self._turn:
            left_out = self._wanted(event, who, why)
            if left_out is None:
                return
            counted = {"left_out": left_out} if left_out else {}
            cut = {k: v[:_FACT] if isinstance(v, str) else v for k, v in facts.items()}
            when = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"when": when, "event": event, "who": who, "why": why, **cut, **counted}
            self._write(json.dumps(line).encode() + b"\n")

    def quietly(self, event: str, who: str, why: str = "", **facts: str | int | float) -> None:
        """Add a line; where the disk refuses, go on without: it is no client's fault."""
        try:
            self(event, who, why, **facts)
        except EnvironmentFailure as error:
            logger.warning("%s", error.what)

    def _wanted(self, event: str, who: str, why: str) -> int | None:
        """Whether a line is to be written, and how many before it were not; None if it is not."""
        now = time.monotonic()
        window = self._windows.get((event, who)) or _Window(now)
        if now - window.begun >= WINDOW_S:
            window = _Window(now, left_out=window.left_out)
        _keep(self._windows, (event, who), window)
        before = self._recent.get((event, who, why))
        if (before is not None and now - before < REPEAT_S) or window.lines >= LINES:
            window.left_out += 1
            return None
        _keep(self._recent, (event, who, why), now)
        left_out, window.left_out = window.left_out, 0
        window.lines += 1
        return left_out

    def _write(self, line: bytes) -> None:
        with disk(f"write {self.path}"):
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_size + len(line) > FILE_BYTES:
                    self._rotate()
            with self.path.open("ab", buffering=0) as file:
                file.write(line)

    def _rotate(self) -> None:
        """Rename each file to the next number. `fedft invite` and a server may come to it at once:
        what is gone already was renamed by the other.
        """
        for number in range(FILES - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._numbered(number - 1).replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self.run_dir / f"audit-{number}.jsonl" if number else self.path


Key = TypeVar("Key")
Value = TypeVar("Value")


def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Remember the newest; the oldest is forgotten."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > REMEMBERED:
        kept.popitem(last=False)
