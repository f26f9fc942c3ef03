"""Packed rows are trained as rows apart, in both engines; models that cannot are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedft.clients.engines.base import Engine
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.packing import best_fit
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import TokenExamples
from fedft.core.models import Base, initial_adapter
from fedft.core.spec import LoraSpec
from fedft.core.types import IGNORED, Batch, LocalTraining, TrainPlan
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.run import simulate
from tests.core.tasks.cases import CASES, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 6},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "phi3": SIZES,
    "granite": SIZES,
    "gpt_neox": {**SIZES, "num_key_value_heads": 4},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip

TARGETS = {"gpt2": ("c_attn",), "phi3": ("qkv_proj",), "gpt_neox": ("query_key_value",)}


def model_of(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # defaults leave attention nearly uniform
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def base_of(kind: str) -> Base:
    lora = LoraSpec(rank=2, target_modules=TARGETS.get(kind, ("q_proj", "v_proj")))
    return Base(model_of(kind), lora, "causal-lm")


def rows(count: int = 14, seed: int = 0) -> TokenExamples:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 60, rng.integers(2, 14)).tolist() for _ in range(count)]
    labels = [[t if k % 3 else IGNORED for k, t in enumerate(row)] for row in ids]
    return TokenExamples.from_lists(ids, 0, token_labels=labels)


def engine_of(name: str, kind: str) -> Engine:
    lora = LoraSpec(rank=2)
    return PeftEngine(base_of(kind), lora) if name == "loop" else CohortEngine(base_of(kind), lora)


def plan_of(engine: Engine, site: str = "a") -> TrainPlan:
    start = initial_adapter(engine.base.shapes, LoraSpec(rank=2), 2, seed=1)
    generator = torch.Generator().manual_seed(3)
    start = start.replaced(
        {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in start.tensors().items()}
    )
    training = LocalTraining(lr=1.0, optimizer="sgd", clip_norm=None)
    return TrainPlan(start, training=training, site=site)


def apart(one: Any, other: Any, plan: TrainPlan) -> tuple[float, float]:
    """Difference of losses, and of gradients relative to the largest, of one step of SGD."""
    before = plan.start.tensors()
    a, b = ({n: t - before[n] for n, t in x.adapter.tensors().items()} for x in (one, other))
    largest = max(float(t.abs().max()) for t in b.values())
    assert largest > 1e-3, "nothing was learnt: anything would agree"
    gap = max(float((a[n] - b[n]).abs().max()) for n in a)
    return abs(one.metrics["loss"] - other.metrics["loss"]), gap / largest


@pytest.mark.parametrize("engine", ["loop", "cohort"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_gradients_are_those_of_rows_apart(kind: str, engine: str) -> None:
    data, own = rows(), engine_of(engine, kind)
    bins = best_fit(data.lengths, 24)
    assert len(bins) < 6 and max(map(len, bins)) > 2
    plan = plan_of(own)
    (together,) = own.train([plan], [[data.packed(bins)]])
    (padded,) = own.train([plan], [[data.collate(np.arange(len(data)))]])
    loss, gradient = apart(together, padded, plan)
    assert loss < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_see_each_other_would_be_noticed(kind: str) -> None:
    """The positive control of the test above: the same sequence, read as one row."""
    data, own = rows(), engine_of("loop", kind)
    packed, plan = data.packed(best_fit(data.lengths, 24)), None
    plan = plan_of(own)
    blind = Batch({"input_ids": packed.inputs["input_ids"]}, packed.labels)
    (together,) = own.train([plan], [[packed]])
    (seen,) = own.train([plan], [[blind]])
    loss, gradient = apart(seen, together, plan)
    assert loss > 1e-3 and gradient > 1e-2


def test_clients_together_are_as_clients_alone() -> None:
    """Sequences of different clients have different lengths, and clients different numbers of them."""
    loop, cohort = engine_of("loop", "llama"), engine_of("cohort", "llama")
    data = [rows(14, seed=1), rows(5, seed=2), rows(9, seed=3)]
    work = [
        [d.packed(best_fit(d.lengths, limit))] for d, limit in zip(data, (24, 16, 31), strict=True)
    ]
    assert len({batch.labels.shape for (batch,) in work}) == 3
    plans = [plan_of(loop, f"client-{k}") for k in range(3)]
    for mine, theirs in zip(cohort.train(plans, work), loop.train(plans, work), strict=True):
        loss, gradient = apart(mine, theirs, plans[0])
        assert loss < 1e-5 and gradient < 2e-5


def test_blocks_that_run_again_see_the_same() -> None:
    data, lora = rows(), LoraSpec(rank=2)
    batch = data.packed(best_fit(data.lengths, 24))
    plain, again = (
        engine_of("cohort", "llama"),
        CohortEngine(base_of("llama"), lora, checkpointing=True),
    )
    plan = plan_of(plain)
    (one,), (other,) = plain.train([plan], [[batch]]), again.train([plan], [[batch]])
    assert max(apart(other, one, plan)) < 1e-6


# ------------------------------------------------------------------------------------- whole runs


def table_of(folder: Path, model: Path, **data: Any) -> dict[str, Any]:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows_of(CASES["causal-lm"], 60)))
    return {
        "model": {"source": str(model), "task": "causal-lm"},
        "lora": {"rank": 2, "target-modules": ["q_proj", "v_proj"]},
        "data": {"source": str(source), "max-length": 32, "partition": {"kind": "iid"},
                 "packing": True, **data},
        "fleet": {"clients": 3},
        "rounds": {"count": 2, "per-round": 3, "evaluate-every": 1},
        "training": {"batch-size": 2, "lr": 1e-2, "optimizer": "sgd"},
        "engine": {"backend": "inline", "cohort": 3, "precision": "fp32"},
    }  # fmt: skip


def test_a_run(tmp_path: Path) -> None:
    """Both engines agree, weights go by rows, and plan and run count the same steps."""
    model = CASES["causal-lm"].model(tmp_path / "model")
    table = table_of(tmp_path, model)
    cost = forecast(parse_config(table))
    found = cost["packing"]
    assert found["rows"] == cost["data"]["train"] == 51
    assert found["sequences"] < 25
    assert f"{found['sequences']} sequences of up to 32 tokens" in as_text(
        parse_config(table), cost
    )
    runs: dict[int, Any] = {}
    for cohort in (1, 3):
        table["engine"]["cohort"] = cohort
        runs[cohort] = simulate(parse_config(table), tmp_path / f"run-{cohort}")
    for one, other in zip(*(run.rounds() for run in runs.values()), strict=True):
        assert one["eval"]["loss"] == pytest.approx(other["eval"]["loss"], rel=1e-5)
    for run in runs.values():
        own = [line for line in run.clients() if line["round"] == 1]
        assert sum(line["examples"] for line in own) == 51
        assert sum(line["steps"] for line in own) == found["steps"]


def test_a_model_that_shows_rows_to_each_other_is_refused(tmp_path: Path) -> None:
    for kind, name in (("mamba", "in_proj"), ("bloom", "query_key_value")):
        sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
        sizes |= {"state_size": 4} if kind == "mamba" else {"n_head": 2}
        config = transformers.AutoConfig.for_model(kind, **sizes)
        folder = CASES["causal-lm"].model(tmp_path / kind)
        for file in folder.glob("*.safetensors"):
            file.unlink()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        table = table_of(tmp_path, folder)
        table["lora"]["target-modules"] = [name]
        with pytest.raises(MismatchError, match=r"cannot be trained with data.packing") as caught:
            simulate(parse_config(table), tmp_path / f"run-{kind}")
        assert kind in str(caught.value), kind
        table["data"]["packing"] = False
        simulate(parse_config(table), tmp_path / f"run-{kind}-padded")


def test_what_packing_does_not_go_with(tmp_path: Path) -> None:
    for key, value in (("dp", {"noise-multiplier": 1.0}), ("accumulate", 2)):
        table = table_of(tmp_path, tmp_path)
        table["training"][key] = value
        with pytest.raises(ConfigError, match="packing"):
            parse_config(table)
    table = table_of(tmp_path, tmp_path)
    table["model"]["task"] = "classification"
    with pytest.raises(ConfigError, match="packing"):
        parse_config(table)
