"""Shared by all tests: one thread, no hub, and a federation small enough to run in a second."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fedft.core import plugins
from fedft.core.quiet import quiet
from fedft.trackers import Tracker

quiet()

import pytest
import torch

torch.set_num_threads(1)

CLASSES = ("animal", "tool", "plant")
WORDS = {
    "animal": "fur tail paw bark claw wing",
    "tool": "steel handle blade cut drill grip",
    "plant": "leaf root seed bloom stem green",
}
COMMON = "the a of with small large old that has"


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clients keep ledgers under the user's state folder: not under that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def own_trust() -> Iterator[None]:
    """A command that runs in this process says whom it trusts for that command only."""
    before = plugins.trusted(None)
    yield
    plugins.trust_process(before)


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """A fresh interpreter that forks; what it was warmed with by one test, the next one finds."""
    from tests.forks import Forks

    host = Forks()
    yield host
    host.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block BERT with random weights and a word-level tokenizer, as a local folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", *COMMON.split(), *" ".join(WORDS.values()).split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=len(CLASSES),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(10)  # at the usual scale a random network is almost constant
        model.bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 labelled sentences that a linear model can tell apart, as JSONL."""
    rng = random.Random(0)
    lines: list[str] = []
    for i in range(240):
        label = CLASSES[i % len(CLASSES)]
        words = rng.sample(WORDS[label].split(), 2) + rng.sample(COMMON.split(), rng.randint(1, 5))
        rng.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path = tmp_path_factory.mktemp("tiny-data") / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_table(tiny_model: Path, tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """A configuration as a table: 8 clients, 4 a round, 4 rounds; tables given override its own."""

    def table(**changes: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model": {"source": str(tiny_model)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"source": str(tiny_data), "partition": {"kind": "dirichlet", "alpha": 1.0}},
            "fleet": {"clients": 8},
            "rounds": {"count": 4, "per-round": 4, "evaluate-every": 2},
            "training": {"batch-size": 4, "lr": 1e-2},
            "engine": {"backend": "inline", "cohort": 1},
        }
        for name, value in changes.items():
            base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
        return base

    return table


class StopAfter(Tracker):
    """Watches a run, and stops it in the round after so many."""

    def __init__(self, rounds: int) -> None:
        self._left = rounds

    def round(self, line: Any, replies: Any) -> None:
        self._left -= 1

    def __call__(self) -> bool:
        return self._left <= 0


@pytest.fixture
def stop_after() -> Callable[[int], StopAfter]:
    """``simulate(..., trackers=[stop], stop=stop)`` with ``stop = stop_after(rounds)``."""
    return StopAfter


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a server and its clients, in processes of their own, that end with the test."""
    from fedft.server.serve import Hosting
    from tests.server.stage import FAST, Stage, processes

    made: list[Stage] = []

    def make(config: Any, name: str = "stage", **options: Any) -> Stage:
        folder = tmp_path / name
        folder.mkdir()
        hosting = Hosting(**{"timing": FAST, **options})
        made.append(Stage(processes(), folder, config, hosting))
        return made[-1]

    yield make
    for one in made:
        one.close()
