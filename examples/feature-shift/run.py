"""Runs the experiment and tells the accuracy by drawing style, as LoRA-FAIR's table does.

    python examples/feature-shift/run.py --run-dir runs/feature-shift -o examples/feature-shift/results

Interrupted, it goes on where it was. Each part of the grid is a ``fedft compare`` that can be
called by hand; what is added here is the test of every last adapter on each style by itself.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from fedft.api import Run
from fedft.clients.engines.cohort import CohortEngine
from fedft.core.data.batches import eval_batches
from fedft.core.data.source import Data, prepare
from fedft.core.errors import FedftError, IntegrityError, MismatchError
from fedft.core.models import input_encoder, load_base, resolve
from fedft.core.quiet import quiet
from fedft.core.record.rundir import RunDir
from fedft.report.formats import spread
from fedft.report.statistics import Interval, interval, paired
from fedft.server.config import RunConfig
from fedft.server.config_file import load_config
from fedft.server.resolve import concrete

CONFIG = Path(__file__).resolve().parent / "config.toml"
BASELINE = "fedavg-lora"
Scores = Mapping[str, float]
"""Style → accuracy."""


@dataclass(frozen=True)
class Part:
    """A ``fedft compare`` of the experiment.

    Attributes:
        folder: of the comparison, in the folder of the experiment.
        rules: rule → its row of the table.
        settings: what differs from the configuration.
    """

    folder: str
    rules: Mapping[str, str]
    settings: Sequence[str] = field(default=())


PARTS = (
    Part(
        "rules",
        {
            "ffa-lora": "FFA-LoRA",
            "fedavg-lora": "FedAvg-LoRA (FedIT)",
            "flora": "FLoRA",
            "flexlora": "FlexLoRA",
            "lora-fair": "LoRA-FAIR, ridge",
        },
    ),
    Part(
        "cosine",  # the objective that the paper states; the default is the closed form
        {"lora-fair": "LoRA-FAIR, cosine"},
        ['strategy={name = "lora-fair", objective = "cosine"}'],
    ),
    # One site holds everything: the same epochs over the same images, so as many gradient steps as
    # the four sites take together.
    Part(
        "centralised",
        {"fedavg-lora": "Centralised LoRA"},
        [
            "fleet.clients=1",
            "rounds.per-round=1",
            "rounds.quorum=1",
            'data.partition={kind = "iid"}',
        ],
    ),
)


def main() -> int:
    """Run what is missing, test by style, write and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path, help="for per-style.json and per-style.md")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for every run")
    options = parser.parse_args()
    quiet()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for part in PARTS:
        if code := compare(part, options.run_dir, options.seeds, options.set):
            return code
    try:
        results = by_style(options.run_dir, seeds)
    except FedftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    text = markdown(results)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "per-style.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "per-style.md").write_text(text + "\n")
    print(text)
    return 0


def compare(part: Part, folder: Path, seeds: str, settings: Sequence[str]) -> int:
    """One part of the grid; returns the exit code of the command."""
    command = [sys.executable, "-m", "fedft", "compare", str(CONFIG)]
    command += ["--run-dir", str(folder / part.folder), "--seeds", seeds]
    command += ["--strategies", ",".join(part.rules)]
    for setting in (*part.settings, *settings):
        command += ["--set", setting]
    return subprocess.run(command, check=False).returncode


def by_style(folder: Path, seeds: Sequence[int]) -> dict[str, dict[int, Scores]]:
    """Row of the table → seed → style → accuracy of the last round's adapter."""
    cache = folder / "per-style.json"
    known: dict[str, Scores] = json.loads(cache.read_text()) if cache.exists() else {}
    tester: Tester | None = None
    results: dict[str, dict[int, Scores]] = {}
    for part in PARTS:
        for rule, row in part.rules.items():
            for seed in seeds:
                path = folder / part.folder / f"{rule}-seed{seed}"
                run = Run(path)
                key = run.metrics["adapter_sha256"]
                if key not in known:
                    tester = tester or Tester(load_config(path / "config.toml"))
                    print(f"testing {part.folder}/{path.name} by style …", flush=True)
                    known[key] = tester.test(run)
                    cache.write_text(json.dumps(known, indent=1))
                results.setdefault(row, {})[seed] = known[key]
    return results


class Tester:
    """Scores adapters on the test images of each style.

    Args:
        config: of any of the runs: they share model and data.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(1)  # more are slower on batches this small
        self.data = test_data(config)
        styles = np.array(self.data.owners)
        self.rows = {str(style): np.flatnonzero(styles == style) for style in np.unique(styles)}
        precision = concrete(config.engine.precision)
        base = load_base(config.model, config.lora, len(self.data.classes), precision=precision)
        self.engine = CohortEngine(base, config.lora)

    def test(self, run: Run) -> Scores:
        """Accuracy by style of the last round's adapter.

        Raises:
            MismatchError: the run was trained on other classes.
            IntegrityError: the mean is not the accuracy that the run recorded.
        """
        classes = RunDir.open(run.directory).environment()["classes"]
        if tuple(classes) != self.data.classes:
            raise MismatchError(f"{run.directory} was trained on the classes {classes}")
        adapter = run.adapter("last").factors()
        correct: dict[str, int] = {}
        for style, rows in self.rows.items():
            batches = eval_batches(self.data.train, rows, 64)
            found = self.engine.evaluate(adapter, {}, batches).sums["correct"]
            assert isinstance(found, int)
            correct[style] = found
        recorded = run.metrics["final"]["accuracy"]
        # Sums go in another order here: a few images of a thousand may turn, no more.
        if abs(sum(correct.values()) / len(self.data.train) - recorded) > 0.005:
            raise IntegrityError(
                f"{run.directory}: {correct} correct by style, but the run recorded {recorded:.4f}",
                fix="Prepare the data and the model again as they were for the run.",
            )
        return {style: n / len(self.rows[style]) for style, n in correct.items()}


def test_data(config: RunConfig) -> Data:
    """The central test set, with the style of each row as its owner."""
    spec = config.data.model_copy(
        update={
            "source": config.data.test_source,
            "test_source": None,
            "test_fraction": 0.0,
            "partition": config.data.partition.model_copy(update={"column": "style"}),
        }
    )
    encoder = input_encoder(config.model, resolve(config.model))
    return prepare(spec, config.model.task, encoder)


def markdown(results: Mapping[str, Mapping[int, Scores]]) -> str:
    """The table: a column a style, their average, and its difference to the baseline by seed."""
    baseline = PARTS[0].rules[BASELINE]
    styles = list(next(iter(results[baseline].values())))
    averages = {
        row: {seed: mean(scores.values()) for seed, scores in of_row.items()}
        for row, of_row in results.items()
    }
    lines = [["Rule", *styles, "average", "Δ to FedAvg-LoRA"]]
    for row, of_row in results.items():
        columns = [interval([scores[style] for scores in of_row.values()]) for style in styles]
        cells = [*columns, interval(list(averages[row].values()))]
        gain = None if row == baseline else paired(averages[row], averages[baseline])
        lines.append([row, *map(_plain, cells[:-1]), _both(cells[-1]), _both(gain, signed=True)])
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    count = len(averages[baseline])
    return (
        f"{table}\n\nAccuracy in percent after the last round, mean over {count} seeds; ± is half of "
        "the 95 % confidence interval (Student's t), differences are paired by seed."
    )


def _plain(value: Interval | None) -> str:
    return "—" if value is None else f"{100 * value.mean:.2f}"


def _both(value: Interval | None, signed: bool = False) -> str:
    return spread(value, percent=True, signed=signed)


if __name__ == "__main__":
    sys.exit(main())
