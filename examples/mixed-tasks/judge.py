"""How well each site's own model does on its own held-out rows, arm by arm and task by task.

    python examples/mixed-tasks/judge.py runs/mixed-tasks -o examples/mixed-tasks/results/judged.md

Some arms keep a router at every site, so there is no single model to score: a site is judged with
its own. Rows are arms; intervals are over seeds; differences to the first arm are paired by seed.
"""

import argparse
from pathlib import Path
from statistics import mean

from fedft.report.records import Record, load
from fedft.report.statistics import Interval, interval, paired
from fedft.server.checkpoints import Checkpoints
from fedft.strategies.hydralora import cluster_of

TASKS = ("glosses", "posts")


def accuracy(record: Record, task: str) -> float:
    """Mean over the sites of a task, at the last evaluation."""
    last = max(line["round"] for line in record.clients if line.get("kind") == "eval")
    return mean(
        line["accuracy"]
        for line in record.clients
        if line.get("kind") == "eval" and line["round"] == last and line["site"].startswith(task)
    )


def cosine(record: Record) -> float | None:
    """Mean cosine between the heads in use after the last round."""
    heads = record.rounds[-1].get("heads")
    return None if heads is None else heads["cosine"]


def purity(record: Record) -> float | None:
    """Share of the sites whose cluster is mostly of their own task, after the last round."""
    last = Checkpoints(record.path / "checkpoints").load()
    assert last is not None
    sites = {line["site"] for line in record.clients}
    clusters = {site: cluster_of(last.state, site) for site in sorted(sites)}
    if set(clusters.values()) <= {None}:
        return None
    members: dict[int | None, list[str]] = {}
    for site, cluster in clusters.items():
        members.setdefault(cluster, []).append(site.rsplit("-", 1)[0])
    largest = sum(max(map(own.count, TASKS)) for own in members.values())
    return largest / len(sites)


def shown(value: Interval | None, scale: float = 100.0, sign: str = "") -> str:
    """``mean ± half``, in points by default."""
    if value is None:
        return "—"
    half = "" if value.half is None else f" ± {scale * value.half:.3g}"
    return f"{scale * value.mean:{sign}.3g}{half}"


def table(records: list[Record]) -> str:
    """The whole comparison as a Markdown table."""
    arms = {record.arm: None for record in records}
    first = next((name for name in records[0].arms if name in arms), next(iter(arms)))
    scores = {
        arm: {
            record.seed: {task: accuracy(record, task) for task in TASKS}
            for record in records
            if record.arm == arm
        }
        for arm in [first, *(arm for arm in arms if arm != first)]
    }

    def both(arm: str) -> dict[int, float]:
        return {seed: mean(by_task.values()) for seed, by_task in scores[arm].items()}

    lines = [
        f"| arm | seeds | {' | '.join(TASKS)} | both, % | to {first}, points | cosine of heads | purity, % |",
        "|---|---|" + "---|" * (len(TASKS) + 4),
    ]
    for arm, runs in scores.items():
        by_task = [shown(interval([run[task] for run in runs.values()])) for task in TASKS]
        apart = [c for r in records if r.arm == arm and (c := cosine(r)) is not None]
        gap = "—" if arm == first else shown(paired(both(arm), both(first)), sign="+")
        cells = [arm, str(len(runs)), *by_task, shown(interval([*both(arm).values()])), gap]
        pure = [p for r in records if r.arm == arm and (p := purity(r)) is not None]
        cells += [shown(interval(apart), scale=1.0), shown(interval(pure))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the runs, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    records, waiting = load([asked.run_dir])
    if waiting:
        raise SystemExit(f"unfinished: {', '.join(map(str, waiting))}")
    asked.output.write_text(table(records), encoding="utf-8")
    print(table(records), end="")


if __name__ == "__main__":
    main()
