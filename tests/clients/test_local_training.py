"""Schedules, accumulation, torch's optimisers, smoothing, class weights and NEFTune, in both engines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedft.clients.engines import accumulation, loop
from fedft.clients.engines.base import Trained
from fedft.clients.engines.chunked_loss import Vocabulary
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.methods.effective_steps import effective
from fedft.core import optimizers, seeds, terms
from fedft.core.schedules import Schedule
from fedft.core.spec import LoraSpec
from fedft.core.types import Batch, LocalTraining, Origin, TrainPlan
from tests.clients.test_cohort import (
    TRAINED,
    build,
    difference,
    engines,
    make_adapter,
    make_base,
    make_batch,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

SHAPES: list[list[tuple[int, list[int]]]] = [
    [(8, [5, 30, 9]), (7, [4, 6]), (1, [11])],
    [(5, [17, 3]), (8, [12])],
    [(2, [6])],
]
"""Rows and lengths of the batches of three clients: steps of 8 rows and of what is left of them."""


def federation(kind: str, *trainings: LocalTraining, part: int = 0, round_: int = 1) -> Any:
    """Three clients of mixed ranks that train so, each in its own way or all alike."""
    base = engines(kind)[1].base
    own = [
        {
            "rank": rank,
            "scale": 2.0,
            "training": trainings[k % len(trainings)],
            "batches": SHAPES[k],
        }
        for k, rank in enumerate((4, 2, 3))
    ]
    plans, batches = build(base, own, TRAINED[part])
    return [replace(plan, round=round_) for plan in plans], batches


def both(kind: str, plans: Sequence[TrainPlan], batches: Any) -> list[Trained]:
    """Trained by the loop, after it is held to the cohort engine."""
    oracle, engine = engines(kind)
    expected = oracle.train(plans, batches)
    for one, other in zip(expected, engine.train(plans, batches), strict=True):
        assert difference(one, other) <= 1e-9
    return expected


def apart(some: Sequence[Trained], others: Sequence[Trained]) -> float:
    return max(difference(a, b) for a, b in zip(some, others, strict=True))


# ── optimisers ────────────────────────────────────────────────────────────────────────────────

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.8, 0.95], "eps": 1e-6, "amsgrad": True},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"alpha": 0.9, "centered": True, "momentum": 0.5},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    "asgd": {"t0": 1.0, "lambd": 0.01},
}


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in optimizers.names()), *OPTIONS.items()]
)
def test_every_optimizer_is_the_same_in_both_engines(name: str, options: dict[str, Any]) -> None:
    part = TRAINED.index((frozenset({"A"}), False)) if name == "muon" else 0
    own = LocalTraining(optimizer=name, lr=1e-2, options=options)
    own.check()
    fast = replace(own, lr=2e-2, schedule=Schedule("linear"))
    decay = "weight_decay" in optimizers.takes(name)
    plans, batches = federation(
        "bert", own, replace(own, weight_decay=0.1 if decay else 0.0), fast, part=part
    )
    found = both("bert", plans, batches)
    assert apart(found, both("bert", *federation("bert", LocalTraining(), part=part))) > 1e-4


def test_the_loop_is_torchs_optimizer_on_torchs_gradients() -> None:
    """A twin without an engine: the same model, torch's class, its own loop."""
    base = make_base("bert")
    engine = PeftEngine(base, LoraSpec())
    start = make_adapter(base, 3, 0, 1.0)
    own = LocalTraining(
        optimizer="rmsprop", options={"alpha": 0.9}, lr=3e-3, weight_decay=0.05, clip_norm=None
    )
    batches = [make_batch(base, 4, [9, 5], seed) for seed in range(4)]
    plan = TrainPlan(start=start, training=own)
    (found,) = engine.train([plan], [batches])
    engine._load(start, plan)
    named = {n: p for n, p in engine._named() if p.requires_grad}
    optimizer = torch.optim.RMSprop(list(named.values()), lr=3e-3, alpha=0.9, weight_decay=0.05)
    for batch in batches:
        optimizer.zero_grad()
        logits = engine._model(**batch.inputs).logits
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
    tensors = found.adapter.tensors()
    assert max(float((tensors[n] - p.detach()).abs().max()) for n, p in named.items()) < 1e-12


