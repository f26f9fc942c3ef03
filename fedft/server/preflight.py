"""What is found out before the first round, in one attempt: can this model be trained on these data?

One worker is asked, by the same way that plans go. It loads the base, which stays there, tries the
longest rows, and compares the two engines where several clients share a pass.
"""

from collections.abc import Callable

from flwr.app import Message, MessageType

from fedft.core import trial
from fedft.core.errors import EnvironmentFailure
from fedft.core.trial import Verdict
from fedft.server.messages import Courier, replies


def preflight(
    grid: Courier, task: str, batch_size: int, stop: Callable[[], bool] = lambda: False
) -> Verdict:
    """Which engine trains this task.

    Args:
        grid: whose first node is asked.
        task: JSON of the task.
        batch_size: rows of a step of training.
        stop: is asked several times a second whether to stop.

    Raises:
        MismatchError: the model cannot be trained on these data, or not be loaded.
        EnvironmentFailure: the worker died over it.
        Interrupted: ``stop`` said so.
    """
    message = Message(trial.question(task, batch_size), 1, MessageType.QUERY, group_id="0")
    ids = grid.push_jobs([[message]])
    said = "it gave no answer"
    for reply in replies(grid, ids, None, stop):
        if not reply.has_error():
            return trial.verdict(reply.content)
        said = reply.error.reason
    raise EnvironmentFailure(
        f"a worker could not load and try the model: {said}",
        fix="Look for too little memory first; [engine] workers = 1 needs least.",
    )
