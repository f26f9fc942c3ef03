"""What the grids with worker processes have in common: which worker does what, and when.

Each worker is a process that stays, imports the client app once and keeps what the app keeps (the
base model). A job goes to a worker that is free, one at a time, so that jobs of uneven length
balance out and a worker's death is one job's doing. Jobs wait at the driver; what is in flight is
bounded by the number of workers, not by the number of jobs.

Where workers come from and how they are talked to is the business of :mod:`fedft.server.grids.ray` and
:mod:`fedft.server.grids.processes`.
"""

import itertools
import os
import sys
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict

from fedft.core.errors import ConfigError, EnvironmentFailure
from fedft.server.grids.base import Job, JobGrid
from fedft.server.grids.flower import APP_CRASHED
from fedft.server.grids.serve import Answer, RunConfig, describe, error_reply
from fedft.server.grids.worker import Parcel, Record, Setting, Shared

_TRIES = 2
"""How many workers a job may cost before its messages become error replies."""

_FAILED_STARTS = 3
"""How many workers in a row may die before they are ready."""

_SHARE_BYTES = 64 * 1024
"""Arrays smaller than this travel inside the job: a look-up would cost more than the copy."""

_CHOICE = 16
"""Waiting jobs among which a free worker looks for one that it knows."""

_REMEMBERED = 10_000
"""Jobs whose last worker is remembered."""

_KERNELS = "64"
"""Compiled kernels that oneDNN keeps in a worker. It makes one for every shape, and packed cohorts
have a new shape each step; few of the 1024 that it would keep are used again. A step needs about
ten. After three rounds of MiniLM 180 MB less, in the same CPU time."""

_HEALTH_S = 1.0
"""How often to make sure that what the workers run on is still there."""

_STUCK_S = 30.0
"""How long an abandoned job may hold a worker that is needed."""

_PASSED_ON = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "FLWR_", "CUBLAS_", "ONEDNN_")
"""Environment variables that a worker must see as the driver does, by prefix."""


@dataclass(eq=False)
class Worker:
    """The driver's view of one worker.

    Attributes:
        busy: it gets prepared, or serves a job.
        job: the job it serves; None while it is free or getting prepared.
        ready: it has loaded the app.
        abandoned: since when nobody waits for its job, on the monotonic clock; None if somebody.
    """

    busy: bool = True
    job: Job | None = None
    ready: bool = False
    abandoned: float | None = None


W = TypeVar("W", bound=Worker)


@dataclass(frozen=True, eq=False)
class Outcome(Generic[W]):
    """What became of what a worker was doing: answers to its job, or why there are none.

    Attributes:
        worker: whose.
        answers: one a message of the job; None where it got prepared, or there are none.
        raised: what the worker raised; it goes on.
        died: what it died of, in a line; empty where it lives.
    """

    worker: W
    answers: Sequence[Answer] | None = None
    raised: BaseException | None = None
    died: str = ""


