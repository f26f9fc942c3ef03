"""DPO against TRL's DPOTrainer on one client: losses, rewards and weights, step by step, in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.source import Data
from fedft.core.models import initial_adapter, input_encoder, load_base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import LocalTraining, TrainPlan
from tests.core.tasks.cases import CASES, Row, rows_of
from tests.core.tasks.test_laws import data_of

STEPS, SIZE, LR, BETA = 20, 4, 2e-2, 0.3
LORA = LoraSpec(rank=2, alpha=8.0, target_modules=("q_proj", "v_proj"))


def _theirs(
    rows: list[Row], folder: Path, start: dict[str, torch.Tensor], tmp_path: Path, **loss: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], list[list[int]]]:
    """What TRL logs of each step, its weights afterwards, and the ids of its first rows."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch.utils.data import SequentialSampler
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name.replace(".default", "")])
    options = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=SIZE, max_steps=STEPS,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, beta=BETA, max_length=24, disable_tqdm=True,
        dataloader_drop_last=False, **loss,
    )  # fmt: skip
    encoder = input_encoder(ModelSpec(source=str(folder), task="preference"), folder)
    # fedft puts a newline after a prompt where there is no chat template.
    table = Dataset.from_list([{**row, "prompt": f"{row['prompt']}\n"} for row in rows])
    trainer = InOrder(
        model=model, args=options, train_dataset=table, processing_class=encoder.tokenizer
    )
    first = trainer.train_dataset[0]
    ids = [first["prompt_ids"] + first[key] for key in ("chosen_ids", "rejected_ids")]
    trainer.train()
    logged = [line for line in trainer.state.log_history if "rewards/margins" in line]
    tensors = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    return logged, tensors, ids


def _ours(
    kind: type[Any], data: Data, order: list[Any], folder: Path, objective: dict[str, Any]
) -> tuple[list[dict[str, float]], Any, dict[str, torch.Tensor]]:
    spec = ModelSpec(source=str(folder), task="preference", objective=objective)
    base = load_base(spec, LORA, 0)
    engine, steps = kind(base, LORA), []
    referred = base.kind.referred

    def looked_at(own: torch.Tensor, reference: torch.Tensor) -> Any:
        rewards, targets = referred(own, reference)
        ahead = rewards.detach()[:, 0] - rewards.detach()[:, 1]
        loss = float(base.kind.loss(rewards.detach(), targets, "mean"))
        steps.append(
            {
                "loss": loss,
                "margin": float(ahead.mean()),
                "right": float((ahead > 0).double().mean()),
            }
        )
        return rewards, targets

    base.kind.referred = looked_at  # type: ignore[method-assign]
    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    training = LocalTraining(batch_size=SIZE, lr=LR, optimizer="adamw", clip_norm=1.0)
    plan = TrainPlan(start, training=training, site="one")
    (trained,) = engine.train([plan], [[data.train.collate(rows) for rows in order]])
    return steps, trained.adapter.tensors(), start.tensors()


@pytest.mark.slow  # TRL takes a quarter of a minute to import
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge"])
def test_twenty_steps_are_those_of_trl(loss: str, folder_of: Any, tmp_path: Path) -> None:
    folder, rows = folder_of("preference"), rows_of(CASES["preference"], 40)
    data = data_of("preference", folder, tmp_path, rows)
    rng = np.random.default_rng(0)
    order = [rng.choice(len(data.train), SIZE, replace=False) for _ in range(STEPS)]
    smoothing = {"label-smoothing": 0.1} if loss == "robust" else {}
    objective = {"beta": BETA, "loss": loss, **smoothing}
    # Which rows were set aside for testing is our own split: TRL is given the rows that we train on.
    texts = {tuple(ids): row for row, ids in zip(rows, _rows_as_ids(folder, rows), strict=True)}
    picked = [texts[tuple(_ids(data, int(row)))] for batch in order for row in batch]
    runs = {
        kind: _ours(kind, data, order, folder, objective) for kind in (PeftEngine, CohortEngine)
    }
    start = next(iter(runs.values()))[2]
    theirs, weights, ids = _theirs(
        picked, folder, start, tmp_path, loss_type=[loss], label_smoothing=smoothing.get("label-smoothing", 0.0)
    )  # fmt: skip
    assert [i for row in ids for i in row] == _ids(data, int(order[0][0]))
    assert len(theirs) == STEPS
    for steps, tensors, before in runs.values():
        assert len(steps) == STEPS
        for mine, line in zip(steps, theirs, strict=True):
            assert mine["loss"] == pytest.approx(line["loss"], abs=1e-5)
            assert mine["margin"] == pytest.approx(line["rewards/margins"], abs=1e-5)
        # At the first step nothing is ahead of anything but by rounding.
        assert [s["right"] for s in steps[1:]] == [t["rewards/accuracies"] for t in theirs[1:]]
        assert set(tensors) == set(weights)
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-5), name
        moved = max(float((tensor - before[name]).abs().max()) for name, tensor in tensors.items())
        assert moved > 0.05, "nothing was learnt: anything would agree"
        assert steps[-1]["margin"] > steps[0]["margin"]


def _ids(data: Data, row: int) -> list[int]:
    batch = data.train.collate(np.array([row]))
    return batch.inputs["input_ids"][batch.inputs["attention_mask"].bool()].tolist()


def _rows_as_ids(folder: Path, rows: list[Row]) -> list[list[int]]:
    """As one would write it down: words, and the end of text."""
    encoder = input_encoder(ModelSpec(source=str(folder), task="preference"), folder)
    tokenizer = encoder.tokenizer
    return [
        [
            i
            for answer in ("chosen", "rejected")
            for i in [
                *tokenizer(f"{row['prompt']}\n{row[answer]}")["input_ids"],
                tokenizer.eos_token_id,
            ]
        ]
        for row in rows
    ]
