"""A client app that does what it is told, and what tests of worker processes ask of it."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedft.server.grids import ray_cleanup
from fedft.server.grids.base import JobGrid

# Does what the message says, and reports where it ran.
TOY = """
    import os, signal, sys, time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict

    LOADED = time.time()

    def app(message, context):
        do = message.content.config_records["do"] if "do" in message.content else {}
        Path(do["log"]).open("a").write(f"{os.getpid()}\\n") if "log" in do else None
        if do.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if do.get("die-once") and not Path(do["die-once"]).exists():
            Path(do["die-once"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        arrays = message.content["arrays"] if "arrays" in message.content else {}
        total = sum(a.numpy().sum() for a in arrays.values())
        if do.get("spoil"):
            message.content["arrays"].clear()
        if do.get("raise"):
            raise ArithmeticError("as told")
        time.sleep(do.get("sleep", 0.0))
        calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
        if do.get("remember"):
            context.state["calls"] = ConfigRecord({"n": calls})
        about = ConfigRecord({
            "pid": os.getpid(), "loaded": LOADED, "calls": calls, "threads": os.environ["OMP_NUM_THREADS"],
            "offline": os.environ.get("HF_HUB_OFFLINE", ""), "nice": os.nice(0),
            "sum": float(total),
        })
        return Message(RecordDict({"about": about}), reply_to=message)
"""


@contextmanager
def importable(folder: Path) -> Iterator[str]:
    """The toy app, to be found in a folder for as long as this lasts; its reference."""
    (folder / "toy_app.py").write_text(textwrap.dedent(TOY))
    sys.path.insert(0, str(folder))
    yield "toy_app:app"
    sys.path.remove(str(folder))


@contextmanager
def driving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of its own that finds the toy app; killed at the end."""
    paths = os.pathsep.join([str(Path.cwd()), *(p for p in sys.path if "toy" in p)])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def request(node: int, arrays: ArrayRecord | None = None, round_: int = 1, **do: Any) -> Message:
    content = RecordDict({"do": ConfigRecord(do)})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, node, "train", group_id=str(round_))


def about(reply: Message) -> dict[str, Any]:
    return dict(reply.content.config_records["about"])


def receive(grid: JobGrid, ids: list[str], timeout: float = 30.0) -> list[Message]:
    replies: list[Message] = []
    deadline = time.monotonic() + timeout
    while len(replies) < len(ids) and grid.wait(ids, deadline - time.monotonic()):
        replies += grid.pull_messages(ids)
    return replies


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all of these processes end within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(ray_cleanup.birth(pid) is None for pid in pids):
            return True
        time.sleep(0.1)
    return False
