"""TensorBoard: the curves of a run as it goes on. ``tensorboard --logdir runs`` shows them.

Event files cannot be taken back, and a process that is killed leaves any number of rounds unwritten.
A run that goes on therefore writes its events anew: they are derived from the committed rounds, as the
report is. The numbers are those of ``rounds.jsonl``, in double precision.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedft.core.extras import need
from fedft.core.files import disk
from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.trackers.base import Start, Tracker, numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
"""In the folder of a run's trackers."""


class TensorBoard(Tracker):
    """Writes event files.

    Raises:
        EnvironmentFailure: the package ``tensorboard`` is not installed.
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        need("trackers", "[track] trackers names tensorboard")

    def started(self, start: Start) -> None:
        """Writes the committed rounds."""
        from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

        folder = start.folder / FOLDER
        with disk(f"write {folder}"):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        self._writer = SummaryWriter(str(folder))
        self._text("config", start.config, 0)
        for line in start.committed:
            self._add(line)
        self._writer.flush()

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """Writes a round; it is in the file when this returns."""
        writer = self._open()
        self._add(line)
        writer.flush()

    def finished(self, summary: Summary) -> None:
        """Writes the summary as text, and closes the file."""
        self._text("summary", summary, summary["rounds"])
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            raise RuntimeError("the event file is closed, or not open yet")
        return self._writer

    def _add(self, line: RoundLine) -> None:
        writer = self._open()
        for tag, value in numbers(line).items():
            writer.add_scalar(tag, value, line["round"], new_style=True, double_precision=True)

    def _text(self, tag: str, table: Mapping[str, object], step: int) -> None:
        # Four spaces before a line are a code block of Markdown, which TensorBoard shows as it is.
        lines = json.dumps(table, indent=2, default=str).splitlines()
        self._open().add_text(tag, "\n".join(f"    {line}" for line in lines), step)
