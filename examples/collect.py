"""Turn finished runs into what an experiment commits: data, a table and its figures.

    python examples/collect.py runs/label-skew-0.5 -o examples/label-skew/results/alpha-0.5

writes ``results.json`` (configuration, versions, seeds, scores and bias of every round), ``table.md``,
and one SVG a figure of the comparison report.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fedft.report.compare_figures import of_comparison
from fedft.report.groups import group, metric_of
from fedft.report.records import Record, load
from fedft.report.tables import tabulate

_METERS = ("eval", "sites", "lag", "clock", "staleness", "privacy")


def run_data(record: Record) -> dict[str, Any]:
    """One run: what it was, and what it measured, without the per-layer detail."""
    rounds = [
        {
            "round": line["round"],
            "loss": line["train"]["loss"],
            "bias": {k: v for k, v in line["bias"].items() if k != "layers"},
            "bytes": line["bytes"],
            **{key: line[key] for key in _METERS if key in line},
        }
        for line in record.rounds
    ]
    summary = {k: v for k, v in (record.summary or {}).items() if k != "seconds"}
    return {
        "arm": record.arm,
        "strategy": record.strategy,
        "seed": record.seed,
        "summary": summary,
        "rounds": rounds,
    }


def collect(run_dirs: list[Path], output: Path) -> None:
    """Write the experiment's record into ``output``."""
    records, waiting = load(run_dirs)
    if waiting:
        raise SystemExit(f"unfinished: {', '.join(map(str, waiting))}")
    output.mkdir(parents=True, exist_ok=True)
    table = tabulate(records)
    first = records[0]
    environment: Any = first.environment
    data = {
        "config": first.config_text.replace(f"{Path.cwd()}/", ""),
        "environment": {
            k: environment[k] for k in ("python", "versions", "cpu") if k in environment
        },
        "rules": table.to_json(),
        "note": table.note(),
        "runs": [run_data(record) for record in records],
    }
    (output / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(f"{table.markdown()}\n\n{table.note()}\n", encoding="utf-8")
    for figure in of_comparison(group(records), metric_of(records)):
        (output / f"{figure.name}.svg").write_text(figure.wide or figure.svg, encoding="utf-8")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    arguments = parser.parse_args()
    collect(arguments.run_dirs, arguments.output)


if __name__ == "__main__":
    main()
