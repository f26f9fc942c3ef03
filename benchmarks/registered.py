"""What a million registered clients cost over a hundred: start-up time, memory, and time a round.

Two processes do the same run, 10 clients a round on a tiny model in one process, and differ in the
number of registered clients only. Interleaved repeats, medians.

    python -m benchmarks.registered
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import save

REPEATS = 3
SIZES = (100, 1_000_000)
ROUNDS = 3


def one_run(clients: int) -> dict[str, float]:
    """In this process: a run of a few rounds; what it took."""
    from server.config import parse_config
    from server.run import simulate

    marks: dict[str, float] = {}

    class Watch:
        def started(self, *_: Any) -> None:
            marks["started"] = time.perf_counter()

        def completed(self, record: Any) -> None:
            marks["rounds"] = marks.get("rounds", 0.0) + sum(record["seconds"].values())

        def note(self, text: str) -> None:
            pass

    table = {
        "data": {"partition": {"kind": "bootstrap", "rows-per-client": 20}},
        "fleet": {"clients": clients},
        "rounds": {"count": ROUNDS, "per-round": 10, "evaluate-every": ROUNDS},
        "training": {"steps": 1, "batch-size": 2},
        "engine": {"backend": "inline", "cohort": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        simulate(parse_config(table), Path(folder) / "run", observer=Watch())
    return {
        "start_s": marks["started"] - begun,
        "round_s": marks["rounds"] / ROUNDS,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(clients: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.registered", str(clients)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for _ in range(REPEATS):
        for size in SIZES:
            runs[size].append(in_a_process(size))
    medians = {
        str(size): {k: statistics.median(r[k] for r in results) for k in results[0]}
        for size, results in runs.items()
    }
    few, many = (medians[str(size)] for size in SIZES)
    extra = {key: many[key] - few[key] for key in few}
    save(
        "registered",
        {"medians": medians, "extra": extra, "runs": {str(k): v for k, v in runs.items()}},
    )
    print(
        f"1,000,000 registered against 100: {extra['start_s']:+.2f} s at the start, "
        f"{extra['peak_mib']:+.0f} MiB, {1000 * extra['round_s']:+.0f} ms a round"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from fedft.core.quiet import quiet

        quiet()
        print(json.dumps(one_run(int(sys.argv[1]))))
    else:
        main()
