"""Gradient checkpointing: the same numbers as without, bit for bit, and blocks that run again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedft.clients.engines.base import Engine, Trained
from fedft.clients.engines.checkpointing import recomputable
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.hydra import HydraEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.peft_engine import WholeEngine
from fedft.core import models
from fedft.core.errors import MismatchError
from fedft.core.models import Base
from fedft.core.models.start import drawn
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Batch, TrainPlan
from tests.clients.test_cohort import MIXED, MODELS, TRAINED, build, make_base
from tests.clients.test_frozen_blocks import make_examples, plans_of, site_batches, upper_base

# PEFT remarks that it adapts GPT-2's transposed layers, and does.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

LOOPS = {"loop": PeftEngine, "cohort": CohortEngine}


def same(xs: Sequence[Trained], ys: Sequence[Trained]) -> bool:
    """Whether all tensors and metrics are equal to the last bit."""
    pairs = [(x, y, y.adapter.tensors()) for x, y in zip(xs, ys, strict=True)]
    return all(
        x.metrics == y.metrics
        and all(torch.equal(tensor, other[name]) for name, tensor in x.adapter.tensors().items())
        for x, y, other in pairs
    )


class Runs:
    """Counts how often something inside of each block runs."""

    def __init__(self, base: Base) -> None:
        self.counts = [0] * len(base.blocks)
        for index, block in enumerate(base.blocks):
            norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm) or _rms(m))
            norm.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.counts[index] += 1


def _rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def steps(batches: Sequence[Sequence[Batch]], engine: str) -> int:
    """Passes that an engine makes: the cohort takes the sites' batches together."""
    counts = [len(own) for own in batches]
    return sum(counts) if engine == "loop" else max(counts)


@pytest.mark.parametrize("engine", LOOPS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_the_numbers_are_the_same(kind: str, dropout: float, engine: str) -> None:
    lora = LoraSpec(dropout=dropout)
    plain = LOOPS[engine](make_base(kind), lora)
    again = LOOPS[engine](make_base(kind), lora, checkpointing=True)
    plans, batches = build(plain.base, MIXED, TRAINED[0])
    ran, ran_again = Runs(plain.base), Runs(again.base)
    assert same(plain.train(plans, batches), again.train(plans, batches))
    made = steps(batches, engine)
    assert ran.counts == [made, made]
    assert ran_again.counts == [2 * made, 2 * made]
    assert not any("forward" in vars(block) for block in again.base.blocks)


@pytest.mark.parametrize("engine", LOOPS)
def test_some_blocks_alone(engine: str) -> None:
    results: list[list[Trained]] = []
    for checkpointing in (False, True):
        trainer = LOOPS[engine](make_base("llama"), LoraSpec(), checkpointing=checkpointing)
        runs = Runs(trainer.base)
        plans, batches = build(trainer.base, MIXED, TRAINED[0])
        plans = [replace(p, start=p.start.narrowed((1,)), layers=(1,)) for p in plans]
        results.append(trainer.train(plans, batches))
        assert runs.counts == [0, (1 + checkpointing) * steps(batches, engine)]
    assert same(*results)


@pytest.mark.parametrize("kind", ["bert", "llama", "dinov2"])
def test_activations_that_are_kept_below_the_first_adapted_block(kind: str) -> None:
    """The frozen blocks run once for each row, and never again."""
    results: list[list[Trained]] = []
    for checkpointing in (False, True):
        engine = CohortEngine(upper_base(kind), LoraSpec(), checkpointing=checkpointing)
        assert len(recomputable(engine.base)) == 1
        runs = Runs(engine.base)
        examples, plans = make_examples(kind), plans_of(engine.base, 2)
        for round_ in range(2):
            own = [site_batches(examples, k, 7, round_, epochs=2) for k in range(2)]
            first = runs.counts[0] if round_ else None
            results.append(engine.train(plans, own))
            assert first in (None, runs.counts[0])
    assert same(results[0], results[2])
    assert same(results[1], results[3])


OTHERS = {
    "hydralora": LoraSpec(method="hydralora", heads=3, rank=4, alpha=8, dropout=0.2),
    "dora": LoraSpec(method="dora", rank=4, dropout=0.2),
    "loha": LoraSpec(method="loha", rank=4),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_adapters(method: str, tiny_model: Path) -> None:
    spec, lora = ModelSpec(source=str(tiny_model)), OTHERS[method]
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 20, (4, 6), generator=g)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % 3)
    results: list[list[Trained]] = []
    for checkpointing in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the head is a placeholder
            base = models.load_base(spec, lora, 3)
            start = models.initial_adapter(base.shapes, lora, 4, seed=0)
            engine: Engine
            if lora.heads is not None:
                engine = HydraEngine(base, lora, checkpointing=checkpointing)
            else:
                start, _ = drawn(spec, lora, start, 0)
                engine = WholeEngine(base, lora, 0, checkpointing=checkpointing)
        plan = TrainPlan(start, train=frozenset({"A", "B", "router", "head"}))
        runs = Runs(base)
        results.append(engine.train([plan], [[batch, batch]]))
        assert runs.counts == [2 + 2 * checkpointing] * 2
    assert same(*results)


@pytest.mark.parametrize("engine", LOOPS)
def test_a_model_without_a_list_of_blocks_is_refused(engine: str) -> None:
    base = make_base("bert")
    base.model.config.num_hidden_layers = 7  # type: ignore[union-attr]
    with pytest.raises(MismatchError, match="gradient-checkpointing"):
        LOOPS[engine](base, LoraSpec(), checkpointing=True)