def test_what_a_row_keeps_of_state_is_counted() -> None:
    counted = {name: optimizers.numbers_kept(LocalTraining(optimizer=name)) for name in
               ("adamw", "sgd", "adagrad", "rmsprop")}  # fmt: skip
    assert counted == {"adamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
    assert optimizers.numbers_kept(LocalTraining(options={"amsgrad": True})) == 3


# ── accumulation ──────────────────────────────────────────────────────────────────────────────

ACCUMULATED = LocalTraining(batch_size=3, accumulate=3, optimizer="sgd", lr=0.05, momentum=0.5)


@pytest.mark.parametrize("kind", ["bert", "llama", "llama-score", "dinov2"])
@pytest.mark.parametrize("packed", [None, False])
def test_a_step_of_several_passes_is_one_batch(kind: str, packed: bool | None) -> None:
    one = LocalTraining(batch_size=9, optimizer="sgd", lr=0.05, momentum=0.5)
    plans, batches = federation(kind, ACCUMULATED, one, replace(ACCUMULATED, batch_size=1))
    whole = [replace(plan, training=one) for plan in plans]
    oracle, _ = engines(kind)
    engine = CohortEngine(make_base(kind), LoraSpec(), packed=packed)
    expected = oracle.train(whole, batches)
    assert apart(expected, oracle.train(plans, batches)) < 1e-11
    assert apart(expected, engine.train(plans, batches)) < 1e-9
    assert max(r.metrics["steps"] for r in expected) == 3


def test_passes_count_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: means of means are not the mean, and the difference is seen."""
    plans, batches = federation("llama", ACCUMULATED)
    oracle, _ = engines("llama")
    right = oracle.train(plans, batches)
    monkeypatch.setattr(loop, "shares", lambda parts, _: [1 / len(parts)] * len(parts))
    wrong = oracle.train(plans, batches)
    assert apart(right, wrong) > 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_and_methods_go_with_accumulation(dropout: float) -> None:
    plans, batches = federation("bert", replace(ACCUMULATED, proximal_mu=0.3))
    plans = [
        replace(plan, terms=(terms.ControlVariates(), terms.EffectiveSteps()), seed=4)
        for plan in plans
    ]
    oracle, engine = engines("bert", dropout=dropout)
    expected, found = oracle.train(plans, batches), engine.train(plans, batches)
    assert apart(expected, found) < 1e-9
    for a, b, own in zip(expected, found, batches, strict=True):
        assert a.metrics["steps"] == len(own)
        assert float(a.records["effective-steps"]["a"]) >= len(own)
        for record in a.records:
            for name, tensor in a.records[record].items():
                assert torch.allclose(tensor, b.records[record][name], atol=1e-6)


def test_parts_come_from_where_the_rows_come_from() -> None:
    base = engines("bert")[1].base
    rows = [make_batch(base, 1, [n], n) for n in (9, 4, 6, 3, 12)]

    def cut(positions: Any) -> Batch:
        own = [rows[int(i)] for i in positions]
        width = max(b.labels.new_tensor(b.inputs["input_ids"].shape[1]).item() for b in own)
        inputs = {
            name: torch.cat([F.pad(b.inputs[name], (0, int(width) - b.inputs[name].shape[1])) for b in own])
            for name in own[0].inputs
        }  # fmt: skip
        return Batch(inputs, torch.cat([b.labels for b in own]))

    positions = np.array([1, 4, 0, 3, 2])
    lengths = np.array([9, 4, 6, 3, 12])
    whole = replace(cut(positions), origin=Origin("p", lengths, cut, positions))
    found = accumulation.parts(whole, LocalTraining(batch_size=2, accumulate=3))
    assert [p.inputs["input_ids"].shape[1] for p in found] == [12, 9, 6]
    assert [p.origin.positions.tolist() for p in found if p.origin] == [[1, 4], [0, 3], [2]]
    none = accumulation.cut(whole, 0, 0)
    assert len(none) == 0
    assert none.origin is not None and not len(none.origin.positions)


# ── schedules ─────────────────────────────────────────────────────────────────────────────────


def test_a_schedule_goes_over_the_run_by_a_clients_own_steps() -> None:
    from transformers import get_scheduler

    for name, options in [
        ("linear", {}),
        ("cosine", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
        ("cosine_with_restarts", {"num_cycles": 2}),
    ]:
        rounds, steps = 4, 5
        bearer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        library: Any = get_scheduler(name, bearer, 3, rounds * steps, dict(options))
        wanted: list[float] = []
        for _ in range(rounds * steps):
            wanted.append(bearer.param_groups[0]["lr"])
            bearer.step()
            library.step()
        own = Schedule(name, warmup_steps=3, options=options, rounds=rounds)
        own.check(0.3)
        found = [own.rates(0.3, t, steps)(i) for t in range(1, rounds + 1) for i in range(steps)]
        assert found == wanted, name
        share = Schedule(name, warmup_ratio=0.15, options=options, rounds=rounds)
        assert [share.rates(0.3, t, steps)(i) for t in (1, 2) for i in range(5)] == wanted[:10]


def test_a_schedule_over_a_round_starts_anew_and_no_schedule_rises_behind_its_end() -> None:
    own = Schedule("cosine", over="round", rounds=9)
    assert own.rates(1.0, 1, 4)(3) == own.rates(1.0, 7, 4)(3)
    run = Schedule("cosine", rounds=2)
    assert run.rates(1.0, 3, 4)(2) == run.rates(1.0, 9, 4)(3) == 0.0
    assert Schedule("linear").rates(1.0, 1, 0) is not None, "a client without a step"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_each_client_of_a_cohort_has_its_own_rate(kind: str) -> None:
    own = LocalTraining(lr=2e-2, schedule=Schedule("linear", warmup_steps=2, rounds=3))
    plain = LocalTraining(lr=2e-2)
    found = both(kind, *federation(kind, own, round_=2))
    assert apart(found, both(kind, *federation(kind, plain, round_=2))) > 1e-4
    both(kind, *federation(kind, own, plain, replace(own, optimizer="sgd"), round_=2))
    first = both(kind, *federation(kind, own, round_=1))
    moved = [
        {n: float((t - s).abs().max()) for (n, t), s in zip(r.adapter.tensors().items(), p.start.tensors().values(), strict=True)}
        for r, p in zip(first, federation(kind, own)[0], strict=True)
    ]  # fmt: skip
    assert not any(moved[2].values()), "its one step is the first of the warm-up"
    assert any(moved[0].values())


def test_effective_steps_count_by_the_optimizers_own_arithmetic() -> None:
    """``||a||_1`` against torch, run on gradients of one."""
    base = engines("bert")[1].base
    start = make_adapter(base, 2, 0, 1.0)
    for own in (
        LocalTraining(optimizer="sgd", momentum=0.9, options={"nesterov": True}),
        LocalTraining(optimizer="sgd", momentum=0.9, options={"dampening": 0.3}),
        LocalTraining(optimizer="sgd", momentum=0.5, schedule=Schedule("linear", rounds=2)),
        LocalTraining(optimizer="sgd", schedule=Schedule("linear", rounds=2, warmup_steps=3)),
        LocalTraining(optimizer="sgd", proximal_mu=0.4, schedule=Schedule("cosine", rounds=3)),
    ):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = optimizers.make(own, [{"params": [x], **optimizers.settings(own)}])
        rates = own.rates(1, 6)
        lrs = [own.lr if rates is None else rates(i) for i in range(6)]
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            x.grad = torch.ones_like(x) + own.proximal_mu * x.detach()
            optimizer.step()
        wanted = -float(x.detach()) / max(lrs)
        plan = TrainPlan(start=start, training=own, round=1)
        assert effective(plan, 6) == pytest.approx(wanted, rel=1e-12)
    scheduled = LocalTraining(schedule=Schedule("linear", rounds=1))
    assert effective(TrainPlan(start=start, training=scheduled, round=1), 4) == pytest.approx(2.5)


# ── smoothing and class weights ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "llama-score"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_smoothed_labels_are_torchs(kind: str, accumulate: int) -> None:
    own = LocalTraining(
        label_smoothing=0.2, batch_size=9 // accumulate, accumulate=accumulate, lr=1e-2
    )
    plans, batches = federation(kind, own, replace(own, label_smoothing=0.4), LocalTraining())
    found = both(kind, plans, batches)
    oracle, _ = engines(kind)
    oracle._load(plans[0].start, plans[0])
    batch: Batch = batches[0][0]
    logits = oracle._model(**batch.inputs).logits
    if oracle.base.task == "causal-lm":
        wanted = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=0.2
        )
    else:
        wanted = F.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    (one,) = oracle.train([plans[0]], [batches[0][:1]])
    assert one.metrics["loss"] == pytest.approx(float(wanted.detach()), rel=1e-10)
    assert apart(found, both(kind, *federation(kind, LocalTraining(lr=1e-2)))) > 1e-4


def test_words_are_smoothed_slice_by_slice_as_torch_does_with_all_at_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 700, bias=True).double().requires_grad_(False)
    states = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(700, (9,))
    seen: list[tuple[int, int]] = []
    losses = Vocabulary(layer, lambda a, b: seen.append((a, b))).losses(states, targets, 0.3)
    wanted = F.cross_entropy(layer(states), targets, label_smoothing=0.3, reduction="none")
    assert torch.allclose(losses, wanted, rtol=1e-12)
    (found,) = torch.autograd.grad(losses.square().sum(), states)
    (right,) = torch.autograd.grad(wanted.square().sum(), states)
    assert torch.allclose(found, right, rtol=1e-10, atol=1e-12)
    assert (0, 700) in seen, "what was read of a file is let go of"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_class_weights_are_torchs_in_both_engines(accumulate: int) -> None:
    weights = (3.0, 0.5, 1.0)
    own = LocalTraining(
        class_weights=weights, batch_size=9 // accumulate, accumulate=accumulate, lr=1e-2
    )
    smooth = replace(own, label_smoothing=0.1, class_weights=(0.2, 1.0, 5.0))
    plans, batches = federation("bert", own, smooth, LocalTraining())
    both("bert", plans, batches)
    oracle, _ = engines("bert")
    (one,) = oracle.train([plans[0]], [batches[0][:1]])
    oracle._load(plans[0].start, plans[0])
    logits: Tensor = oracle._model(**batches[0][0].inputs).logits
    wanted = F.cross_entropy(
        logits, batches[0][0].labels, weight=torch.tensor(weights, dtype=logits.dtype)
    )
    assert one.metrics["loss"] == pytest.approx(float(wanted.detach()), rel=1e-10)


def test_evaluation_is_neither_smoothed_nor_weighed() -> None:
    plans, batches = federation("bert", LocalTraining(label_smoothing=0.3, class_weights=(9, 1, 1)))
    for engine in engines("bert"):
        before = engine.evaluate(plans[0].start, {}, batches[0])
        engine.train(plans, batches)
        assert engine.evaluate(plans[0].start, {}, batches[0]) == before


# ── NEFTune ───────────────────────────────────────────────────────────────────────────────────


def noise_by_transformers(plan: TrainPlan) -> Callable[..., Tensor]:
    """transformers' own hook, which draws from the client's generator."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    generator = seeds.torch_generator(plan.seed, "neftune", plan.round, plan.site)
    uniform: Any = Tensor.uniform_

    def drawn(self: Tensor, low: Any, high: Any) -> Tensor:
        return self.copy_(
            uniform(torch.empty(self.shape), float(low), float(high), generator=generator)
        )

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        module.neftune_noise_alpha = plan.training.neftune_alpha
        module.training = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "uniform_", drawn)
            found = neftune_post_forward_hook(module, inputs, output)
        module.training = False
        return found

    return hook


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "llama-score"])
def test_noise_is_transformers_own_and_the_same_in_both_engines(kind: str) -> None:
    own = LocalTraining(neftune_alpha=5.0, lr=1e-2, batch_size=3, accumulate=3)
    plans, batches = federation(kind, own, LocalTraining(lr=1e-2))
    plans = [replace(plan, seed=3) for plan in plans]
    oracle, engine = engines(kind, dropout=0.3)
    noisy = oracle.train(plans, batches)
    assert apart(noisy, engine.train(plans, batches)) <= 1e-8
    plain = [replace(p, training=replace(p.training, neftune_alpha=0.0)) for p in plans]
    quiet = oracle.train(plain, batches)
    assert difference(noisy[0], quiet[0]) > 1e-5
    assert difference(noisy[1], quiet[1]) == 0, "one that is asked for none gets none"
    embeddings: Any = oracle.base.model
    hook = embeddings.get_input_embeddings().register_forward_hook(noise_by_transformers(plans[0]))
    try:
        (twin,) = oracle.train(plain[:1], batches[:1])
    finally:
        hook.remove()
    assert difference(noisy[0], twin) < 1e-6, "transformers takes the bound in float32"


