"""A grid of runs, one an arm and seed: what the arms differ in, and nothing else.

An arm is most often an aggregation rule; it can be any set of changes to the configuration. For
one seed all arms see the same partition, the same initial adapter, the same cohorts and the same
batches, because all of these are functions of the seed (unless an arm changes just that). Cells
that are finished are skipped, unfinished ones are resumed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedft.core.errors import ConfigError, IntegrityError, MismatchError, SecurityRefusal
from fedft.core.files import MIB, disk, read_plain, write_file
from fedft.core.plugins import RECORD, Trust, short_name
from fedft.core.toml import read_toml
from fedft.server.config import RunConfig
from fedft.server.config_file import configured, differences, parse_toml
from fedft.server.resolve import resolved
from fedft.server.run import resume, simulate
from fedft.server.setting import open_grid
from fedft.strategies import Strategy
from fedft.trackers import Tracker

PLAN = "compare.json"
"""In the folder of a comparison: the configuration that its arms share, and the named arms."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,59}")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: its label, and the beginning of its run directories' names.
        settings: overrides by dotted key, as :func:`~fedft.server.config_file.configured` takes them.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        arm: name of the arm.
        seed: of the run.
        config: the whole configuration.
        path: its run directory.
    """

    arm: str
    seed: int
    config: RunConfig
    path: Path

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()


def rules(config: RunConfig, names: Sequence[str | Strategy]) -> list[Arm]:
    """An arm for each aggregation rule.

    The rule that ``config`` itself names keeps its hyperparameters; the others have their defaults.
    A rule from Python has its own. What is named ``package.module:Class`` is called ``Class``.
    """

    def arm(rule: str | Strategy) -> Arm:
        if isinstance(rule, Strategy):
            named = configured(config, {"strategy": rule}).strategy
            return Arm(short_name(named.name), {"strategy": named})
        own = rule == config.strategy.name
        return Arm(short_name(rule), {} if own else {"strategy": {"name": rule}})

    return [arm(rule) for rule in names]


def read_arms(path: Path) -> list[Arm]:
    """The arms of a TOML file: one table an arm, each a part of a configuration.

    The first arm is what the others are compared with. ::

        [synchronous]
        [impatient]
        rounds.deadline-s = 60
        strategy = { name = "lora-fair", ridge = 0.1 }

    Raises:
        ConfigError: the file cannot be read, or a name cannot name a folder.
    """
    tables = read_toml(path)
    for name, table in tables.items():
        if not _NAME.fullmatch(name) or not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name!r} is no arm",
                fix="An arm is a table of settings, named by small letters, digits, '.', '_', '-'.",
            )
    return [Arm(name, _dotted(table)) for name, table in tables.items()]


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key → value. A rule is one value: another has other keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        whole = prefix + key == "strategy" and isinstance(value, dict) and "name" in value
        if isinstance(value, dict) and not whole:
            flat |= _dotted(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def cells(config: RunConfig, arms: Sequence[Arm], seeds: Sequence[int], folder: Path) -> list[Cell]:
    """The runs of a comparison, seed by seed.

    Raises:
        ConfigError: an arm cannot be run, or there is nothing to compare.
    """
    if not arms or not seeds:
        raise ConfigError(
            "a comparison needs at least one rule or arm, and one seed",
            fix="Name them with --strategies or --arms, and --seeds.",
        )
    for what, values in (("rule", [arm.name for arm in arms]), ("seed", seeds)):
        if len(set(values)) != len(values):
            raise ConfigError(
                f"a {what} is named twice: {', '.join(map(str, values))}", fix="Name each one once."
            )
    return [
        Cell(
            arm.name,
            seed,
            resolved(configured(config, {**arm.settings, "seed": seed})),
            folder / f"{arm.name}-seed{seed}",
        )
        for seed in seeds
        for arm in arms
    ]


def compare(
    config: RunConfig,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: Path,
    *,
    trackers: Callable[[Cell], Sequence[Tracker]] = lambda _: (),
    stop: Callable[[], bool] = lambda: False,
    trust: Trust = RECORD,
) -> list[Path]:
    """Run every arm with every seed; returns the run directories, seed by seed.

    Args:
        config: what all runs share.
        arms: of :func:`rules` or :func:`read_arms`.
        seeds: of the runs.
        folder: of the comparison; an earlier one of the same configuration is continued, and may
            be given more arms and seeds.
        trackers: makes those that a run is told to.
        stop: is asked whether to stop.
        trust: what may be imported because ``folder`` names it.

    Raises:
        ConfigError: as for :func:`cells`, or ``folder`` holds a comparison of something else.
    """
    todo = cells(config, arms, seeds, folder)
    with _claimed(config, arms, folder, trust):
        waiting = [cell for cell in todo if not cell.finished]
        if waiting:
            with open_grid(waiting[0].config) as grid:
                for cell in waiting:
                    run = _resume_or_start(cell, trust)
                    run(trackers=trackers(cell), stop=stop, grid=grid)
    return [cell.path for cell in todo]


def _resume_or_start(cell: Cell, trust: Trust) -> Callable[..., Any]:
    if (cell.path / "config.toml").exists():
        return lambda **options: resume(cell.path, changed=cell.config, trust=trust, **options)
    return lambda **options: simulate(cell.config, cell.path, **options)


@contextmanager
def _claimed(config: RunConfig, arms: Sequence[Arm], folder: Path, trust: Trust) -> Iterator[None]:
    """Hold a folder for a comparison; one of which no run could start leaves nothing behind."""
    made = not folder.exists()
    _claim(config, arms, folder, trust)
    try:
        yield
    except (ConfigError, MismatchError, SecurityRefusal):
        if not _started(folder):
            with disk(f"remove {folder / PLAN}"):
                (folder / PLAN).unlink()
                if made:
                    folder.rmdir()
        raise


def _started(folder: Path) -> bool:
    """Whether any run of a comparison is there."""
    return any(folder.glob("*/config.toml"))


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(read_plain(path, largest=16 * MIB))
        if isinstance(plan, dict) and {"config", "arms"} <= plan.keys():
            return cast(dict[str, Any], plan)
    except (OSError, ValueError, RecursionError):
        pass
    raise IntegrityError(
        f"{path} is damaged: it does not say what is compared here",
        fix="Restore it from a copy, or choose another --run-dir.",
    )


def _claim(config: RunConfig, arms: Sequence[Arm], folder: Path, trust: Trust) -> None:
    """Write down what is compared, or check that it is what was compared here before."""
    shared = resolved(configured(config, {"seed": 0}))
    plan = folder / PLAN
    known: list[str] = []
    if plan.exists() and _started(folder):
        before = _read_plan(plan)
        if lines := list(_that_matter(parse_toml(before["config"], str(plan), trust), shared)):
            raise ConfigError(
                f"{folder} compares another configuration:\n  " + "\n  ".join(lines),
                fix="Choose another --run-dir, or go on with the configuration of this one.",
            )
        known = before.get("arms", [])
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder", fix="Choose another folder.")
    with disk(f"create {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*known, *(arm.name for arm in arms)]))
    record = {"config": shared.to_toml(), "arms": names}
    write_file(plan, json.dumps(record, indent=2).encode())


def _that_matter(before: RunConfig, now: RunConfig) -> Iterator[str]:
    free = ("[engine] workers:", "[engine] backend:", "[track] ")
    return (line for line in differences(before, now) if not line.startswith(free))
