"""The loss over a vocabulary in slices, against torch's cross-entropy of all logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from fedft.clients.block_similarity import compare
from fedft.clients.engines import chunked_loss
from fedft.clients.engines.base import Engine
from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.metrics import Tally
from fedft.core.models import Base, initial_adapter
from fedft.core.spec import LoraSpec
from fedft.core.tasks import task_of
from fedft.core.types import Adapter, Batch, LocalTraining, TrainPlan

WORDS, WIDTH = 37, 12
LORA = LoraSpec(rank=2, target_modules=("q_proj", "v_proj"))
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@pytest.fixture(params=[1, 5, 64], ids="{} words at a time".format)
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "WINDOW", 0)
    monkeypatch.setattr(chunked_loss, "_NARROWEST", request.param)


def layer_of(dtype: torch.dtype, *, bias: bool = False, spread: float = 1.0) -> nn.Linear:
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * spread)
    return layer


def tokens(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """States, targets, and weights of their losses."""
    g = torch.Generator().manual_seed(1)
    states = torch.randn(count, WIDTH, generator=g).to(dtype)
    return states, torch.randint(WORDS, (count,), generator=g), torch.rand(count, generator=g)


def gradient(losses: Tensor, weights: Tensor, states: Tensor) -> Tensor:
    return torch.autograd.grad(losses @ weights.to(losses.dtype), states)[0]


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_losses_and_gradients_are_those_of_all_logits(bias: bool, spread: float) -> None:
    layer = layer_of(torch.float64, bias=bias, spread=spread)
    states, targets, weights = tokens(23, torch.float64)
    states.requires_grad_()
    plain = F.cross_entropy(layer(states), targets, reduction="none")
    sliced = Vocabulary(layer).losses(states, targets)
    assert torch.allclose(sliced, plain, rtol=0, atol=1e-10)
    expected = gradient(plain, weights, states)
    assert torch.allclose(gradient(sliced, weights, states), expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_token_keeps_a_precise_gradient(dtype: torch.dtype) -> None:
    """It is all but 1e-6 sure of a word, and 1 - p has lost nearly all its digits in float32."""
    layer = layer_of(dtype)
    layer.weight[0] = layer.weight[:, 0].max() + 4
    states = torch.ones(1, WIDTH, dtype=dtype) / 4
    exact = nn.Linear(WIDTH, WORDS, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(layer.weight)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for own, x in ((layer, states), (exact, states.double())):
        x.requires_grad_()
        each = Vocabulary(own).losses(x, torch.tensor([0]))
        losses.append(each.detach().double())
        gradients.append(gradient(each, torch.ones(1), x).double())
    assert 0 < losses[1] < 1e-3
    close = 1e-5 if dtype == torch.float32 else 0.1  # logits of 12 are rounded to 0.03
    assert torch.allclose(gradients[0], gradients[1], rtol=close)
    assert torch.allclose(losses[0], losses[1], rtol=close)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tally_is_that_of_all_logits(dtype: torch.dtype) -> None:
    """Words 3 and 7 always tie: the first one counts, in one slice or in two."""
    layer = layer_of(dtype)
    layer.weight[7] = layer.weight[3]
    states, targets, _ = tokens(200, dtype)
    states[:20] = layer.weight[3]
    targets[:20] = torch.tensor([3, 7]).repeat(10)
    task = task_of("causal-lm")
    plain, sliced = (
        task.tally(layer(states), targets),
        Vocabulary(layer).tally(task, states, targets),
    )
    assert (sliced.sums, sliced.count) == (plain.sums, plain.count)
    assert sliced.sums["correct"] >= 10
    assert sliced.loss_sum == pytest.approx(plain.loss_sum, rel=1e-5)


def test_no_token_and_unknown_words() -> None:
    vocabulary_ = Vocabulary(layer_of(torch.float32))
    none = vocabulary_.losses(torch.zeros(0, WIDTH, requires_grad=True), torch.zeros(0).long())
    assert none.shape == (0,)
    with pytest.raises(IndexError, match="37 words"):
        vocabulary_.losses(torch.zeros(1, WIDTH), torch.tensor([WORDS]))


def test_every_row_is_released_once() -> None:
    released: list[int] = []
    layer = layer_of(torch.float32)
    scorer = Vocabulary(layer, lambda start, stop: released.extend(range(start, stop)))
    scorer.losses(torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    assert released == list(range(WORDS))


# ------------------------------------------------------------------------- in both engines


def base_of(config: PreTrainedConfig, lora: LoraSpec = LORA) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # defaults leave attention nearly uniform
            parameter.data += 0.2 * torch.randn_like(parameter)
    return Base(model.double().eval().requires_grad_(False), lora, "causal-lm")


def some_batches() -> list[Batch]:
    """Uneven rows; of one no token is scored."""
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    ids = [torch.randint(2, WORDS, (3, 9), generator=g) * mask for _ in range(2)]
    scored = mask & (torch.arange(9) > 3)
    scored[1] = False
    return [
        Batch({"input_ids": own, "attention_mask": mask.long()}, own.masked_fill(~scored, -100))
        for own in ids
    ]


def outcome(engine: Engine) -> tuple[Adapter, dict[str, float], Tally]:
    start = initial_adapter(engine.base.shapes, LORA, 2, seed=0)
    start = start.replaced({n: t.double() for n, t in start.tensors().items()})
    plan = TrainPlan(start, training=LocalTraining(lr=1e-2, optimizer="sgd"))
    (trained,) = engine.train([plan], [some_batches()])
    tally = engine.evaluate(trained.adapter, {}, some_batches())
    return trained.adapter, dict(trained.metrics), tally


def apart(x: Adapter, y: Adapter) -> float:
    a, b = x.tensors(), y.tensors()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


ENGINES: list[Callable[[Base], Engine]] = [
    lambda base: PeftEngine(base, LORA),
    lambda base: CohortEngine(base, LORA),
]


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("make", ENGINES, ids=["loop", "cohort"])
def test_an_engine_trains_and_scores_as_with_all_logits(make: Callable[[Base], Engine]) -> None:
    sliced, plain = base_of(LlamaConfig(**SIZES)), base_of(LlamaConfig(**SIZES))
    assert sliced.output is not None
    plain.output = None
    (a, metrics, tally), (b, expected, whole) = (outcome(make(base)) for base in (sliced, plain))
    assert apart(a, initial_adapter(sliced.shapes, LORA, 2, seed=0)) > 1e-4
    assert apart(a, b) < 1e-10
    assert metrics == pytest.approx(expected, rel=1e-10)
    assert (tally.sums, tally.count) == (whole.sums, whole.count)
    assert tally.loss_sum == pytest.approx(whole.loss_sum, rel=1e-10)
    ids = some_batches()[0].inputs
    assert torch.equal(sliced.model(**ids).logits, plain.model(**ids).logits)  # left as it was


CHANGED = {"gemma2": {"head_dim": 8}, "granite": {"logits_scaling": 8.0}, "cohere": {}}
"""Models that do something to the answer of their last layer."""


@pytest.mark.parametrize("kind", CHANGED)
def test_a_model_that_changes_its_logits_makes_them_itself(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES, **CHANGED[kind])
    base, twin = base_of(config), base_of(config)
    assert base.output is None
    (a, metrics, tally), (b, expected, whole) = (
        outcome(make(own)) for make, own in zip(ENGINES, (base, twin), strict=True)
    )
    assert apart(a, b) < 1e-9
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    assert tally.loss_sum == pytest.approx(whole.loss_sum, rel=1e-9)


def test_without_its_cap_the_same_model_is_scored_in_slices() -> None:
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)
    assert base_of(config).output is not None


def test_an_output_layer_that_is_adapted_makes_its_logits() -> None:
    config = BertConfig(**SIZES, is_decoder=True)
    base = base_of(config, LoraSpec(rank=2, target_modules=("query",)))
    assert Vocabulary.of(base) is not None
    base = base_of(config, LoraSpec(rank=2, target_modules=("decoder",)))
    assert base.output is not None
    assert Vocabulary.of(base) is None


def test_blocks_are_compared_without_any_logits() -> None:
    base = base_of(LlamaConfig(**SIZES))
    assert base.output is not None

    def never(_: Tensor) -> Tensor:
        raise AssertionError("the output layer runs")

    vars(base.output.layer)["forward"] = never
    start = initial_adapter(base.shapes, LORA, 2, seed=0)
    found = compare(CohortEngine(base, LORA), start, {}, some_batches(), "block-influence")
    assert found.importance.shape == (2,)
    assert vars(base.output.layer)["forward"] is never  # put back
