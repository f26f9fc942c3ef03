"""The plain PEFT loop: what a site does, held to a few lines of torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fedft.clients.engines.loop import PeftEngine
from fedft.core import models
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Batch, Factors, LocalTraining, TrainPlan

LORA = LoraSpec(rank=3, alpha=6)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> PeftEngine:
    return PeftEngine(models.load_base(ModelSpec(source=str(tiny_model)), LORA, 3), LORA)


def start(engine: PeftEngine, rank: int = 3) -> Adapter:
    return models.initial_adapter(engine.base.shapes, LORA, rank, seed=0)


def batches(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(2, 20, (4, 6), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator)
        made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return made


def trained(engine: PeftEngine, plan: TrainPlan, own: Sequence[Batch]) -> Adapter:
    return engine.train([plan], [own])[0].adapter


def sgd(**fields: float | None) -> LocalTraining:
    return LocalTraining(optimizer="sgd", lr=0.5, clip_norm=None, **fields)  # type: ignore[arg-type]


def dense_gradients(engine: PeftEngine, adapter: Adapter, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of the loss with respect to A, B and the head, without PEFT."""
    leaves = {n: t.clone().requires_grad_() for n, t in adapter.tensors().items()}
    live = adapter.replaced(leaves)
    fresh = models.load_base(ModelSpec(source=engine.base.model.config._name_or_path), LORA, 3)
    weights = {
        f"{path}.weight": fresh.adapted[path].weight + f.scale * f.B @ f.A
        for path, f in live.factors.items()
    } | {n.removeprefix("base_model.model."): t for n, t in live.head.items()}
    output = torch.func.functional_call(fresh.model, weights, (), dict(batch.inputs))
    F.cross_entropy(output.logits, batch.labels).backward()
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}


def test_one_step_of_sgd_by_hand(engine: PeftEngine) -> None:
    adapter, [batch] = start(engine), batches(1)
    expected = {
        n: t - 0.5 * dense_gradients(engine, adapter, batch)[n]
        for n, t in adapter.tensors().items()
    }
    result = trained(engine, TrainPlan(adapter, training=sgd()), [batch])
    for name, tensor in result.tensors().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    moved = [n for n, t in result.tensors().items() if not torch.equal(t, adapter.tensors()[n])]
    assert any("lora_B" in n for n in moved)
    assert not any("lora_A" in n for n in moved)  # B = 0 leaves A without a gradient


def test_only_the_parts_of_the_plan_move(engine: PeftEngine) -> None:
    adapter = start(engine)
    result = trained(engine, TrainPlan(adapter, train=frozenset({"B"}), training=sgd()), batches(3))
    for name, tensor in result.tensors().items():
        assert torch.equal(tensor, adapter.tensors()[name]) == ("lora_B" not in name)


def test_training_changes_neither_the_plan_nor_the_base(engine: PeftEngine) -> None:
    adapter = start(engine)
    before = {n: t.clone() for n, t in adapter.tensors().items()}
    frozen = {p: m.weight.clone() for p, m in engine.base.adapted.items()}
    trained(engine, TrainPlan(adapter), batches(3))
    assert all(torch.equal(before[n], t) for n, t in adapter.tensors().items())
    assert all(torch.equal(frozen[p], m.weight) for p, m in engine.base.adapted.items())


def test_a_site_leaves_no_trace_for_the_next(engine: PeftEngine) -> None:
    """The pitfall of one model object for all: optimiser state and weights carried over."""
    plan = TrainPlan(start(engine))
    alone = trained(engine, plan, batches(3))
    engine.train([plan, plan], [batches(5, seed=7), batches(3)])
    after = engine.train([plan, plan], [batches(5, seed=7), batches(3)])[1].adapter
    assert all(torch.equal(t, after.tensors()[n]) for n, t in alone.tensors().items())


def test_ranks_differ_from_site_to_site(engine: PeftEngine) -> None:
    results = engine.train([TrainPlan(start(engine, rank)) for rank in (1, 5, 3)], [batches(2)] * 3)
    assert [r.adapter.rank for r in results] == [1, 5, 3]


def test_clipping_bounds_the_step(engine: PeftEngine) -> None:
    adapter = start(engine)
    clipped = trained(
        engine, TrainPlan(adapter, training=replace(sgd(), clip_norm=1e-3)), batches(1)
    )
    change = sum(
        float((t - adapter.tensors()[n]).square().sum()) for n, t in clipped.tensors().items()
    )
    assert change**0.5 == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_the_proximal_term_pulls_back(engine: PeftEngine) -> None:
    def distance(mu: float) -> float:
        adapter = start(engine)
        result = trained(
            engine, TrainPlan(adapter, training=replace(sgd(), lr=0.05, proximal_mu=mu)), batches(8)
        )
        return sum(
            float((t - adapter.tensors()[n]).square().sum()) for n, t in result.tensors().items()
        )

    assert distance(10.0) < distance(1.0) < distance(0.0)


def test_a_core_is_trained_between_frozen_factors(engine: PeftEngine) -> None:
    adapter = start(engine)
    cored = adapter.map_factors(
        {
            m: Factors(f.A, torch.randn_like(f.B), f.scale, torch.eye(3))
            for m, f in adapter.factors.items()
        }
    )
    plan = TrainPlan(cored, train=frozenset({"R"}), send=frozenset({"R"}), training=sgd())
    result = trained(engine, plan, batches(2))
    for module, f in result.factors.items():
        assert f.R is not None
        assert not torch.equal(f.R, torch.eye(3))
        assert torch.equal(f.A, cored.factors[module].A)
    assert trained(engine, TrainPlan(adapter), batches(1)).factors[module].R is None


def test_a_base_delta_is_applied_and_taken_back(engine: PeftEngine) -> None:
    path = next(iter(engine.base.adapted))
    before = engine.base.adapted[path].weight.clone()
    delta = {path: Factors(torch.randn(2, 32), torch.randn(32, 2), 1.0)}
    moved = engine.evaluate(start(engine), delta, batches(2))
    plain = engine.evaluate(start(engine), {}, batches(2))
    assert moved.loss_sum != plain.loss_sum
    assert torch.equal(engine.base.adapted[path].weight, before)


def test_dropout_is_seeded_by_site_and_round(tiny_model: Path) -> None:
    lora = LORA.model_copy(update={"dropout": 0.5})
    engine = PeftEngine(models.load_base(ModelSpec(source=str(tiny_model)), lora, 3), lora)
    plan = TrainPlan(start(engine), training=sgd(), site="a", round=1)

    def head(plan: TrainPlan) -> torch.Tensor:
        return torch.cat(
            [f.B.flatten() for f in trained(engine, plan, batches(2)).factors.values()]
        )

    assert torch.equal(head(plan), head(plan))
    assert not torch.equal(head(plan), head(replace(plan, site="b")))
    assert not torch.equal(head(plan), head(replace(plan, round=2)))
