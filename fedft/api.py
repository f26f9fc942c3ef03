"""The Python face: the same runs as the command line, as objects."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fedft.core.errors import ConfigError
from fedft.core.files import disk
from fedft.core.metrics import Declared, declared_in
from fedft.core.record.rundir import RunDir

if TYPE_CHECKING:
    from fedft.core.record.lines import RoundLine, Summary
    from fedft.core.types import Adapter
    from fedft.report.tables import Table
    from fedft.server.config import RunConfig
    from fedft.strategies import Strategy
    from fedft.trackers import Tracker

Which = int | Literal["best", "last"]
"""A round, or ``best`` by evaluation, or ``last``."""


@dataclass(frozen=True)
class ExportedAdapter:
    """One exported adapter: a folder that ``PeftModel.from_pretrained`` loads.

    Attributes:
        path: the folder.
        round: the round it is from.
        tokenizer: a folder with the tokenizer as the run used it; None where the run has none.
    """

    path: Path
    round: int
    tokenizer: Path | None = None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy it, with the tokenizer, to another folder, which must not exist or be empty."""
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is a file, not a folder", fix="Choose another folder.")
        with disk(f"write {target}"):
            if target.exists() and any(target.iterdir()):
                raise ConfigError(f"{target} is not empty", fix="Choose another folder.")
            if self.tokenizer is not None:
                shutil.copytree(self.tokenizer, target, dirs_exist_ok=True)
            shutil.copytree(self.path, target, dirs_exist_ok=True)
        return target

    def factors(self) -> "Adapter":
        """Its tensors."""
        from fedft.core.adapters.files import load_adapter

        return load_adapter(self.path)


class Run:
    """A run directory, read-only.

    Args:
        path: of the directory.

    Raises:
        ConfigError: it is no run directory.
    """

    def __init__(self, path: str | Path) -> None:
        self._record = RunDir.open(Path(path))
        self.directory = self._record.path

    @property
    def rounds(self) -> "list[RoundLine]":
        """The lines of ``rounds.jsonl``."""
        return self._record.rounds()

    @property
    def metrics(self) -> "Summary":
        """``summary.json``: final and best scores, bytes, seconds; empty while unfinished."""
        return self._record.summary() or cast("Summary", {})

    @property
    def declared(self) -> tuple[Declared, ...]:
        """What the run is judged by; the first metric decides which round is the best."""
        return declared_in(self._record.environment())

    def adapter(self, which: Which = "best") -> ExportedAdapter:
        """An exported adapter.

        Raises:
            ConfigError: that round's adapter was not kept.
        """
        exported = self._record.exported()
        if not exported:
            raise ConfigError(
                f"{self.directory} has no adapter yet: no round was evaluated",
                fix=f"Go on with the run: fedft resume {self.directory}",
            )
        round_ = exported[-1] if which == "last" else self._best() if which == "best" else which
        if round_ not in exported:
            raise ConfigError(
                f"the adapter of round {round_} was not kept; there are {exported}",
                fix="Set [rounds] keep-adapters = true to keep the adapter of every evaluation.",
            )
        own = self._record.tokenizer
        return ExportedAdapter(self._record.adapter(round_), round_, own if own.is_dir() else None)

    def _best(self) -> int:
        best = self.metrics.get("best")
        if best:
            return int(best["round"])
        scored = [r for r in self.rounds if "eval" in r]
        first = next(d for d in self.declared if d.name in scored[0]["eval"])
        top = scored[0]
        for line in scored[1:]:
            if first.better(line["eval"], top["eval"]):
                top = line
        return int(top["round"])

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"


def simulate(
    config: "str | Path | RunConfig",
    *,
    run_dir: str | Path | None = None,
    strategy: "str | Strategy | None" = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    trackers: "Sequence[Tracker]" = (),
) -> Run:
    """Run a federation on this machine.

    Args:
        config: a TOML file, or a validated configuration.
        run_dir: an absent or empty folder; None makes ``runs/<time>-<strategy>``.
        strategy: the aggregation rule in place of the configuration's: its name, or an object.
        seed: in place of the configuration's.
        settings: further overrides by dotted key, such as ``{"training.lr": 1e-3}``.
        trackers: are told of the run as it goes on, see :class:`fedft.trackers.Tracker`.

    Raises:
        FedftError: see :mod:`fedft.core.errors`.
    """
    from fedft.server import run

    parsed = _config(config, strategy, seed, settings or {})
    folder = None if run_dir is None else Path(run_dir)
    return Run(run.simulate(parsed, folder, trackers=trackers).path)


