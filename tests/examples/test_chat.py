"""The example of conversations, as its README says: better than the model as it comes, and than counting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedft.api import Run
from fedft.clients.engines.cohort import CohortEngine
from fedft.core.data.batches import eval_batches
from fedft.core.data.source import Data, prepare
from fedft.core.examples import TokenExamples
from fedft.core.models import initial_adapter, input_encoder, load_base, resolve
from fedft.core.types import IGNORED
from fedft.server.config import RunConfig
from fedft.server.config_file import load_config

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tasks" / "chat"


def _learnt(examples: Any) -> Any:
    """The tokens that take a loss."""
    assert isinstance(examples, TokenExamples) and examples.token_labels is not None
    return examples.ids[examples.token_labels != IGNORED]


def by_counting(data: Data, words: int) -> float:
    """Perplexity of drawing each token as often as training has it, each word once more than that."""
    counts = np.bincount(_learnt(data.train), minlength=words) + 1
    shares = counts / counts.sum()
    return float(np.exp(-np.log(shares[_learnt(data.test)]).mean()))


def untrained(config: RunConfig, data: Data) -> float:
    """Perplexity of the model as it comes."""
    base = load_base(config.model, config.lora, 0)
    start = initial_adapter(base.shapes, config.lora, config.lora.rank, 0)
    batches = eval_batches(data.test, np.arange(len(data.test)), 8)
    tally = CohortEngine(base, config.lora).evaluate(start, {}, batches)
    return float(np.exp(tally.loss_sum / tally.count))


def test_it_is_a_configuration_of_packed_conversations() -> None:
    config = load_config(FOLDER / "config.toml")
    assert config.model.task == "causal-lm" and config.data.packing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_beats_the_untrained_model_and_counting(tmp_path: Path) -> None:
    own = tmp_path / "examples" / "tasks" / "chat"
    shutil.copytree(FOLDER, own)
    for command in (
        [str(own / "prepare.py")],
        ["-m", "fedft", "simulate", str(own / "config.toml"), "--run-dir", str(tmp_path / "run")],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    score = Run(tmp_path / "run").metrics["best"]["perplexity"]
    config, before = load_config(own / "config.toml"), Path.cwd()
    os.chdir(tmp_path)
    try:
        encoder = input_encoder(config.model, resolve(config.model))
        data = prepare(config.data, config.model.task, encoder, seed=config.seed)
    finally:
        os.chdir(before)
    trivial = {
        "by counting": by_counting(data, len(encoder.tokenizer)),
        "untrained": untrained(config, data),
    }
    print(json.dumps({"perplexity": score, **trivial}))
    assert score < min(trivial.values())
