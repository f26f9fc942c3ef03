"""What stays resident at a site or in a worker between messages: base model, data, engine.

Loading it takes seconds, using it milliseconds. One process keeps one workbench: that of the task
it was last asked about.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from fedft.clients.engines import ENGINES
from fedft.clients.engines.base import Engine
from fedft.clients.engines.loop import LoopEngine
from fedft.clients.engines.trainer import TrainerEngine
from fedft.clients.own_rows import ClientRows
from fedft.core import memory, models, seeds
from fedft.core.adapters import family_of
from fedft.core.data import partition
from fedft.core.data.batches import (
    batch_count,
    batch_rows,
    batches,
    eval_batches,
    poisson_batches,
    poisson_schedule,
)
from fedft.core.data.packing import packed_batches, packed_count, packed_rows
from fedft.core.data.partition import Manifest
from fedft.core.data.source import Data, prepare
from fedft.core.drawn import Drawn, check_time
from fedft.core.errors import MismatchError
from fedft.core.examples import Rows
from fedft.core.privacy import entropy
from fedft.core.spec import TaskSpec
from fedft.core.tasks import task_of
from fedft.core.tasks.criterion import weights_of
from fedft.core.types import Adapter, Batch, LocalTraining
from fedft.core.wire.compress import Compressor, compressor_of

PROBE_ROWS = 64
"""Rows on which a site compares the model's blocks, at most."""

PROBE_BATCH = 8
"""Of them at a time: a site that holds a part of the model has little memory for activations."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """The resident state of one task.

    Attributes:
        task: as the server sent it.
        data: tokenised once.
        manifest: which rows belong to which site.
        engine: with the frozen base.
    """

    task: TaskSpec
    data: Data
    manifest: Manifest
    engine: Engine

    @cached_property
    def compressor(self) -> Compressor:
        """In which replies to plans to train are sent."""
        return compressor_of(self.task.wire)

    def initial(self, rank: int) -> Adapter:
        """The adapter of the common seed, as the server made it."""
        return models.initial_adapter(self.engine.base.shapes, self.task.lora, rank, self.task.seed)

    def rows(self, index: int) -> tuple[Rows, Rows]:
        """The rows a site trains on, and those it holds out for judging its own model."""
        return _rows(self.task, self.manifest, index)

    def training_batches(self, index: int, round_: int, training: LocalTraining) -> Sequence[Batch]:
        """The batches of one site in one round, in training order; a function of the seed.

        With DP-SGD they are not: see :mod:`fedft.clients.methods.dp_sgd`. Each is made when it is asked for.
        """
        rows, _ = self.rows(index)
        name = self.manifest.name_of(index)
        if training.dp_noise:
            return self._poisson_batches(rows, training)
        if self.task.data.packing:
            return self._packed_batches(rows, name, round_, training)
        size, epochs, steps = training.step_rows, training.epochs, training.steps

        def draw() -> Iterator[Batch]:
            return batches(
                self.data.train,
                rows,
                size,
                epochs=epochs,
                steps=steps,
                generator=seeds.torch_generator(self.task.seed, "batches", round_, name),
                pool=f"training rows of {name}",
            )

        count = batch_count(len(rows), size, epochs=epochs, steps=steps) if len(rows) else 0
        seen = len(rows)
        if steps is not None and count < batch_count(len(rows), size):  # less than one pass
            generator = seeds.torch_generator(self.task.seed, "batches", round_, name)
            lengths = self.data.train.lengths[rows]
            seen = sum(map(len, batch_rows(lengths, size, steps=steps, generator=generator)))
        return Drawn(draw, count, seen)

    def own_training(self, index: int, training: LocalTraining) -> LocalTraining:
        """A plan's settings with what only the client can tell: class weights as numbers.

        Raises:
            MismatchError: the task cannot be trained so, or the run has no such class.
        """
        task = task_of(self.task.model.task)
        if (why := task.against(training)) is not None:
            raise MismatchError(f"[training] {why}", fix="Ask whoever runs the server.")
        if training.class_weights is None:
            return training
        rows, _ = self.rows(index)
        found = [np.zeros(0, np.int64)]
        for batch in eval_batches(self.data.train, rows):
            check_time()
            _, targets = task.targets(batch.labels)
            found.append(targets[task.scored(targets)].numpy())
        weights = weights_of(training, self.data.classes, np.concatenate(found))
        return replace(training, class_weights=weights)

    def _packed_batches(
        self, rows: Rows, name: str, round_: int, training: LocalTraining
    ) -> Sequence[Batch]:
        """The same rows, several in each sequence; a batch has as many sequences as it had rows."""
        lengths, capacity = self.data.train.lengths[rows], self.task.data.max_length
        size, epochs, steps = training.batch_size, training.epochs, training.steps

        def generator() -> torch.Generator:
            return seeds.torch_generator(self.task.seed, "batches", round_, name)

        def draw() -> Iterator[Batch]:
            return packed_batches(
                *(self.data.train, rows, capacity, size),
                epochs=epochs,
                steps=steps,
                generator=generator(),
            )

        count = packed_count(lengths, capacity, size, epochs=epochs, steps=steps)
        seen = len(rows)
        if steps is not None and count < packed_count(lengths, capacity, size):
            drawn = packed_rows(lengths, capacity, size, steps=steps, generator=generator())
            seen = sum(len(own) for bins in drawn for own in bins)
        return Drawn(draw, count, seen)

    def _poisson_batches(self, rows: Rows, training: LocalTraining) -> Sequence[Batch]:
        """As many as usual, each a Poisson sample by the operating system's randomness."""
        rate, steps = poisson_schedule(len(rows), training)

        def draw() -> Iterator[Batch]:
            return poisson_batches(self.data.train, rows, rate, steps, entropy.Keystream())

        # As enrolled: the sizes of the samples are secret.
        return Drawn(draw, steps if len(rows) else 0, len(rows))

    def test_batches(self, shard: int, count: int) -> Iterable[Batch]:
        """One of ``count`` slices of the central test set."""
        rows = np.arange(len(self.data.test))[shard::count]
        return eval_batches(self.data.test, rows, pool=f"test rows {shard} of {count}")

    def probe_batches(self, index: int) -> Sequence[Batch]:
        """The first rows that a site trains on, for comparing the model's blocks."""
        rows, _ = self.rows(index)
        return list(eval_batches(self.data.train, rows[:PROBE_ROWS], PROBE_BATCH))

    def holdout_batches(self, index: int) -> Iterator[Batch]:
        """The examples that a site holds out."""
        _, held = self.rows(index)
        name = self.manifest.name_of(index)
        for batch in eval_batches(self.data.train, held, pool=f"held-out rows of {name}"):
            check_time()
            yield batch