@dataclass(frozen=True)
class Comparison:
    """Runs of several rules, or arms, over several seeds.

    Attributes:
        directory: folder of the comparison.
        runs: one an arm and seed.
    """

    directory: Path
    runs: tuple[Run, ...]

    def table(self, confidence: float | None = None) -> "Table":
        """Means, confidence intervals and paired differences to FedAvg-LoRA, or the first arm."""
        from fedft.report.tables import summarise

        return summarise([run.directory for run in self.runs], confidence)

    def to_html(self, output: str | Path, confidence: float | None = None) -> Path:
        """Write the report: one self-contained page."""
        from fedft.report import write_report

        write_report([run.directory for run in self.runs], Path(output), confidence)
        return Path(output)


def compare(
    config: "str | Path | RunConfig",
    *,
    strategies: "Sequence[str | Strategy]" = (),
    arms: str | Path | None = None,
    seeds: Iterable[int],
    run_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
    allow: Iterable[object] = (),
) -> Comparison:
    """Run several rules, or arms, over several seeds, on the same partitions, cohorts and batches.

    Finished runs in ``run_dir`` are kept, unfinished ones resumed.

    Args:
        config: a TOML file, or a validated configuration.
        strategies: the rules: names, or objects.
        arms: a TOML file with a table of settings for each arm, in place of ``strategies``.
        seeds: one run an arm and seed.
        run_dir: folder of the comparison.
        settings: overrides by dotted key.
        allow: as for :func:`resume`, where ``run_dir`` holds runs already.

    Raises:
        FedftError: see :mod:`fedft.core.errors`.
    """
    from fedft.server import compare
    from fedft.server.config_file import configured, repeated

    rules = list(strategies) if arms is None else []
    parsed = configured(config, settings or {}, rules)
    folder = Path(run_dir)
    sides = compare.rules(parsed, rules) if arms is None else compare.read_arms(Path(arms))
    paths = compare.compare(parsed, sides, list(seeds), folder, trust=repeated((), allow))
    return Comparison(folder, tuple(Run(path) for path in paths))


def resume(
    run_dir: str | Path,
    *,
    trackers: "Sequence[Tracker]" = (),
    allow: Iterable[object] = (),
) -> Run:
    """Go on with an unfinished run; the end is the same, byte for byte, as without the pause.

    Args:
        run_dir: its directory.
        trackers: are told of the run as it goes on, see :class:`fedft.trackers.Tracker`.
        allow: code from outside of fedft that the run may use: ``package.module:Class`` names, or
            the classes themselves. A run directory alone is no reason to import anything.

    Raises:
        FedftError: see :mod:`fedft.core.errors`.
    """
    from fedft.server import run
    from fedft.server.config_file import repeated

    return Run(run.resume(Path(run_dir), trackers=trackers, trust=repeated((), allow)).path)


def model_folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a pretrained model, for ``from_pretrained`` of stock transformers.

    Args:
        source: as ``[model] source``: ``wheel:PACKAGE``, a folder, or a hub id.
        revision: of a hub id.

    Raises:
        MismatchError: it is not there.
    """
    from fedft.core.models import resolve
    from fedft.core.spec import ModelSpec

    return resolve(ModelSpec(source=source, revision=revision))


def _config(
    config: "str | Path | RunConfig",
    strategy: "str | Strategy | None",
    seed: int | None,
    settings: Mapping[str, Any],
) -> "RunConfig":
    from fedft.server.config_file import configured

    overrides = {**settings}
    if seed is not None:
        overrides["seed"] = seed
    if strategy is not None:
        overrides["strategy"] = {"name": strategy} if isinstance(strategy, str) else strategy
    return configured(config, overrides)
