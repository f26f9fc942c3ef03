"""Plans that name halves of blocks: attention and feed-forward parts held one by one."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from fedft.clients.block_similarity import compare
from fedft.clients.engines.base import Engine
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import models, similarity, sublayers
from fedft.core.errors import MismatchError
from fedft.core.models import Base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.sublayers import HALVES, Half, Layer, Sublayer, sublayer_of
from fedft.core.types import Adapter, LocalTraining, TrainPlan, in_blocks
from fedft.core.wire import codec
from tests.clients.test_layers import DEPTH, MODELS, adapter_of, batches_of, network, same

# PEFT remarks that it adapts GPT-2's transposed layers, and does.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
kinds = pytest.mark.parametrize("kind", MODELS)
engines = pytest.mark.parametrize("engine", [PeftEngine, CohortEngine])
LORA = LoraSpec(rank=2, target_modules="all-linear")

ATTENTION = tuple(Sublayer(block, "attention") for block in range(DEPTH))
FEED_FORWARD = tuple(Sublayer(block, "feed-forward") for block in range(DEPTH))
ALL = (*ATTENTION, *FEED_FORWARD)
HELD: list[tuple[Layer, ...]] = [
    (ATTENTION[0], FEED_FORWARD[2], ATTENTION[3]),
    (FEED_FORWARD[0], 1, FEED_FORWARD[3]),
    (*ATTENTION[:2], FEED_FORWARD[1]),
]
"""Halves alone, halves beside a whole block, and both halves of one; not each block has one."""


def base_of(kind: str, model: nn.Module | None = None) -> Base:
    return Base(model or network(kind), LORA, MODELS[kind][1])


def plan_of(
    base: Base, layers: tuple[Layer, ...] | None, seed: int = 0, rank: int = 2
) -> TrainPlan:
    start = adapter_of(base, rank, seed)
    held = start if layers is None else start.narrowed(layers)
    training = LocalTraining(optimizer="sgd", lr=0.05)
    return TrainPlan(held, layers=layers, training=training, site=f"site-{seed}")


def logits_of(base: Base, layers: tuple[Layer, ...]) -> torch.Tensor:
    inputs = dict(batches_of(base)[0].inputs)
    with torch.inference_mode(), base.holding(layers):
        return base.model(**inputs, **_without_cache(base)).logits


def _without_cache(base: Base) -> dict[str, bool]:
    return {"use_cache": False} if base.task == "causal-lm" else {}


def test_paths_tell_the_half() -> None:
    assert sublayer_of("bert.encoder.layer.3.attention.output.dense") == (3, "attention")
    assert sublayer_of("bert.encoder.layer.3.output.dense") == (3, "feed-forward")
    assert sublayer_of("model.layers.11.post_attention_layernorm.weight") == (11, "feed-forward")
    assert sublayer_of("transformer.h.0.attn.c_attn") == (0, "attention")
    assert sublayer_of("bert.embeddings.word_embeddings") is None
    assert sublayer_of("model.layers.3.router.gate") is None
    layers: tuple[Layer, ...] = (1, Sublayer(2, "attention"))
    paths = ["m.0.attn.q", "m.1.mlp.up", "m.2.attn.q", "m.2.mlp.up", "m.2.router", "head"]
    assert [in_blocks(p, layers) for p in paths] == [False, True, True, False, False, True]


_GIVES = {"o_proj", "down_proj", "c_proj", "fc2"}
"""The last layer of a half, in models whose norms stand before it."""


def with_zeros(kind: str, layers: tuple[Layer, ...]) -> Base:
    """A whole model in which the halves that are not held add nothing: the residual stream stays."""
    base = base_of(kind)
    for path, linear in models.linears(base.model):
        if not in_blocks(path, layers) and path.rsplit(".", 1)[-1] in _GIVES:
            for parameter in linear.parameters():
                parameter.zero_()
    return base


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "bert"])
@pytest.mark.parametrize("layers", HELD)
def test_a_pre_norm_half_that_is_left_out_adds_nothing(
    kind: str, layers: tuple[Layer, ...]
) -> None:
    base = base_of(kind)
    expected = logits_of(with_zeros(kind, layers), tuple(range(DEPTH)))
    assert torch.equal(logits_of(base, layers), expected)
    assert not torch.equal(logits_of(base, tuple(range(DEPTH))), expected)  # and whole again


@pytest.mark.parametrize("half", HALVES)
def test_a_post_norm_half_is_left_out_with_its_norm(half: Half) -> None:
    base = base_of("bert")
    block = base.blocks[1]
    assert isinstance(block, nn.Module)
    states = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if half == "attention":
            expected = block.attention(states)[0]
        else:
            expected = block.output(block.intermediate(states), states)
        whole = block(states)
        with base.holding((Sublayer(1, half),)):
            assert torch.equal(block(states), expected)
        assert torch.equal(block(states), whole)
        assert not torch.equal(whole, expected)


@kinds
def test_both_engines_train_the_same_halves(kind: str) -> None:
    oracle, engine = PeftEngine(base_of(kind), LORA), CohortEngine(base_of(kind), LORA)
    held = [HELD[0], None, HELD[1], HELD[0]]
    plans = [plan_of(engine.base, layers, k) for k, layers in enumerate(held)]
    plans.append(plan_of(engine.base, (FEED_FORWARD[DEPTH - 1],), 4, rank=1))
    own = [batches_of(engine.base) for _ in plans]
    for plan, x, y in zip(plans, oracle.train(plans, own), engine.train(plans, own), strict=True):
        a, b = x.adapter.tensors(), y.adapter.tensors()
        assert list(a) == list(b) == list(plan.start.tensors())
        assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 1e-10
        assert x.metrics["loss"] == pytest.approx(y.metrics["loss"], abs=1e-10)
    for plan in plans:
        scores = [e.evaluate(plan.start, {}, own[0], plan.layers) for e in (oracle, engine)]
        assert scores[0].loss_sum == pytest.approx(scores[1].loss_sum, abs=1e-10)


@engines
@kinds
def test_all_halves_by_name_are_the_whole_model_bit_for_bit(engine: type, kind: str) -> None:
    trainer: Engine = engine(base_of(kind), LORA)
    own = [batches_of(trainer.base)]
    whole = trainer.train([plan_of(trainer.base, None)], own)[0]
    named = trainer.train([plan_of(trainer.base, ALL)], own)[0]
    assert same(whole.adapter, named.adapter)
    assert whole.metrics == named.metrics


@engines
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_halves_that_run_again_in_the_backward_pass_are_the_same(engine: type, kind: str) -> None:
    results: list[Adapter] = []
    for checkpointing in (False, True):
        trainer: Engine = engine(base_of(kind), LORA, checkpointing=checkpointing)
        plan = plan_of(trainer.base, (*HELD[0], FEED_FORWARD[DEPTH - 1]))
        results.append(trainer.train([plan], [batches_of(trainer.base)])[0].adapter)
    assert same(*results)


@engines
@pytest.mark.parametrize("kind", ["bert", "llama", "dinov2"])
def test_what_is_not_held_is_not_looked_at(engine: type, kind: str) -> None:
    trainer: Engine = engine(base_of(kind), LORA)
    own = [batches_of(trainer.base)]
    plan = plan_of(trainer.base, HELD[0])
    alone: Engine = engine(base_of(kind), LORA)
    expected = alone.train([plan], own)[0]
    trainer.train([plan_of(trainer.base, None)], own)  # leaves gradients of every layer behind
    for index, half in product(range(DEPTH), HALVES):
        if (index, half) not in HELD[0]:
            for child in sublayers.children(trainer.base.blocks[index], half).values():
                frozen = [p for n, p in child.named_parameters() if "lora_" not in n]
                assert frozen
                for parameter in frozen:
                    parameter.data.fill_(float("nan"))
    result = trainer.train([plan], own)[0]
    assert {sublayer_of(m) for m in result.adapter.factors if ".pooler" not in m} == set(HELD[0])
    assert same(result.adapter, expected.adapter)
    assert result.metrics == expected.metrics


def test_the_wire_carries_the_held_halves_alone() -> None:
    base = base_of("llama")
    plan = plan_of(base, HELD[1])
    content = codec.Encoder("{}").train(plan)
    sent = content.array_records["arrays"]
    assert set(sent) == plan.start.tensors().keys()
    assert {sublayer_of(n) for n in sent} == {*FEED_FORWARD[:2], ATTENTION[1], FEED_FORWARD[3]}
    back = codec.train_plan(content, adapter_of(base), seed=0)
    assert back.layers == HELD[1]
    assert list(back.start.tensors()) == list(plan.start.tensors())


def test_blocks_of_another_kind_are_not_divided() -> None:
    """Gemma 2 has norms on both sides of each half, and Phi runs both on one norm."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

    sizes = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    gemma = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8)
    for model in (Gemma2ForCausalLM(gemma), PhiForCausalLM(PhiConfig(**sizes))):
        base = Base(model.eval().requires_grad_(False), LORA, "causal-lm")
        with pytest.raises(MismatchError, match="cannot be told"), base.holding((ATTENTION[0],)):
            pass
        with base.holding((0,)):
            pass


