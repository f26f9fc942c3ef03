"""``fedft join KIT --data FILE --check``: what would be trained here, shown here."""

from fedft.clients.policy import Policy
from fedft.core.data.partition import split_holdout, undivided
from fedft.core.data.source import Data
from fedft.core.errors import Interrupted
from fedft.core.link.codes import coded
from fedft.core.spec import TaskSpec


class Looked(Interrupted):
    """The task was looked at, and nothing was offered."""

    exit_code = 0


def looked() -> Looked:
    """Ends a session with the word that says so."""
    error = Looked("this was a check: nothing was joined, and nothing of the data has left")
    coded(error, "looked")
    return error


def report(run: str, task: TaskSpec, data: Data, policy: Policy) -> list[str]:
    """What would be trained, a line each.

    Args:
        run: its name.
        task: as this client would do it.
        data: read by it.
        policy: of this client.
    """
    name = task.site or ""
    own = undivided(len(data.train), name).rows_of(0)
    rows, held = split_holdout(own, task.data.holdout, task.seed, name)
    lines = [
        f"run {run}: {task.model.task} with {task.model.source}, adapters of rank {task.lora.rank}",
        f"{task.data.source}: {len(rows):,} rows to train on, {len(held):,} held out to judge by",
        f"{data.cut['train']:,} rows are longer than {task.data.max_length} tokens and are cut",
    ]
    if data.skipped:
        left_out = ", ".join(f"{reason} {n:,}" for reason, n in sorted(data.skipped.items()))
        lines.append(f"left out: {left_out}")
    counted = zip(data.classes, data.per_class, strict=True)
    lines += [f"  {name}: {n:,}" for name, n in counted]
    lines += [*data.notes, "the policy here:", *(f"  {line}" for line in policy.lines())]
    return lines
