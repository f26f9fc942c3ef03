"""The cohort engine against the plain PEFT loop, on tiny models with random weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedft.clients.engines import attention, cohort
from fedft.clients.engines.attention import PackedAttention, group_rows
from fedft.clients.engines.base import Trained
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.grouping import groups
from fedft.clients.engines.loop import PeftEngine
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.models import Base
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, Batch, Factors, LocalTraining, Part, TrainPlan, part_of

# PEFT remarks that it adapts GPT-2's transposed layers, and does.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

VOCABULARY, CLASSES, PAD = 50, 3, 1


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=CLASSES,
            pad_token_id=PAD,
        )
    )


def _roberta() -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=CLASSES,
            pad_token_id=PAD,
        )
    )


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=CLASSES,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            pad_token_id=PAD,
            bos_token_id=0,
            eos_token_id=PAD,
        )
    )


def _dinov2() -> nn.Module:
    return Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )


MODELS: dict[str, tuple[Any, str, Any]] = {
    "bert": (_bert, "classification", ("query", "value")),
    "bert-all": (_bert, "classification", "all-linear"),
    "roberta": (_roberta, "classification", ("query", "value")),
    "llama": (lambda: LlamaForCausalLM(_llama_config()), "causal-lm", ("q_proj", "v_proj")),
    "llama-all": (lambda: LlamaForCausalLM(_llama_config()), "causal-lm", "all-linear"),
    "llama-score": (
        lambda: LlamaForSequenceClassification(_llama_config()),
        "classification",
        ("q_proj", "v_proj"),
    ),
    "gpt2": (_gpt2, "causal-lm", ("c_attn", "c_fc")),
    "dinov2": (_dinov2, "image-classification", "all-linear"),
}


def make_base(kind: str, dtype: torch.dtype = torch.float64) -> Base:
    build, task, names = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():  # defaults leave attention nearly uniform
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).eval().requires_grad_(False)
    return Base(model, LoraSpec(target_modules=names), task)


_cache: dict[tuple[str, torch.dtype, float], tuple[PeftEngine, CohortEngine]] = {}


def engines(
    kind: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> tuple[PeftEngine, CohortEngine]:
    """The oracle and the engine, each on its own copy of one model."""
    key = (kind, dtype, dropout)
    if key not in _cache:
        lora = LoraSpec(dropout=dropout)
        _cache[key] = (
            PeftEngine(make_base(kind, dtype), lora),
            CohortEngine(make_base(kind, dtype), lora),
        )
    return _cache[key]


def make_adapter(base: Base, rank: int, seed: int, scale: float, core: bool = False) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    dtype = next(base.model.parameters()).dtype

    def draw(*shape: int, std: float = 0.2) -> torch.Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * std).to(dtype)

    factors = {
        path: Factors(
            draw(rank, d_in), draw(d_out, rank), scale, draw(rank, rank) if core else None
        )
        for path, (d_out, d_in) in base.shapes.modules.items()
    }
    return Adapter(factors, {name: draw(*shape) for name, shape in base.shapes.head.items()})


def make_batch(base: Base, rows: int, lengths: Sequence[int], seed: int) -> Batch:
    """``rows`` rows of the given lengths (cyclic), padded to the longest.

    No token occurs twice in a row and, where sites are mixed, no row has fewer than three: where a
    scored token sees one value only, its query's gradient is exactly zero, and AdamW would divide
    what rounding leaves of it by 1e-8.
    """
    g = torch.Generator().manual_seed(seed)
    if base.task == "image-classification":
        dtype = next(base.model.parameters()).dtype
        pixels = torch.randn(rows, 3, 8, 8, generator=g).to(dtype)
        return Batch({"pixel_values": pixels}, torch.randint(CLASSES, (rows,), generator=g))
    own = [lengths[i % len(lengths)] for i in range(rows)]
    ids = torch.stack([torch.randperm(VOCABULARY - 2, generator=g)[: max(own)] + 2 for _ in own])
    mask = (torch.arange(max(own)) < torch.tensor(own)[:, None]).long()
    ids = torch.where(mask.bool(), ids, PAD)
    if base.task == "causal-lm":
        labels = torch.where(mask.bool() & (torch.arange(max(own)) > 0), ids, -100)
    else:
        labels = torch.randint(CLASSES, (rows,), generator=g)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels)


def difference(x: Trained, y: Trained) -> float:
    """Largest difference of any tensor or metric."""
    a, b = x.adapter.tensors(), y.adapter.tensors()
    assert list(a) == list(b)
    assert x.metrics.keys() == y.metrics.keys()
    assert all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)
    tensors = max(float((a[n] - b[n]).abs().max()) for n in a)
    return max(tensors, *(abs(x.metrics[m] - y.metrics[m]) for m in x.metrics))


# ----------------------------------------------------------------------------- equality

TRAINED: list[tuple[frozenset[Part], bool]] = [
    (frozenset({"A", "B", "head"}), False),
    (frozenset({"B", "head"}), False),  # FFA-LoRA
    (frozenset({"A"}), False),  # RoLoRA, odd rounds
    (frozenset({"R"}), True),  # Fed-SB
    (frozenset({"A", "R", "B", "head"}), True),
]

locals_of = st.builds(
    LocalTraining,
    lr=st.sampled_from([1e-3, 5e-3, 2e-2]),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    clip_norm=st.sampled_from([None, 0.05, 1.0]),
    proximal_mu=st.sampled_from([0.0, 0.3]),
    tail_penalty=st.sampled_from([0.0, 0.2]),
    tail_keep=st.sampled_from([0.0, 0.5, 1.0]),
)


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    """One site: how it trains, and the rows and lengths of its batches."""
    return {
        "rank": draw(st.integers(1, 5)),
        "scale": draw(st.sampled_from([0.5, 2.0])),
        "training": draw(locals_of),
        "batches": draw(
            st.lists(
                st.tuples(
                    st.integers(1, 4),
                    st.lists(st.integers(3, 38), min_size=1, max_size=4),
                ),
                max_size=3,
            )
        ),
    }


def build(
    base: Base, own: Sequence[dict[str, Any]], trained: tuple[frozenset[Part], bool]
) -> tuple[list[TrainPlan], list[list[Batch]]]:
    parts, core = trained
    if base.task == "causal-lm" and parts == {"B", "head"}:
        parts = frozenset({"B"})
    plans = [
        TrainPlan(
            start=make_adapter(base, site["rank"], k, site["scale"], core),
            train=parts,
            training=site["training"],
            site=f"site-{k}",
        )
        for k, site in enumerate(own)
    ]
    batches = [
        [make_batch(base, *shape, seed=100 * k + i) for i, shape in enumerate(site["batches"])]
        for k, site in enumerate(own)
    ]
    return plans, batches


def check(
    kind: str,
    own: Sequence[dict[str, Any]],
    trained: tuple[frozenset[Part], bool],
    dropout: float = 0.0,
) -> None:
    oracle, engine = engines(kind, dropout=dropout)
    plans, batches = build(engine.base, own, trained)
    for expected, actual in zip(
        oracle.train(plans, batches), engine.train(plans, batches), strict=True
    ):
        assert difference(expected, actual) <= 1e-10


MIXED = [
    {
        "rank": rank,
        "scale": scale,
        "training": LocalTraining(
            lr=lr,
            weight_decay=decay,
            clip_norm=clip,
            proximal_mu=mu,
            tail_penalty=mu,
            tail_keep=0.4,
        ),
        "batches": batches,
    }
    for rank, scale, lr, decay, clip, mu, batches in [
        (4, 2.0, 5e-3, 0.0, 1.0, 0.0, [(3, [5, 38, 9]), (1, [4]), (2, [11, 3])]),
        (2, 1.0, 2e-2, 0.1, None, 0.3, [(4, [17, 3])]),
        (5, 0.5, 1e-3, 0.0, 0.05, 0.0, []),
        (4, 2.0, 5e-3, 0.1, 1.0, 0.1, [(2, [6]), (2, [33, 7])]),
    ]
]


@given(
    st.sampled_from(["bert", "llama"]),
    st.lists(sites(), min_size=1, max_size=4),
    st.sampled_from(TRAINED),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example("bert", MIXED, TRAINED[0])
def test_every_mix_of_sites_equals_the_plain_loop(
    kind: str, own: list[dict[str, Any]], trained: tuple[frozenset[Part], bool]
) -> None:
    check(kind, own, trained)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_equals_the_plain_loop(kind: str, dropout: float) -> None:
    check(kind, MIXED, TRAINED[0], dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["bert", "llama-all"])
def test_padded_rows_give_the_same(kind: str, dropout: float) -> None:
    oracle, _ = engines(kind, dropout=dropout)
    engine = CohortEngine(make_base(kind), LoraSpec(dropout=dropout), packed=False)
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    for expected, actual in zip(
        oracle.train(plans, batches), engine.train(plans, batches), strict=True
    ):
        assert difference(expected, actual) <= 1e-10


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_on_the_left_gives_the_same(kind: str) -> None:
    oracle, engine = engines(kind)
    plans, batches = build(engine.base, MIXED, TRAINED[0])

    def turned(batch: Batch) -> Batch:
        inputs = {name: tensor.flip(1) for name, tensor in batch.inputs.items()}
        return Batch(inputs, batch.labels if kind == "bert" else batch.labels.flip(1))

    left = [[turned(batch) for batch in own] for own in batches]
    for expected, actual in zip(oracle.train(plans, left), engine.train(plans, left), strict=True):
        assert difference(expected, actual) <= 1e-10


def test_training_moves_what_trains_and_nothing_else() -> None:
    _, engine = engines("bert")
    plans, batches = build(engine.base, MIXED, (frozenset({"B"}), True))
    for plan, own, trained in zip(plans, batches, engine.train(plans, batches), strict=True):
        before, after = plan.start.tensors(), trained.adapter.tensors()
        for name, tensor in before.items():
            moved = bool(own) and part_of(name) == "B"
            assert torch.equal(tensor, after[name]) != moved, name


def test_float32_differs_by_rounding() -> None:
    """SGD passes rounding on as it is: about steps x layers x 1e-7. AdamW divides by the gradient's
    own size, so where a gradient is itself rounding, a step of up to lr may change its sign: the
    maximum is bounded by 2 lr a step only, the mean must stay far below."""
    oracle, engine = engines("bert", torch.float32)
    for optimizer in ("sgd", "adamw"):
        training = LocalTraining(lr=5e-3, optimizer=cast(Any, optimizer))
        plans, batches = build(
            engine.base, [{**site, "training": training} for site in MIXED], TRAINED[0]
        )
        for expected, actual in zip(
            oracle.train(plans, batches), engine.train(plans, batches), strict=True
        ):
            a, b = expected.adapter.tensors(), actual.adapter.tensors()
            gap = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
            assert gap.max() <= (2e-6 if optimizer == "sgd" else 3 * 2 * training.lr)
            assert gap.mean() <= 1e-6


def test_bfloat16_base_stays_close_to_float32() -> None:
    _, exact = engines("bert", torch.float32)
    base = make_base("bert", torch.bfloat16)
    rounded = CohortEngine(base, LoraSpec())
    plans, batches = build(exact.base, MIXED, TRAINED[0])
    plans = [replace(plan, training=LocalTraining(lr=5e-3, optimizer="sgd")) for plan in plans]
    for plan, own, x, y in zip(
        plans, batches, exact.train(plans, batches), rounded.train(plans, batches), strict=True
    ):
        start, a, b = plan.start.tensors(), x.adapter.tensors(), y.adapter.tensors()
        assert all(b[name].dtype == torch.float32 for name in b)
        moves = [torch.cat([(end[n] - start[n]).flatten() for n in start]) for end in (a, b)]
        if own:
            assert torch.cosine_similarity(moves[0], moves[1], dim=0) > 0.99


# ----------------------------------------------------------------------- sites alone


def test_a_site_does_not_depend_on_who_else_trains() -> None:
    _, engine = engines("bert", dropout=0.3)
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    together = engine.train(plans, batches)
    reversed_order = engine.train(plans[::-1], batches[::-1])[::-1]
    for k, plan in enumerate(plans):
        (alone,) = engine.train([plan], [batches[k]])
        assert difference(alone, together[k]) <= 1e-10
        assert difference(alone, reversed_order[k]) <= 1e-10


def test_the_same_call_gives_the_same_bytes() -> None:
    _, engine = engines("bert", torch.float32)
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    first, second = engine.train(plans, batches), engine.train(plans, batches)
    for x, y in zip(first, second, strict=True):
        a, b = x.adapter.tensors(), y.adapter.tensors()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert x.metrics == y.metrics


def test_pads_of_lower_ranks_stay_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = engines("bert")
    stacks: list[Any] = []

    class Watched(cohort.Stack):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            stacks.append(self)

    monkeypatch.setattr(cohort, "Stack", Watched)
    plans, batches = build(engine.base, MIXED, TRAINED[4])
    decayed = [replace(p, training=LocalTraining(weight_decay=0.1, lr=0.02)) for p in plans]
    engine.train(decayed, batches)
    (stack,) = stacks
    order = sorted(range(len(plans)), key=lambda k: -len(batches[k]))
    ranks = [plans[k].start.rank for k in order]
    assert len(set(ranks)) > 1
    seen = 0
    for name, stacked in stack.leaves(len(plans)).items():
        if part_of(name) == "head":
            continue
        for rank, own in zip(ranks, stacked, strict=True):
            pad = [own[rank:]] + ([own[:rank, rank:]] if part_of(name) == "R" else [])
            seen += sum(p.numel() for p in pad)
            assert all(not p.any() for p in pad)
    assert seen > 0


# ------------------------------------------------------------------------- the base


def _delta(base: Base, seed: int) -> dict[str, Factors]:
    return dict(make_adapter(base, 2, seed, 0.5).factors)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_plans_on_shifted_bases_share_a_call(kind: str) -> None:
    oracle, engine = engines(kind)
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    shifted = _delta(engine.base, 7)
    plans = [replace(p, delta=shifted if k % 2 else {}) for k, p in enumerate(plans)]
    for expected, actual in zip(
        oracle.train(plans, batches), engine.train(plans, batches), strict=True
    ):
        assert difference(expected, actual) <= 1e-10
    oracle.base.shift({})
    engine.base.shift({})


def test_only_equal_deltas_share_a_pass() -> None:
    _, engine = engines("bert")
    plans, _ = build(engine.base, MIXED, TRAINED[0])
    path = next(iter(engine.base.adapted))
    first, same, other_B, other_scale = (_delta(engine.base, 7) for _ in plans)
    other_B[path] = replace(other_B[path], B=2 * other_B[path].B)
    other_scale[path] = replace(other_scale[path], scale=3.0)
    deltas = (first, same, other_B, other_scale)
    plans = [replace(p, delta=delta) for p, delta in zip(plans, deltas, strict=True)]
    assert groups(plans) == [[0, 1], [2], [3]]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_base_is_left_as_it_was(kind: str) -> None:
    engine = CohortEngine(make_base(kind), LoraSpec())
    model = cast(Any, engine.base.model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings_before = (model.config._attn_implementation, getattr(model.config, "use_cache", None))
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    engine.train(plans, batches)
    broken = [[replace(batch, labels=batch.labels + 10**6) for batch in own] for own in batches]
    with pytest.raises(IndexError):
        engine.train(plans, broken)
    assert settings_before == (
        model.config._attn_implementation,
        getattr(model.config, "use_cache", None),
    )
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_equals_the_plain_loop(kind: str) -> None:
    oracle, engine = engines(kind)
    adapter = make_adapter(engine.base, 3, 0, 2.0)
    delta = _delta(engine.base, 5)
    batches = [make_batch(engine.base, 4, [5, 38, 9], 1), make_batch(engine.base, 2, [6], 2)]
    expected, actual = (e.evaluate(adapter, delta, batches) for e in (oracle, engine))
    assert expected.count == actual.count > 0
    assert expected.sums == actual.sums and expected.sums
    assert abs(expected.loss_sum - actual.loss_sum) <= 1e-10
    oracle.base.shift({})
    engine.base.shift({})


# --------------------------------------------------------------------------- refusals


def test_a_plan_that_trains_nothing_is_refused() -> None:
    _, engine = engines("bert")
    plans, batches = build(engine.base, MIXED, TRAINED[0])
    with pytest.raises(ConfigError, match="trains nothing"):
        engine.train([replace(plans[0], train=frozenset({"R"}))], batches[:1])


def test_a_base_that_peft_has_rewritten_is_refused() -> None:
    base = make_base("bert")
    PeftEngine(base, LoraSpec())
    with pytest.raises(MismatchError, match="replaced"):
        CohortEngine(base, LoraSpec())


# -------------------------------------------------------------------------- attention


@pytest.mark.parametrize("split", [0, attention._SPLIT])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_equals_attention_row_by_row(
    monkeypatch: pytest.MonkeyPatch, split: int, key_heads: int, causal: bool
) -> None:
    monkeypatch.setattr(attention, "_SPLIT", split)
    lengths, length, heads, width = [3, 40, 16, 17, 1, 33], 40, 4, 8
    n, total = len(lengths), sum(lengths)
    g = torch.Generator().manual_seed(0)

    def states(h: int) -> torch.Tensor:
        return torch.randn(total, h, width, generator=g, dtype=torch.float64, requires_grad=True)

    q, k, v = states(heads), states(key_heads), states(key_heads)
    keys = torch.arange(length) < torch.tensor(lengths)[:, None]  # [n, t]
    mask = keys[:, None, None, :].expand(n, 1, length, length)
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    real = keys.flatten().nonzero().squeeze(1)
    grouping = group_rows(real, length, mask, heads, key_heads, torch.float64)
    assert len(grouping.groups) == (3 if split == 0 else 2)
    out = cast(torch.Tensor, PackedAttention.apply(q, k, v, 0.3, grouping))
    rows = [
        nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in own), is_causal=causal, scale=0.3, enable_gqa=True
        ).transpose(0, 1)
        for own in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    expected = torch.cat(rows)
    assert torch.allclose(out, expected, atol=1e-12)
    weight = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(x, y, atol=1e-12)