# ── a base that holds nothing but what it is asked for ────────────────────────────────────────


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for kind in MODELS:
        found[kind] = tmp_path_factory.mktemp(kind)
        network(kind).float().save_pretrained(found[kind])  # type: ignore[operator]
    return found


def loaded(kind: str, folder: Path, *, lean: bool) -> Base:
    spec = ModelSpec(source=str(folder), task=MODELS[kind][1])  # type: ignore[arg-type]
    base = models.load_base(spec, LORA, 3, lean=lean)
    for name, parameter in base.model.named_parameters():
        if base.head.holds(name):
            parameter.data.fill_(0.5)  # a placeholder, drawn at random
    return base


def in_memory(base: Base) -> set[Sublayer]:
    """The halves of which any weight is in memory."""
    return {
        Sublayer(index, half)
        for (index, block), half in product(enumerate(base.blocks), HALVES)
        if any(
            not p.is_meta for c in sublayers.children(block, half).values() for p in c.parameters()
        )
    }


@kinds
def test_a_lean_base_has_only_the_halves_it_is_asked_for(
    kind: str, folders: dict[str, Path]
) -> None:
    base, whole = (loaded(kind, folders[kind], lean=lean) for lean in (True, False))
    batch = batches_of(base)[0]
    inputs = {n: x.float() if x.is_floating_point() else x for n, x in batch.inputs.items()}
    assert in_memory(base) == set()
    for layers in [HELD[0], HELD[1], (1,), (ATTENTION[1],), HELD[2], None, (FEED_FORWARD[1],)]:
        with torch.inference_mode(), base.holding(layers), whole.holding(layers):
            options = _without_cache(base)
            assert torch.equal(
                base.model(**inputs, **options).logits, whole.model(**inputs, **options).logits
            )
        named = ALL if layers is None else layers
        assert in_memory(base) == {la for la in ALL if la in named or la.block in named}


