"""What the commit of a round remembers beside the state."""

import hashlib
from dataclasses import dataclass

from fedft.core.digest import state_digest
from fedft.core.tasks import Task
from fedft.server.federation import Completed


@dataclass(frozen=True)
class Progress:
    """What the commit of a round remembers beside the state.

    Attributes:
        best: line of the best evaluation so far, with its ``round``; None before the first.
        final: the newest evaluation.
        stale: evaluations since the best one.
        up, down: bytes so far.
        seconds: spent in rounds so far.
        history: digest over the states of all rounds so far; proves that two runs went the same way.
    """

    best: dict[str, float] | None = None
    final: dict[str, float] | None = None
    stale: int = 0
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    history: str = ""

    def after(self, completed: Completed, task: Task) -> "Progress":
        """With one more round of a task, which says what is better."""
        record = completed.record
        scores = record.get("eval")
        improved = scores is not None and task.better(scores, self.best)
        return Progress(
            best={"round": record["round"], **scores} if scores and improved else self.best,
            final=scores or self.final,
            stale=0 if improved else self.stale + (scores is not None),
            up=self.up + record["bytes"]["up"],
            down=self.down + record["bytes"]["down"],
            seconds=self.seconds + sum(record["seconds"].values()),
            history=_chained(self.history, state_digest(completed.state)),
        )


def _chained(history: str, digest: str) -> str:
    return hashlib.sha256(f"{history}{digest}".encode()).hexdigest()
