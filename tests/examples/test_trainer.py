"""examples/trainer: the same script alone and federated, with the commands of its README."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FOLDER = Path(__file__).parents[2] / "examples" / "trainer"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder, with its data."""
    folder = tmp_path_factory.mktemp("trainer")
    for file in FOLDER.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    run(folder, sys.executable, "prepare.py")
    return folder


def run(folder: Path, *command: str | Path) -> str:
    # Two threads that wait for each other on a busy machine take ten times as long as one.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def simulated(folder: Path, config: str, trainer: str) -> fedft.Run:
    target = folder / f"run-{trainer.partition(':')[0]}"
    settings = ["--set", f"training.trainer={trainer}", "--run-dir", target]
    run(folder, BIN / "fedft", "simulate", config, *settings)
    return fedft.Run(target)


def test_the_script_is_of_thirty_lines_and_its_function_knows_nothing_of_fedft() -> None:
    text = (FOLDER / "train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    imported = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("fedft" in ast.unparse(one) for one in imported)


@pytest.mark.parametrize("script", ["train", "dpo"])
def test_a_script_trains_alone_and_at_the_clients(here: Path, script: str) -> None:
    pytest.importorskip("trl")
    assert "training_loss=" in run(here, sys.executable, f"{script}.py")
    found = simulated(here, "config.toml", f"{script}:make_trainer")
    assert all(line["failures"] == {} for line in found.rounds)
    assert all(line["status"] == "ok" for line in _lines(found))
    assert found.metrics["rounds"] == 2
    if script == "train":  # preferences leave the likelihood of the answers alone, more or less
        assert found.metrics["final"]["perplexity"] < found.rounds[0]["start"]["perplexity"]


@pytest.mark.parametrize("script", ["classify", "with_lightning"])
def test_classifiers_beat_the_majority(here: Path, script: str) -> None:
    """12 classes of equal size: 8.3 % are right by chance."""
    pytest.importorskip("lightning")
    found = simulated(here, "classify.toml", f"{script}:make_trainer")
    assert all(line["failures"] == {} for line in found.rounds)
    assert found.metrics["final"]["accuracy"] > 1 / 12


def _lines(found: fedft.Run) -> list[dict[str, object]]:
    import json

    text = (found.directory / "clients.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
