"""A grid whose clients run in processes of this machine, forked after their imports.

A worker costs what it works on and not its imports, which it shares with the others, and no
server has to come up before the first job. For more than one machine, and for GPUs, there is
:mod:`fedft.server.grids.ray`.
"""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import ArrayRecord, Message

from fedft.core.errors import EnvironmentFailure
from fedft.server.grids import ray_cleanup
from fedft.server.grids.base import Job
from fedft.server.grids.cluster import own_paths
from fedft.server.grids.serve import RunConfig
from fedft.server.grids.worker import Shared, shared_by
from fedft.server.grids.workers import Outcome, Worker, WorkerGrid, cores

_DIED = "its process ended; the system log tells whether the out-of-memory killer did it"


@dataclass(eq=False, kw_only=True)
class _Process(Worker):
    """A worker behind a socket.

    Attributes:
        socket: our end.
        births: its process id, once it has told, and when it was born.
        has: the shared arrays that it keeps.
    """

    socket: Connection
    births: dict[int, ray_cleanup.Birth] = field(default_factory=dict[int, ray_cleanup.Birth])
    has: frozenset[Any] = field(default_factory=frozenset[Any])


class ProcessGrid(WorkerGrid[_Process]):
    """Runs the client app in forked processes; see :class:`~fedft.server.grids.workers.WorkerGrid`.

    Args:
        app: reference to the client app, such as ``"fedft.clients.app:app"``; loaded in the workers.
        nodes: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
        workers: how many; None for as many as there are cores for.
        threads: CPU threads of a worker.
        imports: modules that workers will need; imported once for all of them.

    Raises:
        ConfigError: the numbers make no sense.
        EnvironmentFailure: this system cannot fork.
    """

    def __init__(
        self,
        app: str,
        nodes: int,
        run_config: RunConfig | None = None,
        workers: int | None = None,
        threads: int = 1,
        imports: Sequence[str] = (),
    ) -> None:
        super().__init__(app, nodes, run_config, workers, threads)
        if not hasattr(os, "fork"):
            raise EnvironmentFailure(
                "this system cannot fork processes", fix="Set engine.backend to 'ray'."
            )
        self._arrays: dict[int, ArrayRecord] = {}
        self._numbers = itertools.count()
        ours, theirs = socket.socketpair()
        self._control = ours
        ends, self._lifeline = os.pipe()  # nothing is written to it; its end is what tells
        handles = [ends, theirs.fileno()]
        with theirs:
            self._forkserver = subprocess.Popen(
                # -P: a folder that happens to be called "server" here is not meant.
                [
                    *(sys.executable, "-P", "-m", "fedft.server.grids.lifeline", str(ends)),
                    *("fedft.server.grids.forkserver", str(theirs.fileno()), *imports),
                ],
                env={
                    **os.environ,
                    **self._setting.environment,
                    "PYTHONPATH": os.pathsep.join(own_paths()),
                },
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        os.close(ends)
        try:
            self._workers = [self._start_worker() for _ in range(workers or cores(threads))]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        self._arrays.clear()
        self._control.close()
        # It may still be importing; no worker is lost with it, they are ended already.
        self._forkserver.kill()
        self._forkserver.wait()
        os.close(self._lifeline)

    def _announce(self, cohorts: Sequence[Sequence[Message]]) -> None:
        waiting = set(shared_by(list(self._parcels.values())))
        self._arrays = {ref: self._arrays[ref] for ref in waiting}
        super()._announce(cohorts)

    def _share(self, record: ArrayRecord) -> Shared:
        ref = next(self._numbers)
        self._arrays[ref] = record
        return Shared(ref)

    def _start_worker(self) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            except OSError:
                self._check()
                raise
        worker = _Process(socket=Connection(ours.detach()))
        worker.socket.send(self._setting)
        return worker

    def _submit(self, worker: _Process, job: Job) -> None:
        parcels, states = self._load(job)
        refs = shared_by(parcels)
        missing = {ref: self._arrays[ref] for ref in refs if ref not in worker.has}
        worker.has = frozenset(refs)
        with contextlib.suppress(OSError):  # it is dead, which reading from it will tell
            worker.socket.send((parcels, states, missing))

    def _outcomes(self, timeout: float) -> list[Outcome[_Process]]:
        busy = {worker.socket: worker for worker in self._workers if worker.busy}
        ready = connection.wait(list(busy), timeout)
        return [o for end in ready if isinstance(end, Connection) for o in _heard(busy[end])]

    def _check(self) -> None:
        if self._forkserver.poll() is not None:
            raise EnvironmentFailure(
                "the process that workers are forked from is gone, and they are gone with it",
                fix="Look for the out-of-memory killer in the system log, then resume the run.",
            )

    def _kill(self, worker: _Process) -> None:
        ray_cleanup.reap(worker.births)
        worker.socket.close()


def _heard(worker: _Process) -> Iterator[Outcome[_Process]]:
    try:
        told = worker.socket.recv()
    except (EOFError, OSError):
        yield Outcome(worker, died=_DIED)
        return
    if isinstance(told, int):
        worker.births[told] = ray_cleanup.birth(told)
        return
    answers, raised = told
    yield Outcome(worker, answers, raised)
