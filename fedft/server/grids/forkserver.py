"""The process that worker processes are forked from; :mod:`fedft.server.grids.lifeline` starts it.

It imports what workers need, once, and then forks itself for every worker that it is asked for: a
worker shares the pages of those imports and is there at once. It runs on one thread and never
touches a GPU, so that forking it is safe, and no worker ever imports the driver's own program.

The driver holds the other end of a socket, through which it sends one end of each new worker's
own socket. When the driver is gone, however it went, the kernel ends this process, also while it
still imports, and the workers with it.
"""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import ArrayRecord

from fedft.core.errors import FedftError
from fedft.server.grids.lifeline import end_with_parent
from fedft.server.grids.serve import describe
from fedft.server.grids.worker import Server


def main() -> None:
    """With the arguments ``FD MODULE…``: fork a worker for each socket that comes through FD."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        with contextlib.suppress(Exception):  # whoever needs it says better what is wrong
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a worker would write to the pages that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the driver hears of deaths by itself
    parent = os.getpid()
    while True:
        _, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not handles:
            return
        if os.fork() == 0:
            end_with_parent(parent)
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(Connection(handles[0]))
            os._exit(0)
        os.close(handles[0])


def work(driver: Connection) -> None:
    """Serve what comes through a socket until it ends: first the setting, then jobs."""
    server = _SocketServer()
    with contextlib.suppress(EOFError, OSError):
        driver.send(os.getpid())
        setting = driver.recv()
        driver.send(_tried(server.load, setting))
        while True:
            parcels, states, arrays = driver.recv()
            server.sent = arrays
            driver.send(_tried(server.serve, parcels, states))


class _SocketServer(Server):
    """A worker that is sent the shared arrays that it lacks with each job."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Mapping[Any, ArrayRecord] = {}

    def _look_up(self, refs: list[Any]) -> list[ArrayRecord]:
        return [self.sent[ref] for ref in refs]


Told = tuple[Sequence[Any] | None, BaseException | None]
"""What a worker says of a job: the answers, or what was raised."""


def _tried(act: Callable[..., Sequence[Any] | None], *what: Any) -> Told:
    try:
        return act(*what), None
    except FedftError as error:
        return None, error
    except Exception as error:  # any other may not survive the way to the driver
        return None, RuntimeError(describe(error))
