"""The first tracker: the lines and the summary of the run directory.

It is told before anybody else, and before a round's checkpoint is committed, because a committed round
must never lack its lines. What it cannot write ends the run, which can then go on later.
"""

from collections.abc import Sequence

from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.core.record.rundir import RunDir
from fedft.trackers.base import Start, Tracker


class RunDirectory(Tracker):
    """Writes ``rounds.jsonl``, ``clients.jsonl`` and ``summary.json``.

    Args:
        run: the directory, locked for writing.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def started(self, start: Start) -> None:
        """Drops the lines of rounds that were written and never committed.

        Raises:
            IntegrityError: a line of a committed round is damaged.
        """
        self._run.truncate_to(start.round)

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """Makes a round's lines durable; to be called before its checkpoint is committed.

        Raises:
            EnvironmentFailure: the disk refused; no half line stays.
        """
        if self._run.finished:
            raise RuntimeError(f"{self._run.path} is finished, and takes no further round")
        for reply in replies:
            self._run.append_client(reply)
        self._run.append_round(line)

    def finished(self, summary: Summary) -> None:
        """Writes the summary, the last act of a run.

        Raises:
            EnvironmentFailure: the disk refused.
        """
        self._run.write_summary(summary)
