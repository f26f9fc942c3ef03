"""The task as a server gives it: read with nothing imported for it, or refused in a sentence."""

import json

from fedft.core.errors import ConfigError, FedftError, MismatchError, SecurityRefusal
from fedft.core.link.codes import coded
from fedft.core.plugins import REMOTE
from fedft.core.spec import TaskSpec
from fedft.core.trainers import REGISTRY as TRAINERS
from fedft.core.wire.compress import compressor_of


def task_of(task: str) -> TaskSpec:
    """A task as it came from a server.

    Raises:
        MismatchError: it cannot be read.
    """
    try:
        given = TaskSpec.model_validate_json(task, context=REMOTE)
    except SecurityRefusal as error:
        if (trainer := _trainer_in(task)) is not None:
            raise coded(
                SecurityRefusal(
                    f"the run trains by {trainer!r}, which the policy of this client does not name; nothing "
                    "that a server names is imported",
                    fix="If the code is on this machine and you trust it, allow it: fedft join --trainer "
                    "MODULE:FUNCTION, or trainers = [NAME] in the policy.",
                ),
                "trainer",
            ) from error
        raise coded(
            MismatchError(
                f"the server's task is not known to this client: {error.what[:300]}",
                fix="Nothing that a server names is imported. If you trust the code, allow it here: "
                "fedft join --task NAME, or tasks = [NAME] in the policy.",
            ),
            "task",
        ) from error
    # What a server says is not read further than this; a validator can meet any of these in it.
    except (ValueError, TypeError, ArithmeticError, RecursionError, FedftError) as error:
        raise coded(
            MismatchError(
                "the server's task cannot be read by this version of fedft",
                fix="Install the same version on both sides.",
            ),
            "task",
        ) from error
    try:
        compressor_of(given.wire, REMOTE)
    except (ConfigError, SecurityRefusal) as error:
        raise coded(
            MismatchError(
                f"the server asks for replies in a way that this client does not know: {error.what}",
                fix="Install the same version of fedft on both sides.",
            ),
            "task",
        ) from error
    return given


def _trainer_in(task: str) -> str | None:
    """The trainer that a task names and that is not known here; None where something else is not."""
    try:
        name = json.loads(task).get("trainer")
    except (ValueError, AttributeError, RecursionError):
        return None
    try:
        if isinstance(name, str):
            TRAINERS.find(name, REMOTE)
        return None
    except (SecurityRefusal, ConfigError):
        return str(name)[:200]
