"""Our local training against transformers' Trainer on one client: losses and weights of 20 steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from fedft.clients.engines.loop import PeftEngine
from fedft.core.models import Base
from fedft.core.schedules import Schedule
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, Batch, LocalTraining, TrainPlan
from tests.clients.test_cohort import make_adapter, make_base, make_batch

pytestmark = pytest.mark.slow

STEPS, ROWS = 20, 4
LINEAR = Schedule("linear", warmup_steps=5)


class Sequential(Trainer):
    """Rows in their order, and the loss of every step as it is."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.losses: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)

    def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
        found = super().training_step(*args, **more)
        self.losses.append(float(found))
        return found


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a batch, padded to the longest of them."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    by_token = isinstance(rows[0]["labels"], list)
    labels = padded("labels", -100) if by_token else torch.tensor([row["labels"] for row in rows])
    return {
        "input_ids": padded("input_ids", 1),
        "attention_mask": padded("attention_mask", 0),
        "labels": labels,
    }


def rows_of(base: Base) -> list[dict[str, Any]]:
    """One row a dictionary, of uneven length."""
    made: list[dict[str, Any]] = []
    for seed in range(STEPS * ROWS):
        batch = make_batch(base, 1, [3 + seed * 7 % 20], seed)
        own = {name: tensor[0].tolist() for name, tensor in batch.inputs.items()}
        made.append({**own, "labels": batch.labels[0].tolist()})
    return made


def ours(
    base: Base, start: Adapter, own: LocalTraining, rows: list[dict[str, Any]]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    engine: Any = PeftEngine(base, LoraSpec())
    losses: list[float] = []
    gradient = engine._gradient

    def seen(*args: Any) -> Any:
        made, loss = gradient(*args)
        losses.append(loss)
        return made, loss

    engine._gradient = seen
    steps = [joined(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    batches = [Batch(step, step.pop("labels")) for step in steps]
    (found,) = engine.train([TrainPlan(start=start, training=own, round=1)], [batches])
    return dict(found.adapter.tensors()), losses


def theirs(
    base: Base,
    start: Adapter,
    own: LocalTraining,
    rows: list[dict[str, Any]],
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trainer on peft's own model, which the adapter is put into."""
    engine: Any = PeftEngine(base, LoraSpec())
    engine._load(start, TrainPlan(start=start, training=own))
    named = {n: p for n, p in engine._named() if p.requires_grad}
    made = optimizer(named.values(), lr=own.lr, **options)  # pyright: ignore[reportCallIssue]
    trainer = Sequential(
        engine._model,
        TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=own.batch_size,
            gradient_accumulation_steps=own.accumulate,
            max_grad_norm=own.clip_norm or 0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            **arguments,
        ),
        data_collator=joined,
        train_dataset=rows,
        optimizers=(made, None),
    )
    # BERT takes the number of a step's items and makes no use of it: left alone, Trainer would sum
    # the means of a step's passes for it.
    trainer.model_accepts_loss_kwargs = base.task == "causal-lm"
    trainer.train()
    n = own.accumulate
    per_step = [sum(trainer.losses[i : i + n]) for i in range(0, STEPS * n, n)]
    return {name: p.detach().clone() for name, p in named.items()}, per_step


def base_of(kind: str) -> Base:
    """In float32; Trainer puts the model into training mode, where ours drops nothing of the base."""
    base = make_base(kind, torch.float32)
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") or hasattr(module, "dropout_prob"):
            module.attention_dropout = module.dropout_prob = 0.0  # pyright: ignore
    return base


ADAMW = torch.optim.AdamW
CASES: dict[str, tuple[LocalTraining, type[torch.optim.Optimizer], Any, Any]] = {
    "linear": (
        LocalTraining(batch_size=ROWS, weight_decay=0.1, schedule=LINEAR),
        ADAMW,
        {"weight_decay": 0.1},
        {"lr_scheduler_type": "linear", "warmup_steps": 5},
    ),
    "cosine": (
        LocalTraining(batch_size=ROWS, schedule=Schedule("cosine", warmup_ratio=0.1)),
        ADAMW,
        {"weight_decay": 0.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    ),
    "cosine with a least rate": (
        LocalTraining(
            batch_size=ROWS, schedule=Schedule("cosine_with_min_lr", options={"min_lr_rate": 0.1})
        ),
        ADAMW,
        {"weight_decay": 0.0},
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
    ),
    "accumulation": (
        LocalTraining(batch_size=1, accumulate=ROWS, schedule=LINEAR),
        ADAMW,
        {"weight_decay": 0.0},
        {"lr_scheduler_type": "linear", "warmup_steps": 5},
    ),
    "smoothing": (
        LocalTraining(batch_size=ROWS, label_smoothing=0.2),
        ADAMW,
        {"weight_decay": 0.0},
        {"lr_scheduler_type": "constant", "label_smoothing_factor": 0.2},
    ),
    "rmsprop": (
        LocalTraining(batch_size=ROWS, optimizer="rmsprop", lr=1e-3, options={"alpha": 0.9}),
        torch.optim.RMSprop,
        {"alpha": 0.9},
        {"lr_scheduler_type": "constant"},
    ),
    "adagrad": (
        LocalTraining(batch_size=ROWS, optimizer="adagrad", lr=1e-2),
        torch.optim.Adagrad,
        {},
        {"lr_scheduler_type": "constant"},
    ),
    "nesterov": (
        LocalTraining(
            batch_size=ROWS,
            optimizer="sgd",
            momentum=0.9,
            options={"nesterov": True},
            lr=1e-2,
            schedule=LINEAR,
        ),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
        {"lr_scheduler_type": "linear", "warmup_steps": 5},
    ),
}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_losses_and_weights_are_trainers(kind: str, case: str, tmp_path: Path) -> None:
    own, optimizer, options, arguments = CASES[case]
    base = base_of(kind)
    rows, start = rows_of(base), make_adapter(base, 3, 0, 1.0)
    wanted, their_losses = theirs(
        base_of(kind), start, own, rows, optimizer, options, arguments, tmp_path
    )
    found, losses = ours(base, start, own, rows)
    assert len(losses) == len(their_losses) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)) <= 1e-5
    moved = max(float((found[n] - t).abs().max()) for n, t in start.tensors().items())
    assert moved > 1e-3
    assert max(float((found[n] - t).abs().max()) for n, t in wanted.items()) <= 1e-5
