"""The question that comes before the first round, "can this be trained here?", and its answer."""

from dataclasses import dataclass
from typing import Literal, cast

from flwr.app import ConfigRecord, RecordDict

from fedft.core.errors import EnvironmentFailure, FedftError, MismatchError, SecurityRefusal

Engine = Literal["cohort", "loop"]

_KINDS = {kind.__name__: kind for kind in (MismatchError, EnvironmentFailure, SecurityRefusal)}


@dataclass(frozen=True)
class Verdict:
    """Which engine trains.

    Attributes:
        engine: ``cohort``, or ``loop`` for the plain PEFT loop.
        why: why it is not the engine that was asked for, in one sentence; empty where it is.
    """

    engine: Engine
    why: str = ""


def question(task: str, batch_size: int) -> RecordDict:
    """A message that asks for a trial.

    Args:
        task: JSON of a :class:`~fedft.core.spec.TaskSpec`.
        batch_size: rows of a step of training.
    """
    return RecordDict({"config": ConfigRecord({"task": task, "batch-size": batch_size})})


def asked(content: RecordDict) -> tuple[str, int] | None:
    """The task and the batch size of a message; None where it asks for no trial."""
    config = content.config_records.get("config")
    if config is None or "task" not in config:
        return None
    return cast(str, config["task"]), cast(int, config["batch-size"])


def answer(found: Verdict | FedftError) -> RecordDict:
    """The reply: a verdict, or the error that the trial ended in."""
    if isinstance(found, Verdict):
        return RecordDict({"config": ConfigRecord({"engine": found.engine, "why": found.why})})
    kind = type(found).__name__ if type(found).__name__ in _KINDS else MismatchError.__name__
    return RecordDict(
        {"config": ConfigRecord({"error": kind, "what": found.what, "fix": found.fix})}
    )


def verdict(content: RecordDict) -> Verdict:
    """Read a reply.

    Raises:
        FedftError: the trial ended in it.
    """
    config = content.config_records["config"]
    if "error" in config:
        kind = _KINDS.get(str(config["error"]), MismatchError)
        raise kind(str(config["what"]), fix=str(config["fix"]))
    return Verdict(cast(Engine, config["engine"]), str(config["why"]))
