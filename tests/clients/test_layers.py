"""Plans that name layers: a model of some blocks alone, in both engines."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import models
from fedft.core.errors import MismatchError
from fedft.core.models import Base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Batch, Factors, LocalTraining, TrainPlan, block_of
from fedft.core.wire import codec

CLASSES, VOCABULARY, DEPTH = 3, 30, 4


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=24,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=DEPTH,
        n_head=2,
        n_positions=24,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return Dinov2ForImageClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


MODELS = {
    "bert": (_bert, "classification", ("query", "value")),
    "llama": (_llama, "causal-lm", ("q_proj", "v_proj")),
    "gpt2": (_gpt2, "causal-lm", ("c_attn",)),
    "dinov2": (_dinov2, "image-classification", ("q_proj", "v_proj")),
    "vit": (_vit, "image-classification", ("q_proj", "v_proj")),
}
kinds = pytest.mark.parametrize("kind", MODELS)
# PEFT remarks that it adapts GPT-2's transposed layers, and does.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def network(kind: str) -> nn.Module:
    build, _, _ = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():  # defaults leave attention nearly uniform
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(torch.float64).eval().requires_grad_(False)


def base_of(kind: str, model: nn.Module | None = None) -> Base:
    _, task, names = MODELS[kind]
    return Base(model or network(kind), LoraSpec(target_modules=names), task)


def adapter_of(base: Base, rank: int = 2, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.2

    factors = {
        path: Factors(draw(rank, d_in), draw(d_out, rank), 2.0)
        for path, (d_out, d_in) in base.shapes.modules.items()
    }
    return Adapter(factors, {name: draw(*shape) for name, shape in base.shapes.head.items()})


def batches_of(base: Base, count: int = 2) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    made: list[Batch] = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (3,), generator=g)
        if base.task == "image-classification":
            pixels = torch.randn(3, 3, 8, 8, generator=g, dtype=torch.float64)
            made.append(Batch({"pixel_values": pixels}, labels))
            continue
        ids = torch.stack([torch.randperm(VOCABULARY - 1, generator=g)[:7] + 1 for _ in range(3)])
        mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
        answers = torch.where(mask.bool(), ids, -100)
        labels = answers if base.task == "causal-lm" else labels
        made.append(Batch({"input_ids": ids * mask, "attention_mask": mask}, labels))
    return made


def plan_of(base: Base, layers: tuple[int, ...] | None, seed: int = 0, rank: int = 2) -> TrainPlan:
    start = adapter_of(base, rank, seed)
    training = LocalTraining(optimizer="sgd", lr=0.1)
    held = start if layers is None else start.narrowed(layers)
    return TrainPlan(held, layers=layers, training=training, site=f"site-{seed}")


def same(x: Adapter, y: Adapter) -> bool:
    a, b = x.tensors(), y.tensors()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@kinds
def test_blocks_that_are_not_held_are_as_if_cut_out(kind: str) -> None:
    """Against a network whose list of blocks really is shorter."""
    layers = (0, 2)
    base, short = base_of(kind), network(kind)
    blocks = models.block_list(short)
    assert blocks is not None
    del blocks[3], blocks[1]
    inputs = dict(batches_of(base)[0].inputs)
    with torch.inference_mode(), base.holding(layers):
        logits = base.model(**inputs, **_without_cache(base)).logits
    assert torch.equal(logits, short(**inputs, **_without_cache(base)).logits)
    with torch.inference_mode():
        assert not torch.equal(logits, base.model(**inputs).logits)  # and whole again


def _without_cache(base: Base) -> dict[str, bool]:
    return {"use_cache": False} if base.task == "causal-lm" else {}


@kinds
def test_both_engines_train_the_same_submodel(kind: str) -> None:
    oracle, engine = PeftEngine(base_of(kind), LoraSpec()), CohortEngine(base_of(kind), LoraSpec())
    plans = [plan_of(engine.base, layers, k) for k, layers in enumerate([(1, 2), None, (1, 2)])]
    plans.append(plan_of(engine.base, (3,), 3, rank=1))
    own = [batches_of(engine.base) for _ in plans]
    for plan, x, y in zip(plans, oracle.train(plans, own), engine.train(plans, own), strict=True):
        a, b = x.adapter.tensors(), y.adapter.tensors()
        assert list(a) == list(b) == list(plan.start.tensors())
        assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 1e-10
        assert x.metrics["loss"] == pytest.approx(y.metrics["loss"], abs=1e-10)
    layers, adapter = plans[0].layers, plans[0].start
    scores = [e.evaluate(adapter, {}, own[0], layers).loss_sum for e in (oracle, engine)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-10)
    assert scores[0] != pytest.approx(engine.evaluate(adapter_of(engine.base), {}, own[0]).loss_sum)


@pytest.mark.parametrize("engine", [PeftEngine, CohortEngine])
def test_all_layers_by_name_are_the_whole_model_bit_for_bit(engine: type) -> None:
    trainer = engine(base_of("bert"), LoraSpec())
    own = [batches_of(trainer.base)]
    whole = trainer.train([plan_of(trainer.base, None)], own)[0]
    named = trainer.train([plan_of(trainer.base, tuple(range(DEPTH)))], own)[0]
    assert same(whole.adapter, named.adapter)
    assert whole.metrics == named.metrics


@pytest.mark.parametrize("engine", [PeftEngine, CohortEngine])
def test_what_is_not_held_has_no_gradient_and_is_not_answered(engine: type) -> None:
    trainer = engine(base_of("bert"), LoraSpec())
    own = [batches_of(trainer.base)]
    trainer.train([plan_of(trainer.base, None)], own)  # leaves gradients of every layer behind
    plan = plan_of(trainer.base, (2,))
    # What the skipped blocks are worth does not matter: nothing of them is looked at.
    for path, linear in trainer.base.adapted.items():
        if block_of(path) != 2:
            linear.weight.fill_(float("nan"))
    result = trainer.train([plan], own)[0]
    assert {block_of(m) for m in result.adapter.factors} == {2}
    assert plan.reply(result.adapter).keys() == plan.sent().keys()
    assert all(bool(t.isfinite().all()) for t in result.adapter.tensors().values())
    alone = base_of("bert")
    fresh = engine(alone, LoraSpec()).train([plan_of(alone, (2,))], own)[0]
    assert result.metrics == fresh.metrics  # no gradient of other layers is counted either


def test_the_wire_carries_the_held_layers_alone() -> None:
    base = base_of("bert")
    plan = replace(plan_of(base, (1, 3)), delta={})
    content = codec.Encoder("{}").train(plan)
    assert set(content.array_records["arrays"]) == plan.start.tensors().keys()
    assert {block_of(n) for n in content.array_records["arrays"] if "lora" in n} == {1, 3}
    back = codec.train_plan(content, adapter_of(base), seed=0)
    assert back.layers == (1, 3)
    assert list(back.start.tensors()) == list(plan.start.tensors())


@pytest.mark.parametrize(
    ("layers", "message"), [((1, 9, 7), r"\[7, 9\].*none of them"), ((), "no block at all")]
)
def test_layers_that_do_not_exist_are_named(layers: tuple[int, ...], message: str) -> None:
    engine = CohortEngine(base_of("bert"), LoraSpec())
    plan = plan_of(engine.base, layers)
    with pytest.raises(MismatchError, match=message):
        engine.train([plan], [batches_of(engine.base)])


def test_a_model_whose_blocks_give_tuples_is_refused() -> None:
    base = base_of("bert")

    class Pair(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    blocks = models.block_list(base.model)
    assert blocks is not None
    blocks[1] = Pair()
    with pytest.raises(MismatchError, match="left out"), base.holding((0,)):
        pass


# ── a base that holds nothing but what it is asked for ────────────────────────────────────────


def lean_base(folder: Path, *, lean: bool = True) -> Base:
    base = models.load_base(ModelSpec(source=str(folder)), LoraSpec(), CLASSES, lean=lean)
    for parameter in base.model.get_submodule("classifier").parameters():
        parameter.data.fill_(0.5)  # a placeholder, drawn at random
    return base


def where(base: Base) -> list[bool]:
    """Of each block, whether its weights are in memory."""
    return [not next(block.parameters()).is_meta for block in base.blocks]


def test_a_lean_base_has_only_the_blocks_it_is_asked_for(tiny_model: Path) -> None:
    base, whole = lean_base(tiny_model), lean_base(tiny_model, lean=False)
    assert base.lean
    assert not whole.lean
    assert where(base) == [False, False]
    assert base.shapes == whole.shapes
    ids = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    for layers in [(1,), (0,), None, (1,)]:
        with torch.inference_mode(), base.holding(layers), whole.holding(layers):
            assert torch.equal(base.model(**ids).logits, whole.model(**ids).logits)
        assert where(base) == [layers is None or i in layers for i in range(2)]


def test_a_lean_base_is_shifted_block_by_block_and_forgets_what_it_lets_go(
    tiny_model: Path,
) -> None:
    base, whole = lean_base(tiny_model), lean_base(tiny_model, lean=False)
    g = torch.Generator().manual_seed(0)
    delta = {
        path: Factors(torch.randn(2, n, generator=g), torch.randn(m, 2, generator=g), 1.0)
        for path, (m, n) in base.shapes.modules.items()
    }
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    for layers in [(1,), (0,), (1,), (0, 1)]:
        own = {m: f for m, f in delta.items() if block_of(m) in layers}
        with torch.inference_mode(), base.holding(layers, own), whole.holding(layers, delta):
            assert torch.equal(base.model(**ids).logits, whole.model(**ids).logits)
    with torch.inference_mode(), base.holding(None), whole.holding(None):
        assert torch.equal(base.model(**ids).logits, whole.model(**ids).logits)


def test_a_lean_base_trains_as_the_resident_one(tiny_model: Path) -> None:
    results: list[Adapter] = []
    for lean in (True, False):
        engine = CohortEngine(lean_base(tiny_model, lean=lean), LoraSpec(rank=2))
        start = models.initial_adapter(engine.base.shapes, LoraSpec(rank=2), 2, seed=0)
        ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
        batch = Batch({"input_ids": ids, "attention_mask": ids.ne(0).long()}, torch.tensor([0, 2]))
        plan = TrainPlan(start.narrowed((1,)), layers=(1,))
        results.append(engine.train([plan], [[batch, batch]])[0].adapter)
    assert same(*results)
