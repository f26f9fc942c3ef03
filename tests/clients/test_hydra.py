"""HydraLoRA's layer and its engine: methods.md T5.1 to T5.6, and plain LoRA as the special case."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedft.clients.engines.hydra import HydraEngine, HydraLinear
from fedft.clients.engines.loop import PeftEngine
from fedft.core import models
from fedft.core.adapters import hydra
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import (
    Adapter,
    Batch,
    LocalTraining,
    TrainPlan,
    factor_name,
    head_name,
    part_of,
)

HYDRA = LoraSpec(method="hydralora", heads=3, rank=4, alpha=8)
EVERYTHING = frozenset({"A", "B", "router", "head"})


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> HydraEngine:
    return HydraEngine(models.load_base(ModelSpec(source=str(tiny_model)), HYDRA, 3), HYDRA)


def start(engine: HydraEngine) -> Adapter:
    return models.initial_adapter(engine.base.shapes, HYDRA, HYDRA.rank, seed=0)


def batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(2, 20, (4, 6), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator)
        made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return made


def layer(heads: int = 3) -> HydraLinear:
    """Random factors and router around a random linear layer, in float64."""
    torch.manual_seed(0)
    made = HydraLinear(nn.Linear(6, 5), rank=2, heads=heads, scale=1.5).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


X = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_mixing_then_applying_is_the_mixture() -> None:
    """T5.1: (sum_i w_i B_i) A x, token by token, in plain loops."""
    made = layer()
    weights, got = made.weights(X), made(X)
    for row in range(X.shape[0]):
        for token in range(X.shape[1]):
            x = X[row, token]
            B = sum(w.double() * B for w, B in zip(weights[row, token], made.lora_B, strict=True))
            expected = made.base_layer(x) + 1.5 * (B @ made.lora_A @ x)
            assert torch.allclose(got[row, token], expected, atol=1e-6)


def test_identical_heads_are_plain_lora_for_any_router() -> None:
    """T5.2."""
    made = layer()
    for B in made.lora_B:
        B.data = made.lora_B[0].data.clone()
    plain = made.base_layer(X) + 1.5 * (X @ made.lora_A.T @ made.lora_B[0].T)
    assert torch.allclose(made(X), plain, atol=1e-6)


def test_the_weights_are_positive_and_sum_to_one() -> None:
    """T5.5, and they depend on the token."""
    w = layer().weights(X)
    assert w.shape == (2, 7, 3)
    assert w.dtype == torch.float32
    assert bool((w > 0).all())
    assert torch.allclose(w.sum(-1), torch.ones(2, 7))
    assert not torch.allclose(w[0, 0], w[0, 1])


def test_before_training_it_is_the_base(engine: HydraEngine) -> None:
    """T5.4."""
    adapter = start(engine)
    assert all(not t.any() for n, t in adapter.head.items() if part_of(n) == "B")
    routers = [t for n, t in adapter.head.items() if part_of(n) == "router"]
    assert routers and all(t.any() for t in routers)
    engine.evaluate(adapter, {}, [])
    for path, linear in engine.base.adapted.items():
        x = torch.randn(3, linear.in_features)  # type: ignore[arg-type]
        assert torch.equal(engine.base.model.get_submodule(path)(x), linear(x))


def test_one_head_is_plain_lora_bit_for_bit(tiny_model: Path) -> None:
    """T5.3: no router, and dropout, clipping and AdamW do the same."""
    plain = LoraSpec(rank=4, alpha=8, dropout=0.1)
    one = LoraSpec(method="hydralora", heads=1, rank=4, alpha=8, dropout=0.1)
    results: list[dict[str, torch.Tensor]] = []
    for lora, kind in ((plain, PeftEngine), (one, HydraEngine)):
        made = kind(models.load_base(ModelSpec(source=str(tiny_model)), lora, 3), lora)
        begin = models.initial_adapter(made.base.shapes, lora, 4, seed=0)
        plan = TrainPlan(begin, training=LocalTraining(lr=1e-2), site="a", round=1)
        after = made.train([plan], [batches()])[0].adapter
        results.append({n.replace("lora_B.0.", "lora_B."): t for n, t in after.tensors().items()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_equal_heads_under_a_zero_router_stay_equal(engine: HydraEngine) -> None:
    """T5.6, and with the seed's router they do not."""
    adapter = start(engine)
    routers = {n: torch.zeros_like(t) for n, t in adapter.head.items() if part_of(n) == "router"}
    for begin, equal in ((adapter.replaced(routers), True), (adapter, False)):
        plan = TrainPlan(begin, train=EVERYTHING, training=LocalTraining(optimizer="sgd", lr=0.5))
        after = engine.train([plan], [batches(1)])[0].adapter
        for module in hydra.modules(after):
            first, *others = hydra.heads_of(after, module)
            assert first.any()
            assert all(torch.allclose(first, B, rtol=1e-5) for B in others) == equal


def test_only_the_heads_of_the_plan_learn_and_travel(engine: HydraEngine) -> None:
    begin = start(engine)
    plan = TrainPlan(begin, train=EVERYTHING, send=EVERYTHING - {"router"}, heads=(1,))
    after = engine.train([plan], [batches()])[0].adapter
    for module in hydra.modules(begin):
        moved = [bool(B.any()) for B in hydra.heads_of(after, module)]
        assert moved == [False, True, False]
    sent = plan.reply(after)
    assert {n for n in sent if part_of(n) == "B"} == {head_name(m, 1) for m in hydra.modules(begin)}
    assert not any(part_of(n) == "router" for n in sent)


def test_shapes_count_the_router() -> None:
    """N n more numbers a module than the paper's own count."""
    shapes = hydra.shapes({"q": (5, 6)}, rank=2, heads=3)
    assert shapes[factor_name("q", "router")] == (3, 6)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    assert sum(sizes.values()) == 2 * 6 + 3 * 5 * 2 + 3 * 6
    assert factor_name("q", "router") not in hydra.shapes({"q": (5, 6)}, rank=2, heads=1)


def test_cosines_between_heads() -> None:
    up = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    heads = {head_name("q", 0): up, head_name("q", 1): -up, head_name("q", 2): 0 * up}
    cosine = hydra.cosines(Adapter({}, {factor_name("q", "A"): up, **heads}))
    assert torch.allclose(cosine, torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 0]]).double())