def test_kept_blocks_are_not_used_under_noise() -> None:
    """What enters the first adapted block is no constant of the row then."""
    base = make_base("bert-all")
    assert base.adapted
    own = LocalTraining(neftune_alpha=9.0)
    upper = make_base("bert")
    upper.adapted = {k: v for k, v in upper.adapted.items() if ".1." in k}  # pyright: ignore
    engine = CohortEngine(upper, LoraSpec())
    assert engine._prefix._depth == 1
    rows = [make_batch(upper, 1, [7], seed) for seed in range(4)]

    def cut(positions: Any) -> Batch:
        mine = [rows[int(i)] for i in positions]
        return Batch(
            {name: torch.cat([b.inputs[name] for b in mine]) for name in mine[0].inputs},
            torch.cat([b.labels for b in mine]),
        )

    lengths = np.full(4, 7)
    batches = [
        replace(cut(p), origin=Origin("rows", lengths, cut, p))
        for p in (np.array([0, 1]), np.array([2, 3]))
    ]
    start = make_adapter(upper, 2, 0, 1.0)
    plan = TrainPlan(start=start, training=own)
    bare = [replace(batch, origin=None) for batch in batches]
    (traced,), (untraced,) = engine.train([plan], [batches]), engine.train([plan], [bare])
    assert difference(traced, untraced) == 0
    # Without noise the kept blocks are used, and accumulation finds its rows among them.
    for training in (LocalTraining(), LocalTraining(batch_size=1, accumulate=2)):
        plan = TrainPlan(start=start, training=training)
        (kept,), (run,) = engine.train([plan], [batches]), engine.train([plan], [bare])
        assert difference(kept, run) < 1e-12
    assert engine._prefix._kept
