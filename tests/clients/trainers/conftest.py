import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedft
from fedft.clients.engines.loop import LoopEngine
from fedft.clients.engines.trainer import TrainerEngine
from fedft.clients.own_rows import ClientRows
from fedft.clients.resident import Workbench, workbench
from fedft.core import models
from fedft.core.plugins import USER
from fedft.core.trainers import REGISTRY
from fedft.core.types import TrainPlan
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config

OWN = "tests.clients.trainers.own_trainers"
EXAMPLES = Path(__file__).parents[3] / "examples" / "trainer"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def reference(trainer: str) -> str:
    return trainer if ":" in trainer else f"{OWN}:{trainer}"


def configuration(table: dict[str, Any], trainer: Any) -> RunConfig:
    """A table with a trainer."""
    named = reference(trainer) if isinstance(trainer, str) else trainer
    training = {**table.get("training", {}), "trainer": named}
    return parse_config({**table, "training": training}, trust=USER)


def federated(table: dict[str, Any], trainer: Any, folder: Path) -> fedft.Run:
    return fedft.simulate(configuration(table, trainer), run_dir=folder)


def client_lines(run: fedft.Run) -> list[dict[str, Any]]:
    text = (run.directory / "clients.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def still_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The small model without dropout: training it again gives the same losses."""
    folder = tmp_path / "still"
    shutil.copytree(tiny_model, folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of two blocks that knows eleven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    words = ["[PAD]", "[UNK]", "[END]", "user", "assistant", ":", "what", "is", "a", "blue", "red"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chat_table(
    tiny_table: Callable[..., dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> dict[str, Any]:
    """Questions whose right answer is the same for all, and what is not."""
    rows = tmp_path / "pairs.jsonl"
    with rows.open("w") as file:
        for i in range(80):
            said = {"question": "what is a " + "a " * (i % 5), "answer": "blue", "rejected": "red"}
            file.write(json.dumps(said) + "\n")
    columns = {"prompt": "question", "answer": "answer"}
    return tiny_table(
        model={"source": str(tiny_llama), "task": "causal-lm"},
        data={"source": str(rows), "partition": {"kind": "iid"}, "max-length": 32, **columns},
        fleet={"clients": 4},
        rounds={"count": 2, "per-round": 2, "evaluate-every": 2},
        lora={"rank": 4, "alpha": 8, "target-modules": ["q_proj", "v_proj"]},
    )


class Room:
    """A loaded task, and any trainer on it without a run around."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.config = parse_config(table)
        self.task = self.config.task(cohort=1)
        self.bench: Workbench = workbench(self.task.model_dump_json())
        self.rows = ClientRows(self.task, self.bench.data, self._rows_of)
        self.reloads = 0

    def _rows_of(self, client: str) -> Any:
        return self.bench.rows(self.bench.manifest.index_of(client))[0]

    def _reload(self) -> models.Base:
        self.reloads += 1
        classes = len(self.bench.data.classes)
        return models.load_base(self.task.model, self.task.lora, classes)

    @property
    def loop(self) -> LoopEngine:
        assert isinstance(self.bench.engine, LoopEngine)
        return self.bench.engine

    def engine(self, trainer: Any) -> TrainerEngine:
        name = REGISTRY.find(reference(trainer), USER).name
        return TrainerEngine(self.loop, name, self.rows, self._reload)

    def plan(self, **changes: Any) -> TrainPlan:
        start = self.bench.initial(changes.pop("rank", self.config.rank))
        about = {"training": self.config.training.local(), "site": "site-1", "round": 1}
        return replace(TrainPlan(start), **{**about, **changes})


@pytest.fixture
def room(tiny_table: Callable[..., dict[str, Any]]) -> Room:
    return Room(tiny_table())