@lru_cache(maxsize=1)
def prepared(task_json: str) -> Data:
    """The data of a task, tokenised; no weight is loaded.

    Raises:
        ConfigError, MismatchError: as :func:`fedft.core.data.source.prepare`.
    """
    task = TaskSpec.model_validate_json(task_json)
    return prepare(
        task.data,
        task.model.task,
        models.input_encoder(task.model, models.resolve(task.model)),
        seed=task.seed,
        classes=task.classes or None,
        relabel=task.relabel,
        most_rows=task.most_rows,
        most_test_rows=task.test_rows,
    )


@lru_cache(maxsize=1)
def workbench(task_json: str) -> Workbench:
    """Load, or return what is loaded.

    Args:
        task_json: of a :class:`~fedft.core.spec.TaskSpec`.

    Raises:
        MismatchError: the data here are partitioned otherwise than at the server.
    """
    task = TaskSpec.model_validate_json(task_json)
    data = prepared(task_json)
    manifest = _manifest(task, data)
    if task.lean:
        memory.return_what_is_freed()
    return Workbench(task, data, manifest, _engine(task, data, manifest))


def trial(bench: Workbench) -> Workbench:
    """The same, with the plain loop in place of a trainer of the user's own: for the trial before round 1."""
    engine = bench.engine
    return replace(bench, engine=engine.loop) if isinstance(engine, TrainerEngine) else bench


def one_by_one(task_json: str) -> str:
    """The same task in the plain loop."""
    task = TaskSpec.model_validate_json(task_json)
    return task.model_copy(update={"cohort": 1}).model_dump_json()


def _engine(task: TaskSpec, data: Data, manifest: Manifest) -> Engine:
    load = partial(
        models.load_base,
        task.model,
        task.lora,
        len(data.classes),
        precision=task.precision,
        device=task.device,
        lean=task.lean,
        shared=task.site is None,
        names=data.classes,
    )
    base = load()
    base.new_tokens = task.new_tokens
    base.kind = task.judged
    engine = ENGINES[family_of(task.lora).name](task, base)
    if task.trainer is None:
        return engine
    if not isinstance(engine, LoopEngine):
        raise MismatchError(
            f"the trainer {task.trainer} trains one client after another, and this client is to train "
            "several at once, or a part of the blocks",
            fix="Set [engine] cohort = 1, and join without --memory.",
        )

    def rows_of(client: str) -> Rows:
        return _rows(task, manifest, manifest.index_of(client))[0]

    return TrainerEngine(engine, task.trainer, ClientRows(task, data, rows_of), load)


def _rows(task: TaskSpec, manifest: Manifest, index: int) -> tuple[Rows, Rows]:
    return partition.split_holdout(
        manifest.rows_of(index), task.data.holdout, task.seed, manifest.name_of(index)
    )


def _manifest(task: TaskSpec, data: Data) -> Manifest:
    if task.site is not None:
        return partition.undivided(len(data.train), task.site)
    if task.manifest and Path(task.manifest).is_dir():
        return partition.load(Path(task.manifest), task.fingerprint)
    manifest = partition.divided(task.data.partition, data, task.clients, task.seed)
    if task.fingerprint and manifest.fingerprint != task.fingerprint:
        raise MismatchError(
            f"the data here are partitioned otherwise (manifest {manifest.fingerprint[:12]}) "
            f"than at the server ({task.fingerprint[:12]})",
            fix="Use the same data files and the same version of fedft on both sides.",
        )
    return manifest
