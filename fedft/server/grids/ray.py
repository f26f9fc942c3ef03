"""A grid whose clients run in worker processes on Ray, one actor each.

Arrays that several messages of one push share (the same ``ArrayRecord`` object) are put into
Ray's object store once and fetched by the workers from there.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord

from fedft.core.errors import ConfigError, EnvironmentFailure
from fedft.server.grids import cluster as clusters
from fedft.server.grids.base import Job
from fedft.server.grids.cluster import Cluster
from fedft.server.grids.serve import RunConfig
from fedft.server.grids.worker import RayServer, Shared
from fedft.server.grids.workers import Outcome, Worker, WorkerGrid, cores

_FETCH_S = 5.0


@dataclass(eq=False, kw_only=True)
class _Actor(Worker):
    """A worker on Ray.

    Attributes:
        handle: of the actor.
        ref: what it works on; None while it is free.
    """

    handle: Any
    ref: Any


class RayGrid(WorkerGrid[_Actor]):
    """Runs the client app in worker processes on Ray; see :class:`~fedft.server.grids.workers.WorkerGrid`.

    Args:
        app: reference to the client app, such as ``"fedft.clients.app:app"``; loaded in the workers.
        nodes: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
        workers: how many; None for as many as there are cores for, or room on the cluster.
        threads: CPU threads of a worker.
        gpus_per_worker: GPUs of a worker; a fraction lets workers share one.
        address: of a Ray cluster to join, ``host:port`` or ``"auto"``; None starts a private one,
            or uses the one this process is connected to.

    Raises:
        ConfigError: the numbers make no sense.
        EnvironmentFailure: Ray cannot be started or reached, or has no room for a single worker.
        SecurityRefusal: the cluster did not accept the token.
    """

    def __init__(
        self,
        app: str,
        nodes: int,
        run_config: RunConfig | None = None,
        workers: int | None = None,
        threads: int = 1,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
    ) -> None:
        super().__init__(app, nodes, run_config, workers, threads)
        _check_gpus(gpus_per_worker)
        self._needs = (threads, gpus_per_worker)
        self._cluster = _cluster(address, workers, threads, gpus_per_worker)
        try:
            self._actor_class: Any = self._cluster.ray.remote(
                num_cpus=threads, num_gpus=gpus_per_worker, max_restarts=0
            )(RayServer)
            self._workers = [self._start_worker() for _ in range(self._worker_count(workers))]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        self._cluster.close()

    def _share(self, record: ArrayRecord) -> Shared:
        return Shared(self._cluster.ray.put(record))

    def _submit(self, worker: _Actor, job: Job) -> None:
        worker.ref = worker.handle.serve.remote(*self._load(job))

    def _outcomes(self, timeout: float) -> list[Outcome[_Actor]]:
        ray = self._cluster.ray
        refs = [worker.ref for worker in self._workers if worker.ref is not None]
        done, rest = ray.wait(refs, num_returns=1, timeout=timeout)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [o for worker in self._workers if worker.ref in done for o in self._outcome(worker)]

    def _outcome(self, worker: _Actor) -> Iterator[Outcome[_Actor]]:
        errors = self._cluster.ray.exceptions
        ref, worker.ref = worker.ref, None
        try:
            result = self._fetch(ref)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            yield Outcome(worker, raised=cause)
        except errors.RayError as error:
            yield Outcome(worker, died=_first_line(error))
        else:
            if worker.job is None:
                self._cluster.adopt(*result)
                yield Outcome(worker)
            else:
                yield Outcome(worker, result)

    def _fetch(self, ref: Any) -> Any:
        """The value behind a ref that is done. A large one may have to come from another node."""
        while True:
            try:
                return self._cluster.ray.get(ref, timeout=_FETCH_S)
            except self._cluster.ray.exceptions.GetTimeoutError:
                self._cluster.check()

    def _check(self) -> None:
        self._cluster.check()

    def _worker_count(self, wanted: int | None) -> int:
        room = self._cluster.room(*self._needs)
        if room < 1:
            threads, gpus = self._needs
            raise EnvironmentFailure(
                f"no Ray node has room for a worker with {threads} threads and {gpus:g} GPUs",
                fix="Lower engine.threads or the GPUs of a worker, or join another cluster.",
            )
        return room if wanted is None else wanted

    def _start_worker(self) -> _Actor:
        actor = self._actor_class.remote()
        return _Actor(handle=actor, ref=actor.prepare.remote(self._setting))

    def _kill(self, worker: _Actor) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or Ray is
            self._cluster.ray.kill(worker.handle)


def _cluster(address: str | None, workers: int | None, threads: int, gpus: float) -> Cluster:
    if address is not None:
        return clusters.join(address)
    if (borrowed := clusters.borrow()) is not None:
        return borrowed
    count = workers if workers is not None else cores(threads)
    return clusters.start(count * threads, gpus=gpus > 0)


def _check_gpus(gpus_per_worker: float) -> None:
    if gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1):
        raise ConfigError(
            f"GPUs of a worker must be a fraction of one, or a whole number; got {gpus_per_worker}"
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
