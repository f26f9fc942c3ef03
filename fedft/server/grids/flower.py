"""The pieces of Flower that are not its public API, all in this file.

A Grid of our own needs four of them. ``tests/server/test_flower_contract.py`` fails with the name
of the piece when an update of Flower moves one.

* A ``Message`` takes run and sender from ``TaskIdentity``, a process-wide record that Flower's own
  launchers fill in. Here nobody did, so the grid does.
* ``Grid.run`` is a ``Run``, a record with twenty fields that only a SuperLink knows.
* Message ids are given by the grid, into a field without a setter.
* A message is taken apart and put together again around the object store.
"""

from typing import cast

from flwr.app import Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "APP_CRASHED",
    "APP_RAISED",
    "NODE_UNAVAILABLE",
    "SERVER_NODE_ID",
    "Run",
    "adopt_identity",
    "assemble",
    "empty_run",
    "stamp",
]

SERVER_NODE_ID = 0
"""The sender of every instruction. Simulated nodes count from 1, so that none has this id."""

APP_RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
APP_CRASHED: int = ErrorCode.CLIENT_APP_CRASHED
NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE

_FIRST_RUN_ID = 1


def adopt_identity(node_id: int = SERVER_NODE_ID, run_id: int = _FIRST_RUN_ID) -> int:
    """Gives this process an identity, so that messages can be made in it.

    An identity that is already there stays: the process may be a ServerApp that Flower started.

    Returns:
        The run id that messages of this process carry.
    """
    try:
        return TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = node_id
        TaskIdentity.task_id = 1
        return run_id


def empty_run(run_id: int) -> Run:
    """The description of a run that no SuperLink knows of."""
    return Run.create_empty(run_id)


def stamp(message: Message, message_id: str) -> None:
    """Gives a message its id, as a SuperLink would on arrival."""
    message.metadata.__dict__["_message_id"] = message_id


def assemble(metadata: Metadata, content: RecordDict) -> Message:
    """A message with the metadata of another one."""
    # Flower declares this way of making a message for internal use and leaves it out of the types.
    return cast(Message, Message(content, metadata=metadata))  # pyright: ignore[reportCallIssue]
