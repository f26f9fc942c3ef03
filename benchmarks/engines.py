"""Whole engines on the same sites and the same cores: wall milliseconds a sample, steady rounds.

    python -m benchmarks.engines [--full] [--only "8 sites"] [--resume] [--repeats 2]

MiniLM, LoRA r = 8 on queries and values, WordNet definitions, 60 rows a site, one local epoch; two
worker processes of one thread each, but where it says otherwise. Every contender is a fresh process
that runs a first round, which does not count, and steady rounds at batch 8 and at batch 1;
contenders take turns.

* ``loops``: the plain PEFT loop of :mod:`fedft.clients.engines.loop`, twice at once, half of the sites each.
* ``flower``: Flower's simulation engine with a client as FlowerTune has it: it loads everything
  for every message and trains with the ``Trainer`` of transformers. ``lean`` trains with the plain
  loop; ``kept`` does so too, and keeps what it loads; ``bf16`` has a bfloat16 base and eager
  attention.
* ``fedft``: ``fedft simulate`` on Ray, with its default cohorts; ``forked`` with forked workers
  instead; ``one worker`` has all threads; ``K = 1`` is the plain loop under fedft's rounds.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.record import add_options, measure_sections
from benchmarks.turns import spread
from fedft.core.quiet import quiet
from fedft.core.record.lines import ClientLine, RoundLine
from fedft.core.spec import Precision, TaskSpec
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from fedft.server.setting import open_grid
from fedft.trackers import Tracker

ROWS, CLIENTS, THREADS = 60, 32, 2
SIZES = (8, 1)
SECTIONS = {"8 sites": 8, "20 sites": 20}
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Way:
    """One contender.

    Attributes:
        engine: whose rounds.
        precision: of the base.
        lean: of ``flower``: whether clients train with the plain loop.
        kept: of ``lean``: whether clients keep what they load.
        cohort: of ``fedft``.
        backend: of ``fedft``.
        workers: processes; they share the threads.
    """

    engine: Literal["loops", "flower", "fedft"]
    precision: Precision = "fp32"
    lean: bool = False
    kept: bool = False
    cohort: int | Literal["auto"] = "auto"
    backend: Literal["ray", "processes"] = "ray"
    workers: int = THREADS


WAYS = {
    "loops": Way("loops"),
    "loops, bf16": Way("loops", "bf16"),
    "flower": Way("flower"),
    "flower, lean": Way("flower", lean=True),
    "flower, kept": Way("flower", lean=True, kept=True),
    "flower, lean, bf16": Way("flower", "bf16", lean=True),
    "flower, kept, bf16": Way("flower", "bf16", lean=True, kept=True),
    "fedft, K = 1": Way("fedft", cohort=1),
    "fedft": Way("fedft"),
    "fedft, bf16": Way("fedft", "bf16"),
    "fedft, forked, bf16": Way("fedft", "bf16", backend="processes"),
    "fedft, one worker, bf16": Way("fedft", "bf16", backend="processes", workers=1),
}
PEERS = ("flower", "flower, lean", "flower, kept, bf16", "loops")
QUICK_WAYS = [
    "loops",
    "flower",
    "flower, lean",
    "flower, kept, bf16",
    "fedft",
    "fedft, bf16",
    "fedft, forked, bf16",
    "fedft, one worker, bf16",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=2, help="processes a contender")
    parser.add_argument("--rounds", type=int, default=1, help="steady rounds a process and batch")
    parser.add_argument(
        "--one", nargs=3, metavar=("WAY", "SITES", "ROUNDS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    quiet()
    if arguments.one:
        name, sites, rounds = arguments.one
        print(json.dumps(run_way(WAYS[name], int(sites), int(rounds))))
        return
    ways = list(WAYS) if arguments.full else QUICK_WAYS
    measure_sections(
        "engines",
        arguments,
        ["8 sites"],
        list(SECTIONS),
        lambda key: section(ways, SECTIONS[key], arguments.rounds, arguments.repeats),
    )


def section(ways: Sequence[str], sites: int, rounds: int, repeats: int) -> Mapping[str, Any]:
    measured: dict[str, dict[int, list[float]]] = {w: {size: [] for size in SIZES} for w in ways}
    for _ in range(repeats):
        for way in ways:
            for size, values in _in_a_process(way, sites, rounds).items():
                measured[way][size] += values
            print(
                f"  {way:20}{ {s: round(v[-1], 2) for s, v in measured[way].items()} }", flush=True
            )
    rows = [
        {"way": way, "batch": size, "ms_a_sample": spread(values)}
        for way, own in measured.items()
        for size, values in own.items()
    ]
    return {"sites": sites, "threads": THREADS, "rows_a_site": ROWS, "rows": over(rows)}


def over(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With how many times as fast as each peer: FlowerTune's client, tuned ones, two loops."""
    median = {(row["way"], row["batch"]): row["ms_a_sample"]["median"] for row in rows}
    peers = [way for way in PEERS if (way, 8) in median]
    for row in rows:
        mine = row["ms_a_sample"]["median"]
        row["over"] = {p: round(median[p, row["batch"]] / mine, 3) for p in peers}
    return rows


