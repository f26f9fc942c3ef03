"""Local training without a run: two engines on a model of two small blocks with random weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fedft.clients.engines.base import Engine
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, Batch, Factors, TrainPlan

WORDS, CLASSES = 60, 5
"""Size of the vocabulary; number of classes."""


@cache
def engines(dtype: torch.dtype = torch.float64) -> tuple[Engine, Engine]:
    """The plain loop and the cohort engine, each on its own copy of one model."""
    from transformers import BertConfig, BertForSequenceClassification

    from fedft.clients.engines.cohort import CohortEngine
    from fedft.clients.engines.loop import PeftEngine
    from fedft.core.models import Base

    lora = LoraSpec(target_modules=("query", "value"))

    def base() -> Base:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            described: Any = BertConfig  # whose signature lacks what its base takes
            config = described(
                vocab_size=WORDS,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=40,
                num_labels=CLASSES,
            )
            model: Any = BertForSequenceClassification(config)
            for parameter in model.parameters():  # defaults leave attention nearly uniform
                parameter.data += 0.1 * torch.randn_like(parameter)
        frozen = model.to(dtype).eval().requires_grad_(False)
        return Base(frozen, lora, "classification")

    return PeftEngine(base(), lora), CohortEngine(base(), lora)


def start(
    rank: int, seed: int, dtype: torch.dtype = torch.float64, modules: Sequence[str] = ("layer",)
) -> Adapter:
    """An adapter in the middle of a run.

    Args:
        rank: of every layer.
        seed: that the numbers are drawn for.
        dtype: of the tensors.
        modules: layers whose path has one of these in it are adapted.
    """
    shapes, g = engines(dtype)[0].base.shapes, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * 0.2).to(dtype)

    factors = {
        path: Factors(draw(rank, d_in), draw(d_out, rank), 2.0)
        for path, (d_out, d_in) in shapes.modules.items()
        if any(part in path for part in modules)
    }
    return Adapter(factors, {name: draw(*shape) for name, shape in shapes.head.items()})


def batches(count: int, seed: int) -> list[Batch]:
    """Batches of three rows of seven words, each word once a row."""
    g = torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    for _ in range(count):
        ids = torch.stack([torch.randperm(WORDS - 2, generator=g)[:7] + 2 for _ in range(3)])
        labels = torch.randint(CLASSES, (3,), generator=g)
        made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return made


def recorded(plan: TrainPlan, seed: int) -> TrainPlan:
    """With numbers in every record that the plan's terms receive or have kept."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(iter(plan.start.head.values())).dtype
    wanted = {**plan.schema("receives"), **plan.schema("keeps")}
    records = {
        record: {
            name: (0.05 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
            for name, shape in shapes.items()
        }
        for record, shapes in wanted.items()
    }
    return replace(plan, records=records)
