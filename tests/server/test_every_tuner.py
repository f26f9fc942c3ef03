"""Every tuner of the installed peft: a run of it ends as stock peft loads it, or it is refused.

The tuners are those that peft lists, so that one it adds later is tried here without being named.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedft.core.adapters.tuners import TUNERS, canonical
from fedft.core.errors import ConfigError
from fedft.core.record.rundir import RunDir
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.run import parse_toml, simulate
from fedft.server.setting import prepare_run

Table = Callable[..., dict[str, Any]]
IDS = torch.arange(2, 14).reshape(2, 6)

PEFTS = sorted({canonical(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"lora"})
EVERY = ["lora with options", "dora", *PEFTS]

FITTING: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 24},
    "lora with options": {"rank_pattern": {"0.*(query|q_proj)": 2}},
    "road": {"group_size": 16},
    "unilora": {"theta_d_length": 64},
    "vblora": {"num_vectors": 16, "vector_length": 8, "topk": 2},
    "waveft": {"n_frequency": 24},
}
"""What has to be smaller than its default for layers of width 32."""

TASKS = {
    "classification": (("query", "value"), ("LayerNorm",), AutoModelForSequenceClassification),
    "causal-lm": (("q_proj", "v_proj"), ("input_layernorm",), AutoModelForCausalLM),
}
"""Task → linear layers to adapt, norms to adapt, the class that loads its model."""


@pytest.fixture(scope="session")
def tiny_decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama with random weights and the tokenizer of the tiny encoder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(10)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_questions(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled sentences as questions, whose answer is the label's first word."""
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    first = {"animal": "fur", "tool": "steel", "plant": "leaf"}
    path = tmp_path_factory.mktemp("tiny-questions") / "data.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": r["text"], "answer": first[r["label"]]}) + "\n" for r in rows
        ),
        encoding="utf-8",
    )
    return path


def table_of(
    name: str, task: str, tiny_table: Table, tiny_decoder: Path, tiny_questions: Path
) -> dict[str, Any]:
    """Two sites, two rounds, every site in each."""
    linear, norm, _ = TASKS[task]
    known = TUNERS.get(name)
    lora = {
        "method": "lora" if name == "lora with options" else name,
        "target-modules": norm if known is not None and known.layers == "norm" else linear,
        "options": FITTING.get(name, {}),
    }
    causal: dict[str, Any] = {
        "model": {"source": str(tiny_decoder), "task": task},
        "data": {"source": str(tiny_questions), "partition": {"kind": "iid"}},
    }
    return tiny_table(
        lora=lora,
        fleet={"clients": 2},
        rounds={"count": 2, "per-round": 2, "evaluate-every": 2},
        training={"steps": 3, "lr": 3e-2},
        **(causal if task == "causal-lm" else {}),
    )


def logits_of_run(run: RunDir, config: RunConfig) -> torch.Tensor:
    """What the run's own engine makes of its last state."""
    from fedft.clients.resident import workbench

    with RunDir.open(run.path, writing=True) as open_run:
        task = prepare_run(parse_toml(run.config, "run"), open_run).task
    engine = workbench(task.model_dump_json()).engine
    checkpoint = Checkpoints(run.checkpoints, keep=2).load()
    assert checkpoint is not None
    engine.evaluate(checkpoint.state.adapter, checkpoint.state.delta, [])
    model: Any = engine._model  # type: ignore[attr-defined]
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch itself, of frod, once
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", EVERY)
def test_it_ends_as_stock_peft_loads_it_or_is_refused(
    name: str,
    task: str,
    tiny_table: Table,
    tiny_decoder: Path,
    tiny_questions: Path,
    tmp_path: Path,
) -> None:
    table = table_of(name, task, tiny_table, tiny_decoder, tiny_questions)
    try:
        config = parse_config(table)
    except ConfigError as error:
        assert name not in TUNERS, f"{name} is promised in fedft.core.adapters.tuners"
        assert "cannot be averaged" in error.what and error.fix
        return
    assert name in TUNERS or name == "lora with options", (
        f"give {name} a row in fedft.core.adapters.tuners"
    )
    run = simulate(config, tmp_path / "run")
    auto: Any = TASKS[task][2]
    labels = {} if task == "causal-lm" else {"num_labels": 3}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        plain = auto.from_pretrained(config.model.source, **labels)
        untrained = plain(input_ids=IDS).logits
        stock: Any = PeftModel.from_pretrained(plain, str(run.adapter(2)))
        exported = stock.eval()(input_ids=IDS).logits
    torch.testing.assert_close(exported, logits_of_run(run, config), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(exported, untrained, atol=1e-3)
    assert run.rounds()[-1]["bytes"]["up"] > 0
    replies = list(run.clients())
    failed = [dict(r) for r in replies if "loss" not in r]
    assert not failed and len(replies) == 4, failed
    assert all(math.isfinite(r["loss"]) for r in replies)