def _in_a_process(way: str, sites: int, rounds: int) -> dict[int, list[float]]:
    command = [sys.executable, "-m", "benchmarks.engines", "--one", way, str(sites), str(rounds)]
    # Ray would start Flower's actors at niceness 15; nobody here is to wait for the others.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-4000:]}")
    values: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return {int(size): own for size, own in values.items()}


# ------------------------------------------------------------------------- in its own process


def run_way(way: Way, sites: int, rounds: int) -> dict[int, list[float]]:
    """Wall milliseconds a sample of each steady round, by batch size."""
    run = {"loops": _loops, "flower": _flower, "fedft": _fedft}[way.engine]
    seconds = run(way, sites, rounds)
    return {size: [s / (sites * ROWS) * 1e3 for s in own] for size, own in seconds.items()}


def table(way: Way, sites: int, batch: int, rounds: int) -> dict[str, Any]:
    """The configuration, as of a TOML file."""
    return {
        # The test set is not what is measured; the rule wants one of some size.
        "data": {
            "test-fraction": 0.005,
            "partition": {"kind": "bootstrap", "rows-per-client": ROWS},
        },
        "fleet": {"clients": CLIENTS},
        "rounds": {"count": rounds, "per-round": sites, "evaluate-every": rounds},
        "training": {"batch-size": batch},
        "engine": {
            "backend": way.backend,
            "workers": way.workers,
            "threads": THREADS // way.workers,
            "cohort": way.cohort,
            "precision": way.precision,
        },
    }


def _task(way: Way) -> TaskSpec:
    return parse_config(table(way, 1, 1, 1)).task(precision=way.precision)


def _fedft(way: Way, sites: int, rounds: int) -> dict[int, list[float]]:
    # The last round is always evaluated, and the peers evaluate nothing: it does not count.
    configs = {size: parse_config(table(way, sites, size, rounds + 2)) for size in SIZES}
    seconds: dict[int, list[float]] = {}
    with open_grid(configs[SIZES[0]]) as grid, tempfile.TemporaryDirectory() as folder:
        for size, config in configs.items():
            watch = Watch()
            simulate(config, Path(folder) / str(size), trackers=[watch], grid=grid)
            seconds[size] = [b - a for a, b in pairwise(watch.marks)][:-1]
    return seconds


class Watch(Tracker):
    """Marks when rounds are committed, in monotonic seconds."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        self.marks.append(time.monotonic())


def _flower(way: Way, sites: int, rounds: int) -> dict[int, list[float]]:
    from benchmarks import flower_peer

    sizes = [SIZES[0], *SIZES * rounds]
    how = {"lean": way.lean, "cached": way.kept, "workers": way.workers}
    seconds = flower_peer.run(_task(way), sites, sizes, **how)
    return _by_size(sizes[1:], seconds[1:])


def _by_size(sizes: Sequence[int], seconds: Sequence[float]) -> dict[int, list[float]]:
    pairs = list(zip(sizes, seconds, strict=True))
    return {size: [s for own, s in pairs if own == size] for size in SIZES}


def _loops(way: Way, sites: int, rounds: int) -> dict[int, list[float]]:
    sizes = [SIZES[0], *SIZES * rounds]
    context = multiprocessing.get_context("spawn")
    barrier, marks = context.Barrier(way.workers), context.SimpleQueue()
    share = math.ceil(sites / way.workers)
    workers = [
        context.Process(
            target=_loop,
            args=(way, range(sites)[w * share : (w + 1) * share], sizes, barrier.wait, marks.put),
        )
        for w in range(way.workers)
    ]
    for worker in workers:
        worker.start()
    ends = [marks.get() for _ in workers]
    for worker in workers:
        worker.join()
    # A round begins when the last is ready for it and ends when the last has done its share.
    seconds = [max(w[i][1] for w in ends) - max(w[i][0] for w in ends) for i in range(len(sizes))]
    return _by_size(sizes[1:], seconds[1:])


def _loop(
    way: Way,
    mine: Sequence[int],
    sizes: Sequence[int],
    wait: Callable[[], Any],
    tell: Callable[[Any], Any],
) -> None:
    import torch

    from benchmarks.flower_peer import keep_bench
    from fedft.core.data.batches import batches
    from fedft.core.models import initial_adapter
    from fedft.core.seeds import torch_generator
    from fedft.core.types import LocalTraining, TrainPlan

    quiet()
    torch.set_num_threads(1)
    task = _task(way)
    bench_of = partial(keep_bench, task.model_dump_json())
    shapes = bench_of(mine[0]).engine.base.shapes
    start = initial_adapter(shapes, task.lora, task.lora.rank, task.seed)
    marks: list[tuple[float, float]] = []
    for number, size in enumerate(sizes):
        wait()
        begun = time.monotonic()
        for index in mine:
            bench = bench_of(index)
            every = torch.arange(len(bench.rows)).numpy()
            generator = torch_generator(task.seed, "peer", index, number + 1)
            own = list(batches(bench.rows, every, size, generator=generator))
            plan = TrainPlan(start=start, training=LocalTraining(batch_size=size), site=str(index))
            bench.engine.train([plan], [own])
        marks.append((begun, time.monotonic()))
    tell(marks)


if __name__ == "__main__":
    main()
