"""The cohort engine over every task that it takes: CPU milliseconds a row, beside the plain loop.

    python -m benchmarks.tasks [--only chat regression] [--full] [--resume]

Each task is measured on its example in ``examples/tasks``, with that example's model, adapter and data:
eight clients of two steps each, one after the other in the plain loop, and together in the cohort engine,
by turns in one process of one thread, in float32, by SGD. Both train the same rows in the same batches; the largest
difference between their adapters stands beside the figures.

The examples' data are made first, by each example's own ``prepare.py``, where they are not there yet.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.record import add_options, measure_sections
from benchmarks.turns import spread, take_turns
from fedft.clients.engines.base import Engine, Trained
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.batches import batches
from fedft.core.data.source import prepare
from fedft.core.models import Base, initial_adapter, input_encoder, load_base, resolve
from fedft.core.quiet import quiet
from fedft.core.types import Batch, LocalTraining, TrainPlan
from fedft.server.config_file import load_config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "tasks"
CLIENTS, STEPS, REPEATS = 8, 2, 5


def sections() -> list[str]:
    """Examples of tasks whose clients train together."""
    found = sorted(path.parent.name for path in EXAMPLES.glob("*/config.toml"))
    return [name for name in found if load_config(EXAMPLES / name / "config.toml").model.kind.alone]


def measure(name: str) -> dict[str, Any]:
    """Both engines on one example."""
    os.chdir(ROOT)  # the examples' paths start there
    config = load_config(EXAMPLES / name / "config.toml")
    if not Path(config.data.source).exists():
        subprocess.run([sys.executable, str(EXAMPLES / name / "prepare.py")], check=True)
    folder = resolve(config.model)
    data = prepare(config.data, config.model.task, input_encoder(config.model, folder))

    def base() -> Base:
        found = load_base(config.model, config.lora, len(data.classes), names=data.classes)
        found.kind = config.model.kind
        return found

    engines: dict[str, Engine] = {
        "loop": PeftEngine(base(), config.lora),
        "cohort": CohortEngine(base(), config.lora),
    }
    start = initial_adapter(engines["loop"].base.shapes, config.lora, config.rank, seed=0)
    training = LocalTraining(steps=STEPS, batch_size=config.training.batch_size, optimizer="sgd")
    plans = [TrainPlan(start, training=training, site=f"client-{k}") for k in range(CLIENTS)]
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).numpy()
    each = training.batch_size * STEPS
    own = [
        list(
            batches(
                data.train,
                rows[k * each : (k + 1) * each],
                training.batch_size,
                steps=STEPS,
                generator=torch.Generator().manual_seed(k),
            )
        )
        for k in range(CLIENTS)
    ]
    count = sum(len(batch) for mine in own for batch in mine)
    found: dict[str, list[Trained]] = {}
    times = take_turns(
        {who: _timed(engine, plans, own, found, who, count) for who, engine in engines.items()},
        REPEATS + 1,
    )
    times = {who: values[1:] for who, values in times.items()}  # the first turn warms up
    ratio = spread([a / b for a, b in zip(times["loop"], times["cohort"], strict=True)])
    return {
        "task": config.model.task,
        "model": config.model.source,
        "batch": training.batch_size,
        "loop": spread(times["loop"]),
        "cohort": spread(times["cohort"]),
        "gain": ratio,
        "difference": _difference(found["loop"], found["cohort"]),
    }


def _timed(
    engine: Engine,
    plans: Sequence[TrainPlan],
    own: Sequence[Sequence[Batch]],
    found: dict[str, list[Trained]],
    who: str,
    count: int,
) -> Callable[[], float]:
    """CPU milliseconds a row of one training of all clients."""

    def run() -> float:
        began = time.process_time()
        found[who] = engine.train(plans, own)
        return 1000 * (time.process_time() - began) / count

    return run


def _difference(one: Sequence[Trained], other: Sequence[Trained]) -> float:
    """The largest between two lists of adapters."""
    return max(
        float((a.adapter.tensors()[n] - b.adapter.tensors()[n]).abs().max())
        for a, b in zip(one, other, strict=True)
        for n in a.adapter.tensors()
    )


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    add_options(parser)
    names = sections()
    measure_sections("tasks", parser.parse_args(), names, names, measure)
