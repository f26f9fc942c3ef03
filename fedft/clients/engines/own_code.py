"""A place for code of a client's owner to run in: seeded, watched, and put back as it was after it.

What such code does to the process stays inside: random generators, the working directory, the
environment, standard output. What would go on after it, threads and processes, is a fault.
"""

import logging
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedft.core.errors import Interrupted, UpdateRejected

logger = logging.getLogger(__name__)

TRAINER = "trainer"
"""The word by which a run counts clients whose own trainer failed."""

_ENDING_S = 5.0
"""Seconds in which threads and processes may end after the code has returned."""

_LASTING = ("resource_tracker", "torch_shm_manager", "forkserver")
"""Helpers that Python and torch keep for the life of a process, by their command lines."""


def failed(what: str) -> UpdateRejected:
    """A client's own trainer did something that its result cannot be used after."""
    return UpdateRejected(TRAINER, what)


def place(error: BaseException, file: str | None) -> str:
    """Where an error came from: the last line of the user's own file, or the last of all.

    Args:
        error: with its traceback.
        file: of the user's function, where that is known.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == file]
    found = (own or frames)[-1] if frames else None
    return "" if found is None else f"{found.filename}:{found.lineno} in {found.name}"


def blamed(name: str, error: BaseException, file: str | None) -> UpdateRejected:
    """What a run is told of an error in somebody's own trainer.

    Args:
        name: of the trainer.
        error: that it raised.
        file: of the user's function, where that is known.
    """
    if isinstance(error, UpdateRejected):
        return error
    said = f"{type(error).__name__}: {error}".strip().rstrip(":")
    if isinstance(error, SystemExit):
        said = f"it called sys.exit({error.code!r}), which ends no run"
    return failed(f"the trainer {name} failed at {place(error, file)}: {said[:1000]}")


@contextmanager
def guarded(name: str, file: str | None, seed: int, device: torch.device) -> Iterator[str]:
    """Inside, somebody's own code may run; gives a folder for its files, which is removed after.

    Args:
        name: of the trainer.
        file: of the user's function, where that is known.
        seed: of the generators of Python, NumPy and torch, below 2³².
        device: where the model lies; its generator is put back, too.

    Raises:
        UpdateRejected: it raised, called ``sys.exit``, or left a thread or a process behind.
    """
    from transformers import set_seed

    here, environment = Path.cwd(), dict(os.environ)
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    leftovers = _Leftovers()
    with (
        tempfile.TemporaryDirectory(prefix="fedft-trainer-", ignore_cleanup_errors=True) as folder,
        torch.random.fork_rng(devices=devices, device_type=kind),
        redirect_stdout(sys.stderr),  # a command's own output is for programs
        warnings.catch_warnings(),
    ):
        try:
            set_seed(seed)
            yield folder
        except (KeyboardInterrupt, Interrupted):
            raise
        except (Exception, SystemExit) as error:
            leftovers.end()
            logger.info("the trainer %s failed", name, exc_info=True)
            raise blamed(name, error, file) from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            os.chdir(here)
            _restore(environment)
    if left := leftovers.end():
        raise failed(
            f"the trainer {name} left {left} running: end what it starts before train() returns"
        )


def _restore(environment: dict[str, str]) -> None:
    for key in os.environ.keys() - environment.keys():
        del os.environ[key]
    for key, value in environment.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


class _Leftovers:
    """Threads and processes that were not there when this was made."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._children = set(_children())

    def end(self) -> str:
        """What is still running in a few seconds, in words; processes are ended then."""
        give_up = time.monotonic() + _ENDING_S
        while (found := self._found()) and time.monotonic() < give_up:
            time.sleep(0.05)
        if not found:
            return ""
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in self._children:
                child.terminate()
                child.join(_ENDING_S)
        for pid in set(_children()) - self._children:
            with suppress(OSError):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        return ", ".join(found)

    def _found(self) -> list[str]:
        threads = [
            f"the thread {thread.name!r}"
            for thread in threading.enumerate()
            if thread not in self._threads and not thread.daemon  # those end with the process
        ]
        return threads + [f"the process {pid}" for pid in sorted(set(_children()) - self._children)]


def _children() -> list[int]:
    """Process ids of what this process has started: on Linux all of it, elsewhere what Python did."""
    known = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    found = set(known)
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(pid) for pid in task.read_text().split()}
    return [pid for pid in found if not _lasts(pid)]


def _lasts(pid: int) -> bool:
    """Whether a process is a helper of Python or torch, or has ended and waits to be looked at."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return not line or any(name in line for name in _LASTING)


def called(made: Any, name: str) -> Callable[[], object]:
    """``train`` of what a trainer's function returned.

    Raises:
        UpdateRejected: it has none.
    """
    train = getattr(made, "train", None)
    if callable(train):
        return train
    what = "None" if made is None else f"a {type(made).__name__}, which has no train()"
    hint = (
        "; wrap it in an object whose train() calls fit(), as docs/trainer.md shows"
        if hasattr(made, "fit")
        else ""
    )
    raise failed(f"the trainer {name} returned {what}{hint}")
