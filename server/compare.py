"""A grid of runs, one a rule and seed: what the rules differ in, and nothing else.

For one seed all rules see the same partition, the same initial adapter, the same cohorts and the
same batches, because all of these are functions of the seed. Cells that are finished are skipped,
unfinished ones are resumed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedft.core.errors import ConfigError
from fedft.core.files import write_file
from server.config import RunConfig, configured, differences, parse_toml
from server.run import Observer, Silent, open_grid, resolved, resume, simulate

PLAN = "compare.json"
"""In the folder of a comparison: its rules, its seeds and the configuration they share."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        strategy: name of the rule.
        seed: of the run.
        config: the whole configuration.
        path: its run directory.
    """

    strategy: str
    seed: int
    config: RunConfig
    path: Path

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()


def cells(
    config: RunConfig, strategies: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[Cell]:
    """The runs of a comparison, seed by seed.

    The rule that ``config`` itself names keeps its hyperparameters; the others have their defaults.

    Raises:
        ConfigError: an unknown rule, a rule that cannot take the fleet, or nothing to compare.
    """
    if not strategies or not seeds:
        raise ConfigError("a comparison needs at least one rule and one seed")
    for what, values in (("rule", strategies), ("seed", seeds)):
        if len(set(values)) != len(values):
            raise ConfigError(f"a {what} is named twice: {', '.join(map(str, values))}")
    result: list[Cell] = []
    for seed in seeds:
        for name in strategies:
            overrides: dict[str, Any] = {"seed": seed}
            if name != config.strategy.name:
                overrides["strategy"] = {"name": name}
            cell = resolved(configured(config, overrides))
            result.append(Cell(name, seed, cell, folder / f"{name}-seed{seed}"))
    return result


def compare(
    config: RunConfig,
    strategies: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    observer: Callable[[Cell], Observer] = lambda _: Silent(),
    stop: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Run every rule with every seed; returns the run directories, seed by seed.

    Args:
        config: what all runs share.
        strategies: names of the rules.
        seeds: of the runs.
        folder: of the comparison; an earlier one of the same configuration is continued, and may
            be given more rules and seeds.
        observer: makes the observer of a run.
        stop: is asked whether to stop.

    Raises:
        ConfigError: as for :func:`cells`, or ``folder`` holds a comparison of something else.
    """
    todo = cells(config, strategies, seeds, folder)
    _claim(config, folder)
    waiting = [cell for cell in todo if not cell.finished]
    if waiting:
        with open_grid(waiting[0].config) as grid:
            for cell in waiting:
                run = _resume_or_start(cell)
                run(observer=observer(cell), stop=stop, grid=grid)
    return [cell.path for cell in todo]


def _resume_or_start(cell: Cell) -> Callable[..., Any]:
    if (cell.path / "config.toml").exists():
        return lambda **options: resume(cell.path, changed=cell.config, **options)
    return lambda **options: simulate(cell.config, cell.path, **options)


def _claim(config: RunConfig, folder: Path) -> None:
    """Write down what is compared, or check that it is what was compared here before."""
    shared = resolved(configured(config, {"seed": 0}))
    plan = folder / PLAN
    if plan.exists():
        before = parse_toml(json.loads(plan.read_text(encoding="utf-8"))["config"], str(plan))
        if lines := list(_that_matter(before, shared)):
            raise ConfigError(
                f"{folder} compares another configuration:\n  " + "\n  ".join(lines),
                fix="Choose another --run-dir, or go on with the configuration of this one.",
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_file(plan, json.dumps({"config": shared.to_toml()}, indent=2).encode())


def _that_matter(before: RunConfig, now: RunConfig) -> Iterator[str]:
    free = ("[engine] workers:", "[engine] backend:")
    return (line for line in differences(before, now) if not line.startswith(free))