def test_a_lean_base_is_shifted_half_by_half(folders: dict[str, Path]) -> None:
    base, whole = (loaded("llama", folders["llama"], lean=lean) for lean in (True, False))
    drawn = adapter_of(base).factors
    inputs = dict(batches_of(base)[0].inputs)
    for layers in [HELD[0], (ATTENTION[0],), (0, 3), HELD[1], HELD[0]]:
        own = {m: f for m, f in drawn.items() if in_blocks(m, layers)}
        with torch.inference_mode(), base.holding(layers, own), whole.holding(layers, drawn):
            assert torch.equal(base.model(**inputs).logits, whole.model(**inputs).logits)
    with torch.inference_mode(), base.holding(None), whole.holding(None):
        assert torch.equal(base.model(**inputs).logits, whole.model(**inputs).logits)


# ── comparing halves ──────────────────────────────────────────────────────────────────────────


def blank(base: Base) -> Adapter:
    """An adapter that changes nothing."""
    drawn = adapter_of(base)
    return drawn.replaced({n: t * 0 for n, t in drawn.tensors(frozenset({"B"})).items()})


def test_a_comparison_of_halves_by_hand() -> None:
    """The residual stream after each half of BERT's blocks, from transformers' own hidden states."""
    engine = CohortEngine(base_of("bert"), LORA)
    batches = batches_of(engine.base)
    pooled: list[list[torch.Tensor]] = [[] for _ in ALL]
    influence: list[list[torch.Tensor]] = [[] for _ in ALL]
    for batch in batches:
        mask = batch.inputs["attention_mask"].bool()
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
        with torch.inference_mode():
            states = engine.base.model(**batch.inputs, output_hidden_states=True).hidden_states
            stream = [states[0]]
            for index, block in enumerate(engine.base.blocks):
                stream.append(block.attention(states[index], bias[:, None, None])[0])  # type: ignore[operator]
                stream.append(states[index + 1])
        for k in range(len(ALL)):
            for before, after, own in zip(stream[k], stream[k + 1], mask, strict=True):
                pooled[k].append(after[own].mean(0))
                cosine = nn.functional.cosine_similarity(before[own], after[own], dim=-1)
                influence[k].append(1 - cosine)
    expected = similarity.linear_cka([torch.stack(rows) for rows in pooled])
    found = compare(engine, blank(engine.base), {}, batches, "block-influence", "sublayer")
    assert torch.allclose(found.similarity, similarity.upper(expected), atol=1e-9)
    means = torch.stack([torch.cat(each).mean() for each in influence])
    assert torch.allclose(found.importance, means, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "dinov2"])
