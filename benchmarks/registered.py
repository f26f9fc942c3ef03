"""What registered clients cost, and what a round costs: rounds of 10 to 1,000 out of up to 1e6.

    python -m benchmarks.registered [--full] [--only 100] [--resume] [--repeats 3]

A section is the number of clients a round. Fleets of a thousand and of a million take turns, each
run in a process of its own. Sites hold 20 rows and do one step of two, in one forked worker, so that
it is the federation that is seen: start-up, seconds a round after the first, and peak memory of the
driver. What is asked of it: a round costs O(cohort), never O(registered), and under a rule of the
mean, as here, the driver's memory does not grow with the cohort either.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.record import add_options, measure_sections
from benchmarks.turns import spread
from fedft.core.quiet import quiet
from fedft.core.record.lines import ClientLine, RoundLine
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from fedft.trackers import Start, Tracker

ROUNDS = 3
FLEETS = (1_000, 1_000_000)
QUICK = ["10"]
FULL = ["10", "100", "1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="processes a section")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.one:
        print(json.dumps(one_run(table(*arguments.one))))
        return
    measure_sections(
        "registered", arguments, QUICK, FULL, lambda key: section(key, arguments.repeats)
    )


def section(key: str, repeats: int) -> Mapping[str, Any]:
    runs: dict[int, list[dict[str, float]]] = {fleet: [] for fleet in FLEETS}
    for _ in range(repeats):
        for fleet in FLEETS:
            runs[fleet].append(_in_a_process(fleet, int(key)))
    result = {
        str(fleet): {name: spread([run[name] for run in own]) for name in own[0]}
        for fleet, own in runs.items()
    }
    for fleet, own in result.items():
        figures = ", ".join(f"{name} {value['median']:.2f}" for name, value in own.items())
        print(f"  {key} of {fleet}: {figures}", flush=True)
    return {"fleets": result}


def table(fleet: int, each: int) -> dict[str, Any]:
    """The configuration, as of a TOML file."""
    return {
        "data": {
            "test-fraction": 0.005,
            "partition": {"kind": "bootstrap", "rows-per-client": 20},
        },
        "fleet": {"clients": fleet},
        "rounds": {"count": ROUNDS, "per-round": each, "evaluate-every": ROUNDS},
        "training": {"steps": 1, "batch-size": 2},
        "engine": {"backend": "processes", "workers": 1},
    }


def one_run(settings: Mapping[str, Any]) -> dict[str, float]:
    """In this process: a run of a few rounds; what it took."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        simulate(parse_config(settings), Path(folder) / "run", trackers=[watch])
    return {
        "start_s": watch.marks[0] - begun,
        # The first round loads the model.
        "round_s": statistics.median(b - a for a, b in pairwise(watch.marks[1:])),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Watch(Tracker):
    """When the rounds began, and when each was committed."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def started(self, start: Start) -> None:
        self.marks.append(time.perf_counter())

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        self.marks.append(time.perf_counter())


def _in_a_process(fleet: int, each: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.registered", "--one", str(fleet), str(each)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
