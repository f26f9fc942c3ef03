"""What a federation costs around the training: CPU seconds of rounds over those of the plain loop.

    python -m benchmarks.federation [--full] [--resume] [--rounds 5]

``fedft simulate`` at K = 1 in float32, one worker of one thread, 10 sites a round, with a worker
forked on this machine and with Ray's. After each round the plain loop of :mod:`fedft.clients.engines.loop`
trains the same sites on the same batches, one after another in one process, so that both see the
same machine. Counted are the CPU seconds of the worker and of the driver (rounds, aggregation, bias
meters, checkpoints) within the round; Ray's own servers are told apart. A section is a backend and
a batch size.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch

from benchmarks.record import add_options, measure_sections
from benchmarks.turns import spread
from fedft.clients.resident import Workbench, workbench
from fedft.core.models import initial_adapter
from fedft.core.quiet import quiet
from fedft.core.record.lines import ClientLine, RoundLine
from fedft.core.types import TrainPlan
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.grids.worker import RayServer
from fedft.server.run import simulate
from fedft.trackers import Start, Tracker

FULL = ("processes-8", "ray-8", "processes-1", "ray-1")
QUICK = FULL[:2]
WORKER = f"ray::{RayServer.__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="steady rounds")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)

    def measured(key: str) -> Mapping[str, Any]:
        backend, _, batch = key.partition("-")
        return section(table(backend, int(batch), arguments.rounds))

    measure_sections("federation", arguments, QUICK, FULL, measured)


def table(backend: str, batch: int, rounds: int) -> dict[str, Any]:
    """The configuration, as of a TOML file; two rounds more than count."""
    return {
        "data": {"partition": {"kind": "bootstrap", "rows-per-client": 60}},
        "fleet": {"clients": 100},
        "rounds": {
            "count": 2 + rounds,
            "per-round": 10,
            # The test set is scored after the last round, which is not what is asked here.
            "evaluate-every": 2 + rounds,
            # A run that may end early never begins a round before the last one is committed: the
            # worker rests while the plain loop runs.
            "patience": 2 + rounds,
        },
        "training": {"batch-size": batch},
        "engine": {"backend": backend, "workers": 1, "cohort": 1},
    }


def section(settings: Mapping[str, Any]) -> dict[str, Any]:
    config = parse_config(settings)
    watch = Watch(config)
    with tempfile.TemporaryDirectory() as folder:
        simulate(config, Path(folder) / "run", trackers=[watch])
    # The first round loads the model, the last one evaluates.
    rounds, loops = watch.rounds[1:-1], watch.loops[1:-1]
    ratios = {
        "worker": [own["worker"] / loop for own, loop in zip(rounds, loops, strict=True)],
        "worker + driver": [
            (own["worker"] + own["driver"]) / loop for own, loop in zip(rounds, loops, strict=True)
        ],
    }
    result = {
        "loop_cpu_s": spread(loops),
        "round_cpu_s": {part: spread([own[part] for own in rounds]) for part in rounds[0]},
        "over_loop": {name: spread(values) for name, values in ratios.items()},
    }
    for name, values in ratios.items():
        print(f"  {name}: {statistics.median(values):.3f} times the plain loop", flush=True)
    return result


class Watch(Tracker):
    """Between two rounds: reads the clocks, and runs the plain loop over the last round's work.

    Attributes:
        rounds: CPU seconds of each round, by process: ``worker``, ``driver`` and ``ray``.
        loops: CPU seconds of the plain loop over the same batches.
    """

    def __init__(self, config: RunConfig) -> None:
        self.rounds: list[dict[str, float]] = []
        self.loops: list[float] = []
        self._config = config
        self._before: dict[str, float] = {}
        self._bench: Workbench | None = None

    def started(self, start: Start) -> None:
        config = parse_config(start.config)
        # Of one site a pass: its engine is the plain loop.
        self._bench = workbench(config.task(precision="fp32", cohort=1).model_dump_json())
        self._before = self._spent()

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        now = self._spent()
        self.rounds.append({part: now[part] - self._before[part] for part in now})
        start = time.process_time()
        self._train(line)
        self.loops.append(time.process_time() - start)
        self._before = self._spent()

    def _spent(self) -> dict[str, float]:
        return cpu_seconds(self._config.engine.backend)

    def _train(self, line: RoundLine) -> None:
        assert self._bench is not None
        bench, config = self._bench, self._config
        training = config.training.local()
        start = initial_adapter(bench.engine.base.shapes, config.lora, config.rank, config.seed)
        positions = {bench.manifest.name_of(i): i for i in range(len(bench.manifest))}
        for site in line["cohort"]:
            own = bench.training_batches(positions[site], line["round"], training)
            bench.engine.train([TrainPlan(start=start, training=training, site=site)], [own])


def cpu_seconds(backend: str) -> dict[str, float]:
    """CPU seconds so far of the workers, of this process, and of what else Ray runs."""
    spent = {"worker": 0.0, "driver": _spent(psutil.Process()), "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            ours = backend == "processes" or process.cmdline()[0].startswith(WORKER)
            spent["worker" if ours else "ray"] += _spent(process)
        except (psutil.Error, IndexError):  # it has just ended
            continue
    return spent


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