class WorkerGrid(JobGrid, Generic[W]):
    """Runs the client app in worker processes.

    A worker that dies is replaced and its job tried once more; after that its messages get error
    replies. Workers are started without waiting for them; :meth:`ready` waits.

    Args:
        app: reference to the client app, such as ``"fedft.clients.app:app"``; loaded in the workers.
        nodes: how many nodes there are.
        run_config: what every client finds in ``context.run_config``.
        workers: how many are wanted; None leaves it to the kind of grid.
        threads: CPU threads of a worker.

    Raises:
        ConfigError: the numbers make no sense.
    """

    def __init__(
        self,
        app: str,
        nodes: int,
        run_config: RunConfig | None,
        workers: int | None,
        threads: int,
    ) -> None:
        super().__init__(nodes, run_config)
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        self._setting = Setting(
            app=app,
            nodes=nodes,
            run_id=self.run.run_id,
            run_config=self.run_config,
            threads=threads,
            paths=tuple(str(Path(p).resolve()) for p in sys.path),
            environment=_worker_environment(threads),
        )
        self._queue: list[Job] = []
        self._served: dict[int, W] = {}  # who served a job last, by its first node
        self._parcels: dict[str, Parcel] = {}  # by message id, until it is answered
        self._failed_starts = 0
        self._checked = time.monotonic()
        self._workers: list[W] = []

    # --- what a kind of worker does in its own way ---

    @abstractmethod
    def _start_worker(self) -> W:
        """Start one, without waiting for it; it gets prepared at once."""

    @abstractmethod
    def _submit(self, worker: W, job: Job) -> None:
        """Send a job to a free worker."""

    @abstractmethod
    def _outcomes(self, timeout: float) -> list[Outcome[W]]:
        """What busy workers have completed; waits for one of them, in seconds."""

    @abstractmethod
    def _kill(self, worker: W) -> None:
        """End a worker, alive or not."""

    @abstractmethod
    def _check(self) -> None:
        """Make sure that what the workers run on is still there.

        Raises:
            EnvironmentFailure: it is not.
        """

    @abstractmethod
    def _share(self, record: ArrayRecord) -> Shared:
        """Put arrays that several messages have in common where all workers find them."""

    # --- for the driver ---

    @property
    def workers(self) -> int:
        """How many workers there are, ready or not."""
        return len(self._workers)

    def ready(self, timeout: float = 120.0) -> None:
        """Waits until all workers have loaded the app.

        Args:
            timeout: in seconds.

        Raises:
            ConfigError: the app cannot be loaded.
            EnvironmentFailure: they are not ready in time, or what they run on is gone.
        """
        self._check_usable()
        deadline = time.monotonic() + timeout
        while not all(worker.ready for worker in self._workers):
            left = deadline - time.monotonic()
            if left <= 0:
                raise EnvironmentFailure(
                    f"{sum(not w.ready for w in self._workers)} of {self.workers} workers were not "
                    f"ready after {timeout:g} s",
                    fix="Use fewer workers, or wait for room on the machine.",
                )
            self._progress(min(left, _HEALTH_S))

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        self._check_usable()
        wanted = set(message_ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        while wanted.isdisjoint(self._ready):
            if wanted.isdisjoint(self._open):
                return False
            left = _HEALTH_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            self._progress(min(left, _HEALTH_S))
        return True

    def close(self) -> None:
        super().close()
        self._queue.clear()
        self._parcels.clear()
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()

    # --- jobs ---

    def _announce(self, cohorts: Sequence[Sequence[Message]]) -> None:
        messages = [message for cohort in cohorts for message in cohort]
        uses = Counter(id(record) for m in messages for record in m.content.array_records.values())
        shared: dict[int, Shared] = {}
        for message in messages:
            records: list[tuple[str, Record | Shared]] = []
            for name, record in message.content.items():
                if uses[id(record)] > 1 and isinstance(record, ArrayRecord) and _is_large(record):
                    if id(record) not in shared:
                        shared[id(record)] = self._share(record)
                    records.append((name, shared[id(record)]))
                else:
                    records.append((name, record))
            self._parcels[message.metadata.message_id] = Parcel(message.metadata, tuple(records))

    def push_jobs(self, jobs: Iterable[Sequence[Message]]) -> list[str]:
        ids = super().push_jobs(jobs)
        self._dispatch()
        return ids

    def _enqueue(self, job: Job) -> None:
        self._queue.append(job)

    def _abandon(self, ids: frozenset[str]) -> None:
        for message_id in ids:
            self._parcels.pop(message_id, None)
        remaining = [(job, self._awaited(job)) for job in self._queue]
        self._queue = [Job(messages, job.losses) for job, messages in remaining if messages]
        for worker in self._workers:
            if worker.job and worker.abandoned is None and not self._awaited(worker.job):
                worker.abandoned = time.monotonic()

    def _awaited(self, job: Job) -> tuple[Message, ...]:
        return tuple(m for m in job.messages if m.metadata.message_id in self._open)

    def _collect(self) -> None:
        self._progress(0.0)

    def _progress(self, timeout: float) -> None:
        """Waits for one thing to happen, handles all that did, and gives free workers jobs.

        Raises:
            ConfigError: a worker could not load the app.
            EnvironmentFailure: what the workers run on is gone.
        """
        if any(worker.busy for worker in self._workers):
            for outcome in self._outcomes(timeout):
                self._settle(outcome)
        if time.monotonic() - self._checked > _HEALTH_S:
            self._checked = time.monotonic()
            self._check()
        self._replace_stuck()
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives free workers jobs: of nodes they served last, else of nobody's, else another's."""
        free = [w for w in self._workers if w.ready and not w.busy]
        while free and (startable := self._startable()):
            pairs = itertools.product(startable, free)
            job, worker = max(pairs, key=lambda pair: self._fit(*pair))  # the first of the best
            self._queue.remove(job)
            free.remove(worker)
            worker.busy, worker.job, worker.abandoned = True, job, None
            self._remember(job, worker)
            self._submit(worker, job)

    def _startable(self) -> list[Job]:
        """The first jobs none of whose nodes is busy, or has an earlier job waiting.

        They are of one group, which is a round: a round's last jobs go before the next one's.
        """
        blocked = {n for w in self._workers if w.job and w.abandoned is None for n in w.job.nodes}
        found: list[Job] = []
        for job in self._queue:
            if found and job.group != found[0].group:
                break
            if blocked.isdisjoint(job.nodes):
                found.append(job)
            if len(found) == _CHOICE:
                break
            blocked |= job.nodes
        return found

    def _fit(self, job: Job, worker: W) -> int:
        """How well a worker fits a job: what it keeps of a site saves it work."""
        last = self._served.get(min(job.nodes))
        return 1 if last is None else 2 * (last is worker)

    def _remember(self, job: Job, worker: W) -> None:
        self._served[min(job.nodes)] = worker
        if len(self._served) > _REMEMBERED:
            del self._served[next(iter(self._served))]

    def _load(self, job: Job) -> tuple[list[Parcel], list[RecordDict | None]]:
        """What a worker needs for a job: the messages, and the states of their nodes."""
        parcels = [self._parcels[m.metadata.message_id] for m in job.messages]
        return parcels, [self._state_of(m.metadata.dst_node_id) for m in job.messages]

    def _settle(self, outcome: Outcome[W]) -> None:
        """Takes in what a worker has completed, or its death."""
        worker = outcome.worker
        job, worker.job, worker.busy = worker.job, None, False
        if outcome.died:
            self._bury(worker, job, outcome.died)
        elif outcome.raised is not None:
            if job is None:
                raise _load_failure(outcome.raised, self._setting.app) from outcome.raised
            self._fail(job, f"the worker failed: {describe(outcome.raised)}")
        elif job is None:
            worker.ready = True
            self._failed_starts = 0
        else:
            for message, given in zip(job.messages, outcome.answers or (), strict=True):
                self._finish(message, given)

    def _finish(self, message: Message, given: Answer) -> None:
        self._parcels.pop(message.metadata.message_id, None)
        self._deliver(message, given)

    def _fail(self, job: Job, reason: str) -> None:
        for message in job.messages:
            self._finish(message, Answer(error_reply(message, APP_CRASHED, reason)))

    # --- workers ---

    def _bury(self, worker: W, job: Job | None, died: str) -> None:
        """Puts a new worker in the place of a dead one, and tries its job once more."""
        self._check()  # or is it more than a worker?
        if job is None:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise EnvironmentFailure(
                    f"{_FAILED_STARTS} workers in a row died while starting: {died}",
                    fix="Check free memory; use fewer workers.",
                )
        self._replace(worker)
        if job is None:
            return
        job.losses += 1
        messages = self._awaited(job)
        if job.losses >= _TRIES:
            self._fail(job, f"the worker died {job.losses} times: {died}")
        elif messages:
            self._queue.insert(0, Job(messages, job.losses))

    def _replace_stuck(self) -> None:
        """Replaces workers that hold on to a job nobody waits for while others wait."""
        if not self._queue or any(w.ready and not w.busy for w in self._workers):
            return
        for worker in list(self._workers):
            since = worker.abandoned
            if since is not None and time.monotonic() - since > _STUCK_S:
                self._replace(worker)

    def _replace(self, worker: W) -> None:
        self._kill(worker)
        self._workers[self._workers.index(worker)] = self._start_worker()


def cores(threads: int) -> int:
    """How many workers of so many threads this process has cores for; at least one."""
    all_ = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (all_ or 1) // threads)


def _worker_environment(threads: int) -> dict[str, str]:
    # The hub's token is a secret, and a cluster that was joined has a network in between.
    passed_on = {
        k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) and k != "HF_TOKEN"
    }
    bounded = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": _KERNELS}
    return {**bounded, **passed_on, "OMP_NUM_THREADS": str(threads)}


def _is_large(record: ArrayRecord) -> bool:
    return record.count_bytes() >= _SHARE_BYTES


def _load_failure(cause: BaseException, app: str) -> Exception:
    if isinstance(cause, ConfigError):
        return ConfigError(cause.what, fix=cause.fix)
    return EnvironmentFailure(
        f"a worker could not prepare the client app {app!r}: {describe(cause)}",
        fix="Run it with engine.backend = 'inline' to see the error in full.",
    )
