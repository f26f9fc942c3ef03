"""SCAFFOLD over whole runs: a float64 twin, the sum of the control variates, kill and resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.methods.effective_steps import effective
from fedft.core import models, seeds
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.terms import Dynamic, taken
from fedft.core.types import Adapter, Batch, ClientUpdate, LocalTraining, Site, TrainPlan
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from fedft.strategies import FedDyn, FedNova, HetLoRA, RunFacts, Scaffold, Strategy

LORA = LoraSpec(rank=3, alpha=6)
N, PER_ROUND, STEPS, LR = 6, 2, 2, 0.3
SGD = LocalTraining(optimizer="sgd", lr=LR, clip_norm=None)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def wide(tiny_model: Path) -> dict[str, Any]:
    """Both engines in float64, and the bare model."""

    def base() -> models.Base:
        loaded = models.load_base(ModelSpec(source=str(tiny_model)), LORA, 3)
        loaded.model.double()
        return loaded

    return {
        "loop": PeftEngine(base(), LORA),
        "cohort": CohortEngine(base(), LORA),
        "bare": base(),
    }


def first(engine: Any) -> Adapter:
    adapter = models.initial_adapter(engine.base.shapes, LORA, 3, seed=0)
    return adapter.replaced({n: t.double() for n, t in adapter.tensors().items()})


def skewed(client: int, round_: int) -> list[Batch]:
    """Every client has one class of the three, mostly."""
    g = seeds.torch_generator(0, "twin", round_, str(client))
    made: list[Batch] = []
    for _ in range(STEPS):
        ids = torch.randint(2, 20, (4, 6), generator=g)
        labels = torch.full((4,), client % 3)
        labels[0] = torch.randint(0, 3, (1,), generator=g)
        made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return made


def cohort_of(round_: int) -> list[int]:
    chosen = seeds.numpy_generator(0, "twin-cohort", round_).choice(N, PER_ROUND, replace=False)
    return sorted(chosen.tolist())


def gradient(bare: models.Base, adapter: Adapter, batch: Batch) -> Tensors:
    """Of the loss in A, B and the head, without PEFT and without our engines."""
    leaves = {n: t.clone().requires_grad_() for n, t in adapter.tensors().items()}
    live = adapter.replaced(leaves)
    weights = {
        f"{path}.weight": bare.adapted[path].weight + f.scale * f.B @ f.A
        for path, f in live.factors.items()
    } | {n.removeprefix("base_model.model."): t for n, t in live.head.items()}
    output = torch.func.functional_call(bare.model, weights, (), dict(batch.inputs))
    found = torch.autograd.grad(F.cross_entropy(output.logits, batch.labels), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def twin(bare: models.Base, start: Adapter, rounds: int) -> tuple[Tensors, Tensors, list[Tensors]]:
    """Algorithm 1 of the paper as printed, option II: x, c and every c_k after so many rounds."""
    x = {n: t.clone() for n, t in start.tensors().items()}
    c = {n: torch.zeros_like(t) for n, t in x.items()}
    own = [{n: torch.zeros_like(t) for n, t in x.items()} for _ in range(N)]
    for round_ in range(rounds):
        dx, dc = ({n: torch.zeros_like(t) for n, t in x.items()} for _ in range(2))
        for k in cohort_of(round_):
            y = dict(x)
            for batch in skewed(k, round_):
                g = gradient(bare, start.replaced(y), batch)
                y = {n: y[n] - LR * (g[n] - own[k][n] + c[n]) for n in y}
            new = {n: own[k][n] - c[n] + (x[n] - y[n]) / (STEPS * LR) for n in x}
            for n in x:
                dx[n] += (y[n] - x[n]) / PER_ROUND
                dc[n] += (new[n] - own[k][n]) / PER_ROUND
            own[k] = new
        for n in x:
            x[n] = x[n] + dx[n]
            c[n] = c[n] + PER_ROUND / N * dc[n]
    return x, c, own


def run(
    engine: Any, rule: Strategy, rounds: int, ranks: tuple[int | None, ...] = (None,)
) -> tuple[Any, list[Tensors]]:
    """The same federation through an engine and the rule: the state, and what clients keep."""
    state = rule.init(first(engine))
    kept: list[Tensors] = [{} for _ in range(N)]
    for round_ in range(rounds):
        plans: list[TrainPlan] = []
        for k in cohort_of(round_):
            plan = rule.plan(state, Site(f"site-{k}", 5 + k, rank=ranks[k % len(ranks)]))
            own = dict.fromkeys(plan.schema("keeps"), kept[k])
            training = SGD.overlaid(plan.training)
            plans.append(
                replace(plan, training=training, records={**plan.records, **own}, site=f"site-{k}")
            )
        work = [skewed(k, round_) for k in cohort_of(round_)]
        updates: list[ClientUpdate] = []
        for k, plan, done in zip(cohort_of(round_), plans, engine.train(plans, work), strict=True):
            for record in plan.schema("keeps"):
                kept[k] = dict(done.records[record])
            sent = {record: done.records[record] for record in plan.schema("sends")}
            updates.append(
                ClientUpdate(plan.site, 5 + k, plan.reply(done.adapter), plan.start, records=sent)
            )
        state = rule.aggregate(state, updates)
    return state, kept


@pytest.mark.parametrize("name", ["loop", "cohort"])
def test_thirty_rounds_are_the_papers(wide: dict[str, Any], name: str) -> None:
    """With two of six clients a round. Records travel in float32, hence not to the last bit."""
    engine, rule = wide[name], Scaffold().of_run(RunFacts(clients=N))
    state, kept = run(engine, rule, 30)
    x, c, own = twin(wide["bare"], first(engine), 30)
    moved = max(float((t - first(engine).tensors()[n]).abs().max()) for n, t in x.items())
    assert moved > 0.1
    for n, t in state.adapter.tensors().items():
        assert torch.allclose(t, x[n], atol=1e-5), n
        assert torch.allclose(taken("scaffold-control", state.slots)[n], c[n], atol=1e-5), n
    for mine, theirs in zip(kept, own, strict=True):
        for n, t in mine.items():
            assert torch.allclose(t.double(), theirs[n], atol=1e-5), n
    assert max(float(t.abs().max()) for t in c.values()) > 0.02


@pytest.mark.parametrize("ranks", [(None,), (3, 1, 2)], ids=["one rank", "mixed ranks"])
def test_the_servers_control_variate_is_the_mean_of_all_clients(
    wide: dict[str, Any], ranks: tuple[int | None, ...]
) -> None:
    """Also of those that never trained, and at mixed ranks, padded with zeros."""
    inner = HetLoRA(gamma=1.0, beyond_rank="server") if len(ranks) > 1 else HetLoRA(gamma=1.0)
    rule = Scaffold(inner=inner).of_run(RunFacts(clients=N))
    state, kept = run(wide["cohort"], rule, 9, ranks)
    whole = {n: torch.zeros_like(t) for n, t in state.adapter.tensors().items()}
    for own in kept:
        for n, t in own.items():
            whole[n][tuple(slice(s) for s in t.shape)] += t.double() / N
    for n, t in taken("scaffold-control", state.slots).items():
        assert torch.allclose(t, whole[n], atol=1e-7), n
    if len(ranks) > 1:
        sizes = {t.shape for own in kept for n, t in own.items() if "lora_A" in n}
        assert len({shape[0] for shape in sizes}) == 3


@pytest.mark.parametrize("rule", [{"name": "scaffold"}, {"name": "feddyn"}, {"name": "fednova"}])
def test_a_run_that_was_stopped_and_resumed_is_the_same(
    rule: dict[str, Any], tiny_table: Any, stop_after: Any, tmp_path: Path
) -> None:
    """Control variates at the clients and the server survive; clients take part again."""
    table = tiny_table(
        strategy=rule,
        training={"optimizer": "sgd", "lr": 0.3},
        rounds={"count": 5},
        engine={"backend": "inline", "cohort": 4},
    )
    whole = simulate(parse_config(table), tmp_path / "whole")
    stop = stop_after(3)
    with pytest.raises(Exception, match="stopped"):
        simulate(parse_config(table), tmp_path / "parts", trackers=[stop], stop=stop)
    parts = resume(tmp_path / "parts")
    assert parts.summary()["adapter_sha256"] == whole.summary()["adapter_sha256"]
    again = [line["site"] for line in whole.clients()]
    assert len(again) > len(set(again))
    plain = simulate(
        parse_config({**table, "strategy": {"name": "fedavg-lora"}}), tmp_path / "plain"
    )
    assert plain.summary()["adapter_sha256"] != whole.summary()["adapter_sha256"]


# ── FedNova's count of steps ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mu", [0.0, 0.4])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_effective_steps_are_the_papers_formulas(momentum: float, mu: float, steps: int) -> None:
    training = replace(SGD, momentum=momentum, proximal_mu=mu)
    plan = TrainPlan(Adapter({}), training=training)
    found = effective(plan, steps)
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=LR, momentum=momentum)
    for _ in range(steps):  # a gradient of one at every step, beside the proximal term
        x.grad = 1.0 + mu * x.detach()
        optimizer.step()
    assert found == pytest.approx(-float(x.detach()) / LR)
    if mu == 0 and steps:
        rho = momentum
        assert found == pytest.approx((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho))
    if momentum == 0 and mu and steps:
        assert found == pytest.approx((1 - (1 - LR * mu) ** steps) / (LR * mu))
    dynamic = TrainPlan(Adapter({}), training=replace(training, proximal_mu=0.0))
    assert effective(replace(dynamic, terms=(Dynamic(alpha=mu),)), steps) == pytest.approx(found)
    assert effective(replace(plan, training=LocalTraining()), steps) == steps


def test_facts_reach_every_rule_of_a_chain() -> None:
    bound = FedDyn(inner=FedNova()).of_run(RunFacts(seed=7, clients=3))
    assert (bound.facts.seed, bound.inner.facts.clients) == (7, 3)
    assert FedDyn().facts == RunFacts(), "a rule by itself knows nothing"
