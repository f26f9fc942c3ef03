"""Choose the best setting of every rule from a finished grid, as the arms of the comparison.

    python examples/drift/pick.py runs/drift-grid -o examples/drift/arms.toml

The best is the highest mean over the seeds of the final test accuracy.
"""

import argparse
import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import tomli_w

from fedft.report.records import load

GRID = Path(__file__).with_name("grid") / "arms.toml"


def scores(folder: Path) -> dict[str, float]:
    """Arm → its mean final accuracy."""
    found: dict[str, list[float]] = defaultdict(list)
    records, _ = load([folder])
    for record in records:
        if record.summary is not None and record.arm is not None:
            found[record.arm].append(record.summary["final"]["accuracy"])
    return {arm: mean(values) for arm, values in found.items()}


def best(grid: dict[str, dict[str, Any]], found: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Rule → the table of its best arm, in the order of the grid."""
    chosen: dict[str, str] = {}
    for arm, table in grid.items():
        rule = table["strategy"]["name"]
        if rule not in chosen or found[arm] > found[chosen[rule]]:
            chosen[rule] = arm
    return {rule: grid[arm] for rule, arm in chosen.items()}


def main() -> None:
    """Read the grid, say every arm's score, write the arms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="of the comparison of grid/arms.toml")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = scores(arguments.folder)
    for arm, value in found.items():
        print(f"{arm:24} {value:.4f}")
    chosen = best(tomllib.loads(GRID.read_text(encoding="utf-8")), found)
    head = "# Each rule at the best of grid/arms.toml, as pick.py writes it.\n"
    arguments.output.write_text(head + tomli_w.dumps(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
