"""All benchmarks, one after another, then the page and the targets.

    python -m benchmarks [--full] [--resume] [--only cohort engines]

Quick is about a quarter of an hour on two idle cores, full about three hours. What is on disk stays when
it is interrupted; ``--resume`` goes on from there. Each benchmark has a command of its own as well.
"""

import argparse
import subprocess
import sys

SECTIONED = ("cohort", "engines", "federation", "registered", "tasks")
FULL = (*SECTIONED, "aggregation", "overhead", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole grids")
    parser.add_argument("--resume", action="store_true", help="leave out what is measured already")
    parser.add_argument("--only", nargs="+", choices=FULL, help="these benchmarks")
    arguments = parser.parse_args()
    passed_on = [f"--{name}" for name in ("full", "resume") if getattr(arguments, name)]
    for name in arguments.only or (FULL if arguments.full else SECTIONED):
        print(f"═══ {name}", flush=True)
        run(name, *(passed_on if name in SECTIONED else ()))
    run("page")
    run("targets")


def run(name: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)


if __name__ == "__main__":
    main()
