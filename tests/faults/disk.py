"""A run whose disk strikes at every system call in turn; started by ``test_disk.py`` under ``disk.c``.

    python -m tests.faults.disk WORK CONFIG ERRNO [careless]

The run has committed two of its three rounds and goes on with the third. For n = 1, 2, … a copy of
it is struck at its n-th system call that changes the run directory, in a process of its own, and
then goes on undisturbed. One JSON object is printed: the calls that were tried, how many of them
ended the process, and the ways in which the runs went wrong, of which there must be none.
"""

import ctypes
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

from fedft.api import Run
from fedft.core.errors import FedftError, Interrupted
from fedft.server.checkpoints import Checkpoints
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from tests.forks import only_thread

COMMITTED = 2
SHOWN = 5
"""Faults after which it is clear enough."""
trap = ctypes.CDLL(None)
trap.disk_calls.restype = ctypes.c_long


def removes_first() -> None:
    """The guard switched off: old checkpoints go before the new one is there."""
    commit = Checkpoints.commit

    def careless(self: Checkpoints, *values: object) -> None:
        for manifest in self._folder.glob("round-*.json"):
            manifest.unlink()
        commit(self, *values)  # type: ignore[arg-type]

    Checkpoints.commit = careless  # type: ignore[method-assign]


def halted(table: dict[str, object], folder: Path) -> None:
    """A run that was stopped after its second round."""

    def stop() -> bool:
        return len(list((folder / "checkpoints").glob(f"round-*{COMMITTED}.json"))) > 0

    try:
        simulate(parse_config(table), folder, stop=stop)
    except Interrupted:
        assert len(Run(folder).rounds) == COMMITTED
    else:
        raise AssertionError("the run was not stopped")


def strike(folder: Path, at: int, error: int) -> int:
    """Go on with a run that is struck at one call; how its process ended."""
    only_thread()  # this process is fresh, and keeps to one thread
    child = os.fork()
    if not child:
        code = 99
        try:
            trap.disk_arm(str(folder).encode(), ctypes.c_long(at), error)
            resume(folder)
            code = 100 if trap.disk_calls() < at else 0
        except FedftError as failure:
            told = str(folder) in failure.what and os.strerror(error) in failure.what
            code = failure.exit_code if told else 98
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def wrong(folder: Path, expected: Run) -> str | None:
    """What is wrong with a run once it has gone on undisturbed."""
    try:
        run = Run(resume(folder).path)
    except FedftError as failure:
        return failure.what
    if litter := [path.name for path in folder.rglob("*.tmp")]:
        return f"left behind: {litter}"
    for key in ("adapter_sha256", "history_sha256", "final", "best"):
        if run.metrics[key] != expected.metrics[key]:
            return f"{key} differs"
    for file in expected.directory.glob("adapters/*/*"):
        if (folder / file.relative_to(expected.directory)).read_bytes() != file.read_bytes():
            return f"{file.name} differs"
    return None


def main(work: Path, config: Path, error: int) -> None:
    torch.set_num_threads(1)
    table = json.loads(config.read_text())
    expected = Run(simulate(parse_config(table), work / "whole").path)
    halted(table, work / "halted")
    ends: list[int] = []
    faults: list[str] = []
    for at in itertools.count(1):
        folder = work / "struck"
        shutil.copytree(work / "halted", folder)
        code = strike(folder, at, error)
        if code == 100 or len(faults) == SHOWN:
            break
        ends.append(code)
        if code not in ((3, 0) if error else (-signal.SIGKILL,)):
            faults.append(f"call {at}: ended with {code}")
        if (what := wrong(folder, expected)) is not None:
            faults.append(f"call {at}: {what}")
        shutil.rmtree(folder)
    print(json.dumps({"calls": len(ends), "ended": sum(map(bool, ends)), "faults": faults}))


if __name__ == "__main__":
    if sys.argv[4:] == ["careless"]:
        removes_first()
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