def test_halves_are_compared_alike_in_every_engine_and_on_a_lean_base(
    kind: str, folders: dict[str, Path]
) -> None:
    bases = [loaded(kind, folders[kind], lean=lean) for lean in (False, False, True)]
    compared = [
        PeftEngine(bases[0], LORA),
        CohortEngine(bases[1], LORA),
        CohortEngine(bases[2], LORA),
    ]
    adapter = adapter_of(bases[0])
    adapter = adapter.replaced({n: t.float() for n, t in adapter.tensors().items()})
    batches = batches_of(bases[0])
    for batch in batches:
        if "pixel_values" in batch.inputs:
            batch.inputs["pixel_values"] = batch.inputs["pixel_values"].float()  # type: ignore[index]
    answers = [compare(e, adapter, {}, batches, "block-influence", "sublayer") for e in compared]
    for other in answers[1:]:
        assert torch.allclose(other.similarity, answers[0].similarity, atol=1e-5)
        assert torch.allclose(other.importance, answers[0].importance, atol=1e-5)
    assert len(answers[0].importance) == 2 * DEPTH
    assert len({layer.block for layer in in_memory(bases[2])}) == 1  # no two were ever there


def test_a_half_that_does_nothing_has_no_importance() -> None:
    engine = CohortEngine(with_zeros("llama", tuple(la for la in ALL if la != ATTENTION[2])), LORA)
    for kind in ("block-influence", "ablation"):
        found = compare(engine, blank(engine.base), {}, batches_of(engine.base), kind, "sublayer")
        idle = 2 * 2  # attention of block 2
        assert float(found.importance[idle]) == pytest.approx(0, abs=1e-12)
        others = torch.cat([found.importance[:idle], found.importance[idle + 1 :]])
        assert float(others.abs().min()) > 1e-6
