"""One client's fine-tuning is that of TRL's SFTTrainer: the same losses and the same weights."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.source import prepare
from fedft.core.examples import TokenExamples
from fedft.core.models import Base, initial_adapter
from fedft.core.spec import DataSpec, LoraSpec
from fedft.core.types import Batch, LocalTraining, TrainPlan
from tests.core.chat_templates import shipped, tokenizer

STEPS, SIZE, LR = 20, 4, 1e-3

CUTS, LENGTH = 96, 400
"""Lengths of which one cuts some rows, and the other none."""

WORDS = "sun moon tree river stone bird fish house night day red blue big small runs sleeps".split()  # noqa: SIM905

pytestmark = [
    pytest.mark.slow,
    # TRL and transformers warn of each other's names, and torch of pinning memory without a GPU.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def said(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def conversation(rng: random.Random) -> list[dict[str, str]]:
    system = [{"role": "system", "content": said(rng, 2)}] if rng.random() < 0.3 else []
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": said(rng, 3)}
        for i in range(2 * rng.randint(1, 3))
    ]
    return [*system, *turns]


def _split(messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": messages[:-1], "completion": messages[-1:]}


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": (lambda rng: {"messages": conversation(rng)}, {"assistant_only_loss": True}),
    "prompt and completion": (
        lambda rng: {"prompt": said(rng) + " ", "completion": said(rng)},
        {},
    ),
    "messages completed": (lambda rng: _split(conversation(rng)), {}),
    "text": (lambda rng: {"text": said(rng, 20)}, {}),
}
"""Kind of data → (makes a row, what TRL is told beside it)."""


def model_of() -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer(None)), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=LENGTH, pad_token_id=17,
        bos_token_id=15, eos_token_id=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(4)
    return model.eval()


LORA = LoraSpec(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))


def plan_of(base: Base) -> TrainPlan:
    start = initial_adapter(base.shapes, LORA, LORA.rank, seed=1)
    generator = torch.Generator().manual_seed(3)
    start = start.replaced(
        {
            n: t + 0.05 * torch.randn(t.shape, generator=generator)
            for n, t in start.tensors().items()
        }
    )
    return TrainPlan(start, training=LocalTraining(lr=LR, clip_norm=None), site="one")


def ours(
    engine: str, batches: Sequence[Batch], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after the batches, and in the plain loop the loss of each."""
    base = Base(model_of().requires_grad_(False), LORA, "causal-lm")
    losses: list[float] = []
    if engine == "cohort":
        found = CohortEngine(base, LORA)
    else:
        own = PeftEngine.mean_loss

        def recorded(self: PeftEngine, *args: Any) -> torch.Tensor:
            losses.append(float((value := own(self, *args)).detach()))
            return value

        monkeypatch.setattr(PeftEngine, "mean_loss", recorded)
        found = PeftEngine(base, LORA)
    (trained,) = found.train([plan_of(base)], [batches])
    return trained.adapter.tensors(), losses


def theirs(
    rows: list[dict[str, Any]], folder: Path, template: str, length: int, **options: Any
) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """The same by SFTTrainer: weights, losses, and the data as it has made them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = LoraConfig(
        r=LORA.rank, lora_alpha=8, target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    base = model_of()
    plan = plan_of(Base(model_of().requires_grad_(False), LORA, "causal-lm"))
    model = get_peft_model(base, config)
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == plan.start.tensors().keys()
    for name, tensor in plan.start.tensors().items():
        named[name].data.copy_(tensor)
    losses: list[float] = []

    class Recording(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            value = super().compute_loss(*args, **kwargs)
            losses.append(float((value[0] if isinstance(value, tuple) else value).detach()))
            return value

    trainer = Recording(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=STEPS,
            per_device_train_batch_size=SIZE,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            max_length=length,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(template),
    )
    trainer.train()
    return {n: p.detach() for n, p in named.items()}, losses, trainer.train_dataset


def examples_of(
    rows: list[dict[str, Any]], folder: Path, template: str, length: int
) -> TokenExamples:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = DataSpec(source=str(source), test_fraction=0.0, max_length=length)
    found = prepare(spec, "causal-lm", tokenizer(template)).train
    assert isinstance(found, TokenExamples) and len(found) == len(rows)
    return found


def compare(
    rows: list[dict[str, Any]],
    batches: Sequence[Batch],
    told: tuple[dict[str, torch.Tensor], list[float], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, losses, _ = told
    start = plan_of(Base(model_of().requires_grad_(False), LORA, "causal-lm")).start.tensors()
    for engine in ("cohort", "loop"):
        own, recorded = ours(engine, batches, monkeypatch)
        for name, tensor in weights.items():
            assert float((tensor - start[name]).abs().max()) > 1e-3, "it has to have moved"
            gap = float((own[name] - tensor).abs().max())
            assert gap < 1e-5, (engine, name, gap)
    assert len(losses) == len(recorded) == STEPS
    np.testing.assert_allclose(recorded, losses, rtol=0, atol=1e-5)
    assert losses[0] - losses[-1] > 0.01 or max(losses) - min(losses) > 0.01


@pytest.mark.parametrize("template", ["llama3_training", "qwen2_5_training"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_are_those_of_trl(
    kind: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template != "llama3_training" and kind in ("text", "prompt and completion"):
        pytest.skip("no template is used")
    make, options = KINDS[kind]
    rng = random.Random(0)
    rows = [make(rng) for _ in range(STEPS * SIZE)]
    length = CUTS if kind in ("messages", "text") and template == "llama3_training" else LENGTH
    data = examples_of(rows, tmp_path, shipped(template), length)
    assert (int(data.lengths.max()) == CUTS) == (length == CUTS)
    batches = [data.collate(np.arange(i, i + SIZE)) for i in range(0, STEPS * SIZE, SIZE)]
    told = theirs(rows, tmp_path, shipped(template), length, **options)
    compare(rows, batches, told, monkeypatch)


def test_packed_sequences_are_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL packs by best fit decreasing, too; its sequences are taken over in its order."""
    template, rng = shipped("llama3_training"), random.Random(0)
    rows = [{"messages": conversation(rng)} for _ in range(400)]
    data = examples_of(rows, tmp_path, template, CUTS)
    told = theirs(rows, tmp_path, template, CUTS, assistant_only_loss=True, packing=True)
    place: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(data)):
        ids = data.ids[data.offsets[i] : data.offsets[i + 1]].tolist()
        place.setdefault(tuple(ids), []).append(i)
    bins: list[np.ndarray[Any, Any]] = []
    for row in told[2]:
        ends = np.cumsum([0, *row["seq_lengths"]]).tolist()
        own = [tuple(row["input_ids"][a:b]) for a, b in pairwise(ends)]
        bins.append(np.array([place[ids].pop() for ids in own]))
    assert sum(map(len, bins)) == 400 and max(map(len, bins)) > 1
    assert len(bins) >= STEPS * SIZE
    batches = [data.packed(bins[i : i + SIZE]) for i in range(0, STEPS * SIZE, SIZE)]
    compare(rows, batches, told, monkeypatch)
