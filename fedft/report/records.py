"""Run directories as the report reads them: checked where it matters, forgiving where it can be.

The numbers come from clients that nobody vouches for: a value of the wrong type counts as absent (see
:mod:`fedft.core.record.fitting`), and text is shown only through :func:`clean`. What a kill leaves behind is
:class:`~fedft.core.record.rundir.RunDir`'s concern.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path

from fedft.core.errors import ConfigError, IntegrityError
from fedft.core.files import MIB, read_plain
from fedft.core.record.fitting import declared, fitted
from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.core.record.rundir import RunDir

Json = Mapping[str, object]

BASELINE = "fedavg-lora"
"""The rule that the others are compared with; where it is not there, the first arm of each comparison."""

_PLAN = "compare.json"

_DEPTH = 3
"""How far below a given folder run directories are looked for."""

# Escape sequences of a terminal; then everything that is not text: C0 and C1 controls, and the
# marks that reorder or hide what follows them.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)


def clean(value: object, limit: int = 200) -> str:
    """A value as plain printable text, cut at ``limit`` characters. Still to be escaped for HTML."""
    text = _INVISIBLE.sub("", _ANSI.sub("", str(value)))
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class Record:
    """One run, read from its directory.

    Attributes:
        path: of the run directory.
        config: the resolved configuration; ``config_text`` as it stands in the file.
        environment: versions and hashes; empty where none were recorded.
        rounds: one line a completed round, in order, each round once.
        clients: one line a reply; empty where none were recorded.
        summary: None while the run is unfinished.
        arms: names of the arms of the comparison that it belongs to, the first one first; empty
            where it belongs to none.
    """

    path: Path
    config: Json
    config_text: str
    environment: Json
    rounds: tuple[RoundLine, ...]
    clients: tuple[ClientLine, ...]
    summary: Summary | None
    arms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # What figures are drawn of is of its type from here on.
        object.__setattr__(self, "rounds", tuple(fitted(RoundLine, line) for line in self.rounds))
        object.__setattr__(self, "clients", tuple(fitted(ClientLine, x) for x in self.clients))

    @property
    def arm(self) -> str:
        """What the run is called in its comparison; elsewhere the name of its rule."""
        name = self.path.name.removesuffix(f"-seed{self.seed}")
        return name if name in self.arms else self.strategy

    @property
    def strategy(self) -> str:
        """Name of the aggregation rule."""
        return clean(lookup(self.config, "strategy", "name") or "unnamed", 60)

    @property
    def seed(self) -> int:
        """Of the run."""
        seed = self.config.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    def series(self, *keys: str) -> dict[int, float]:
        """Round → number, over the rounds that have it. ``series("eval", "accuracy")``

        Raises:
            KeyError: no line has such a key.
        """
        _check_declared(keys)
        found = {line["round"]: number(line, *keys) for line in self.rounds}
        return {round_: value for round_, value in found.items() if value is not None}

    def final(self, *keys: str) -> float | None:
        """The number of the last round that has it."""
        return next(reversed(self.series(*keys).values()), None)

    def mean(self, *keys: str) -> float | None:
        """The mean over the rounds that have it."""
        values = self.series(*keys).values()
        return sum(values) / len(values) if values else None

    def total(self, *keys: str) -> float:
        """The sum over the rounds; absent values count as zero."""
        return sum(self.series(*keys).values())

    def seconds(self) -> float | None:
        """Wall-clock time of the run, from the summary or else from its rounds' phases."""
        stated = number(self.summary or {}, "seconds")
        return self.total_seconds() if stated is None else stated

    def total_seconds(self) -> float | None:
        """Sum of all phases of all rounds."""
        values = [
            number(line["seconds"], key) or 0.0 for line in self.rounds for key in line["seconds"]
        ]
        return sum(values) if values else None


def read(path: Path) -> Record:
    """Read one run directory.

    Raises:
        ConfigError: it is not a run directory, or no round has been completed.
        IntegrityError: a file in it is damaged.
    """
    run = RunDir.open(path)
    text, config = _config(run)
    rounds = {line["round"]: line for line in run.rounds()}
    if not rounds:
        raise ConfigError(
            f"{path} holds no completed round yet",
            fix=f"Let the run complete a round, or continue it: fedft resume {path}",
        )
    return Record(
        path=path,
        config=config,
        config_text=text,
        environment=run.environment(),
        rounds=tuple(rounds[key] for key in sorted(rounds)),
        clients=tuple(run.clients()),
        summary=run.summary(),
        arms=_arms(path.resolve().parent / _PLAN),
    )


def _arms(plan: Path) -> tuple[str, ...]:
    try:
        found = mapping(json.loads(read_plain(plan, largest=16 * MIB))).get("arms")
    except (OSError, ValueError, RecursionError):
        return ()
    return tuple(clean(name, 60) for name in found) if isinstance(found, list) else ()


def _config(run: RunDir) -> tuple[str, Json]:
    try:
        text = run.config
        return text, tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise IntegrityError(
            f"{run.path / 'config.toml'} is damaged: {clean(error)}",
            fix="Restore it from a copy of the run directory.",
        ) from error


def load(paths: Sequence[Path]) -> tuple[list[Record], list[Path]]:
    """Read run directories and folders of them.

    Returns:
        The records by path, and the run directories below a folder that have not completed a round.

    Raises:
        ConfigError: a path does not exist, or there is no run to report on.
        IntegrityError: a run directory is damaged.
    """
    if not paths:
        raise ConfigError("no run directory was given", fix="Name at least one.")
    records, waiting = [], []
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist",
                fix="Check the spelling; relative paths start at the working directory.",
            )
        below = sorted(_below(path, _DEPTH)) if path.is_dir() else []
        children = [path] if _is_run(path) else below
        if not children:
            raise ConfigError(
                f"{path} is neither a run directory nor a folder of them: no config.toml in it",
                fix="Name the folder that `fedft simulate` or `fedft compare` printed.",
            )
        for child in children:
            if child == path or (child / "rounds.jsonl").exists():
                records.append(read(child))
            else:
                waiting.append(child)
    if not records:
        raise ConfigError(
            f"none of the {len(waiting)} runs in {paths[0]} has completed a round yet",
            fix="Wait for the first, or continue the comparison with the same command.",
        )
    unique = {record.path.resolve(): record for record in records}
    return list(unique.values()), waiting


def _is_run(path: Path) -> bool:
    names = ("rounds.jsonl", "summary.json", "environment.json")
    return (path / "config.toml").exists() and any((path / name).exists() for name in names)


def _below(path: Path, depth: int) -> Iterator[Path]:
    for child in sorted(path.iterdir()):
        if not child.is_dir() or child.is_symlink():
            continue
        if (child / "config.toml").exists():
            yield child
        elif depth > 1:
            yield from _below(child, depth - 1)


# ── values ────────────────────────────────────────────────────────────────────────────────────


def mapping(value: object) -> Json:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def lookup(data: Json, *keys: str) -> object:
    """A nested value, or None."""
    for key in keys[:-1]:
        data = mapping(data.get(key))
    return data.get(keys[-1])


@lru_cache(maxsize=256)
def _check_declared(keys: tuple[str, ...]) -> None:
    """A report asks for what lines have; a misspelt key would count as absent in every run."""
    if not declared(RoundLine, keys):
        raise KeyError(f"no line of rounds.jsonl has {'.'.join(keys)}")


def number(data: Json, *keys: str) -> float | None:
    """A nested finite number; None where it is absent or something else."""
    value = lookup(data, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if isfinite(found) else None


def flatten(data: Json, prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted key → value."""
    flat: dict[str, object] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
