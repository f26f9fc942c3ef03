"""Trainers of somebody's own: plain ones, transformers', and every kind of wrong one.

Workers and real clients import this module by its name, as they would a user's.
"""

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

LOSES = "site-3"
"""Name of the one client at which a trainer fails that fails at one."""


FROZEN = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"


class Loop:
    """A loop by hand over a classification model."""

    def __init__(self, model: Any, rows: list[dict[str, Any]], settings: Any) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        size, own = self.settings.training.batch_size, self.settings
        order = torch.randperm(len(self.rows)).tolist()  # the generator that fedft has seeded
        for first in range(0, len(order), size):
            rows = [self.rows[i] for i in order[first : first + size]]
            texts = own.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
            labels = torch.tensor([own.classes.index(row["label"]) for row in rows])
            inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
            yield inputs, labels

    def train(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.trained, lr=self.settings.training.lr, weight_decay=0.0, fused=True
        )
        total, steps = 0.0, 0
        for inputs, labels in self.batches():
            loss = cross_entropy(self.model(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            total, steps = total + float(loss.detach()) * len(labels), steps + 1
        return SimpleNamespace(training_loss=total / len(self.rows), global_step=steps)


def plain(model: Any, rows: list[dict[str, Any]], settings: Any) -> Loop:
    return Loop(model, rows, settings)


def quick(model: Any, rows: list[dict[str, Any]], settings: Any) -> Loop:
    """Of few rows: what is tried is what surrounds the training."""
    return Loop(model, rows[:4], settings)


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────


class Wrong(Loop):
    """Trains, and then does something else."""

    def after(self) -> Any:
        raise NotImplementedError

    def train(self) -> Any:
        result = super().train()
        return self.after() or result


def raises(model: Any, rows: Any, settings: Any) -> Any:
    raise KeyError("colour")


class RaisesInside(Wrong):
    def after(self) -> Any:
        self.model.no_such_thing()


def none(model: Any, rows: Any, settings: Any) -> Any:
    return None


def no_train(model: Any, rows: Any, settings: Any) -> Any:
    return SimpleNamespace(fit=lambda: None)


def exits(model: Any, rows: Any, settings: Any) -> Any:
    sys.exit(3)


def nothing(model: Any, rows: Any, settings: Any) -> Any:
    return SimpleNamespace(train=lambda: None)


class ChangesTheBase(Wrong):
    def after(self) -> Any:
        with torch.no_grad():
            weight = self.model.get_parameter(FROZEN)
            weight.view(-1)[0] += 0.5


class ChangesTheBaseUnseen(Wrong):
    """Past every counter that torch has of changes, and the sum stays about what it was."""

    def after(self) -> Any:
        flat = self.model.get_parameter(FROZEN).data.view(-1)
        flat[0] += 1e-3
        flat[1] -= 1e-3


class NaN(Wrong):
    def after(self) -> Any:
        self.trained[0].data.view(-1)[0] = float("nan")


class NaNLoss(Wrong):
    def after(self) -> Any:
        return SimpleNamespace(training_loss=float("nan"), global_step=1)


class Shape(Wrong):
    def after(self) -> Any:
        self.trained[0].data = self.trained[0].data[:1]


class TrainsWhatIsFrozen(Loop):
    """Whatever the plan leaves as it is, of the adapter."""

    def __init__(self, model: Any, rows: Any, settings: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        super().__init__(model, rows, settings)


def wraps(model: Any, rows: Any, settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")  # peft says so, too; not everybody reads it
    return Loop(get_peft_model(model, LoraConfig(r=4, target_modules=["query"])), rows, settings)


def merges(model: Any, rows: Any, settings: Any) -> Any:
    """Trains, and takes the adapter out of the model."""
    loop = Loop(model, rows, settings)

    def train() -> None:
        loop.train()
        model.merge_and_unload()

    return SimpleNamespace(train=train)


class LeavesAThread(Wrong):
    def after(self) -> Any:
        threading.Thread(target=time.sleep, args=(8,), name="forgotten").start()


class LeavesAProcess(Wrong):
    def after(self) -> Any:
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,)).start()


class Untidy(Wrong):
    """Prints, moves, sets, draws, hooks, and leaves its model in another mode: all allowed."""

    def after(self) -> Any:
        print("on standard output")
        os.environ["OWN_TRAINER"] = "set"
        os.environ.pop("HOME", None)
        torch.manual_seed(1)
        self.model.register_forward_hook(lambda *_: 1 / 0)
        self.model.config.pad_token_id = 1
        self.model.half()
        self.settings.tokenizer.pad_token = "[UNK]"
        (Path(self.settings.output_folder) / "checkpoint").write_text("x")
        os.chdir(self.settings.output_folder)


def at_one(model: Any, rows: Any, settings: Any) -> Any:
    """Fails at one client of all."""
    if settings.client == LOSES:
        raise RuntimeError("at this one alone")
    return Loop(model, rows, settings)


def poisons_at_one(model: Any, rows: Any, settings: Any) -> Any:
    """Changes the base at one client of all: what the others compute must not know of it."""
    kind = ChangesTheBase if settings.client == LOSES else Loop
    return kind(model, rows, settings)


# ── transformers ──────────────────────────────────────────────────────────────────────────────


def like_ours(model: Any, rows: list[dict[str, Any]], settings: Any) -> Any:
    """transformers' Trainer on the rows in the order of fedft's own loop, with its optimiser."""
    import numpy as np
    from transformers import Trainer, TrainingArguments

    from fedft.core import seeds
    from fedft.core.data.batches import batch_rows

    own = settings.training
    texts = [settings.tokenizer(row["text"])["input_ids"] for row in rows]
    lengths = np.array([len(ids) for ids in texts])
    generator = seeds.torch_generator(0, "batches", settings.round, settings.client)
    order = [b.tolist() for b in batch_rows(lengths, own.batch_size, generator=generator)]

    def collate(chosen: list[dict[str, Any]]) -> Any:
        labels = torch.tensor([settings.classes.index(row["label"]) for row in chosen])
        padded = settings.tokenizer(
            [row["text"] for row in chosen], padding=True, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        return {**{name: padded[name] for name in names}, "labels": labels}

    class Ordered(Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_sampler=order, collate_fn=collate)

    arguments = TrainingArguments(
        settings.output_folder,
        seed=settings.seed,
        num_train_epochs=own.epochs,
        learning_rate=own.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Ordered(model, arguments, train_dataset=rows)
