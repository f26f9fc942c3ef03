"""The Flower ``ServerApp`` of fedft: the same run as ``fedft simulate``, on Flower's own grid.

``flwr run .`` sends a bundle with configurations only. The code that runs is the fedft that is
installed where the SuperLink and the SuperNodes are, so nothing that travels is executed.

The server scores the global model itself: Flower starts a process for each message, and slices of
a test set that the server holds anyway are not worth one each.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from flwr.app import Context, UserConfigValue
from flwr.serverapp import Grid, ServerApp

from fedft.core.errors import MismatchError
from fedft.core.plugins import RECORD
from fedft.core.record.lines import ClientLine, RoundLine
from fedft.server.config import RunConfig, check_real
from fedft.server.config_file import configured, load_config, parse_config
from fedft.server.grids.inline import InlineGrid
from fedft.server.grids.superlink import SuperLinkGrid
from fedft.server.run import simulate
from fedft.server.setting import CLIENT_APP
from fedft.strategies.beside import first_plan
from fedft.trackers import Start, Tracker

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run.

    Run config: ``config``, a TOML file of the bundle or an absolute path; ``set``, overrides as
    ``KEY=VALUE`` with spaces between them; ``run-dir``, empty for ``runs/<time>-<strategy>`` in
    the working directory of the SuperLink.

    Raises:
        FedftError: see :mod:`fedft.core.errors`. Committed rounds are never lost.
    """
    _check_version(grid.run.fab_version)
    config = configuration(context.run_config)
    torch.set_num_threads(config.engine.threads)
    run_dir = str(context.run_config["run-dir"])
    with InlineGrid(CLIENT_APP, config.rounds.per_round) as evaluator:
        simulate(
            config,
            Path(run_dir) if run_dir else None,
            trackers=[Lines()],
            grid=SuperLinkGrid(grid, config.fleet.clients),
            evaluator=evaluator,
        )


def configuration(settings: Mapping[str, UserConfigValue]) -> RunConfig:
    """The run that a run config asks for. Flower serves sites one by one: ``cohort`` is 1.

    A rule from outside of fedft is one of a package that is installed here, by its plain name: a
    bundle's ``module:Class`` is not imported.

    Raises:
        ConfigError: see :func:`fedft.server.config_file.load_config`.
    """
    config = load_config(
        _bundled(str(settings["config"])), str(settings["set"]).split(), trust=RECORD
    )
    check_real(config)
    return configured(config, {"engine.cohort": 1}, trust=RECORD)


def _bundled(name: str) -> Path:
    """A file of the bundle, whose folder Flower puts on the import path."""
    candidates = (Path(folder) / name for folder in sys.path)
    return next((path for path in candidates if path.is_file()), Path(name))


def _check_version(bundle: str) -> None:
    installed = version("fedft")
    if bundle != installed:
        raise MismatchError(
            f"the bundle is of fedft {bundle}, and fedft {installed} is installed at the server",
            fix="Install the same version on both sides; the bundle carries no code.",
        )


class Lines(Tracker):
    """Prints a line for each round, which ``flwr run --stream`` and ``flwr log`` show."""

    def started(self, start: Start) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        config = parse_config(start.config)
        print(f"fedft: {config.rounds.count} rounds of {config.strategy.name} → {start.run}")
        terms = first_plan(config.strategy).terms
        kept = config.strategy.personal.union(*(term.keeps for term in terms))
        if parts := ", ".join(sorted(kept)):
            self.note(f"clients keep {parts} in Flower's nodes; fedft resume would begin them anew")

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        failed = sum(map(len, line["failures"].values()))
        scores = {"train loss": line["train"]["loss"], **line.get("eval", {})}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in scores.items() if v is not None)
        lost = f"  ({failed} clients failed)" if failed else ""
        print(f"fedft: round {line['round']}  {shown}{lost}", flush=True)

    def note(self, text: str) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        print(f"fedft: {text}", flush=True)
