"""DP-SGD against its own definition, one example at a time."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.api import Run
from fedft.clients.engines import by_example, loop
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import models
from fedft.core.data.batches import poisson_batches
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Batch, LocalTraining, TrainPlan, part_of
from fedft.server.config_file import parse_config
from fedft.server.privacy import example_epsilon
from fedft.server.run import simulate
from fedft.strategies import FedSB

LORA = LoraSpec(rank=3, alpha=6)
QUIET = 1e-12  # a noise multiplier below the last bit
SGD = LocalTraining(optimizer="sgd", lr=0.5, batch_size=4, dp_noise=QUIET, dp_clip=0.05)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> PeftEngine:
    return PeftEngine(models.load_base(ModelSpec(source=str(tiny_model)), LORA, 3), LORA)


@pytest.fixture
def start(engine: PeftEngine) -> Adapter:
    """In the middle of a run: B is not zero, so that both factors learn."""
    first = models.initial_adapter(engine.base.shapes, LORA, 3, seed=0)
    g = torch.Generator().manual_seed(1)
    return first.replaced(
        {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in first.tensors().items()}
    )


def batch(*rows: int) -> Batch:
    """Examples of unequal length, the same whenever they are drawn."""
    length = max(3 + row % 4 for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        own = torch.arange(3 + row % 4)
        ids[i, : len(own)] = 2 + (7 * row + 3 * own) % 24
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return Batch(inputs, torch.tensor([row % 3 for row in rows]))


EMPTY = Batch({}, torch.zeros(0, dtype=torch.int64))


def moved(engine: PeftEngine, plan: TrainPlan, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """What one site's training changed."""
    (trained,) = engine.train([plan], [batches])
    before, after = plan.start.tensors(), trained.adapter.tensors()
    return {n: after[n].double() - before[n].double() for n in after}


def length(change: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([d.square().sum() for d in change.values()]).sum().sqrt())


def check_step(engine: PeftEngine, start: Adapter, parts: set[Any], clip: float) -> None:
    """Each example's own gradient is read off a plain SGD step without clipping."""
    plan = TrainPlan(start=start, train=frozenset(parts), training=replace(SGD, dp_clip=clip))
    plain = replace(plan, training=LocalTraining(optimizer="sgd", lr=1.0, clip_norm=None))
    rows = (1, 2, 3, 6, 8)
    expected = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in start.tensors().items()}
    for row in rows:
        gradient = moved(engine, plain, [batch(row)])
        factor = min(1.0, clip / length(gradient))
        for name, g in gradient.items():
            expected[name] += 0.5 * factor * g / 4  # lr, over the expected batch of four
    actual = moved(engine, plan, [batch(*rows)])
    for name, change in expected.items():
        assert torch.allclose(actual[name], change, atol=2e-6), name
        assert part_of(name) not in parts or length({name: change}) > 1e-6, name
    assert length(actual) > 1e-3


@pytest.mark.parametrize("parts", [{"A", "B", "head"}, {"B", "head"}], ids=["AB", "ffa"])
@pytest.mark.parametrize("clip", [0.05, 5.0, 1e3])
def test_a_step_is_the_sum_of_clipped_gradients(
    engine: PeftEngine, start: Adapter, parts: set[Any], clip: float
) -> None:
    check_step(engine, start, parts, clip)


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_so_it_is_for_the_core_of_fed_sb(tiny_model: Path, start: Adapter, clip: float) -> None:
    """R alone trains, in a layer that Opacus does not know; A and B of the same layer afterwards."""
    engine = PeftEngine(models.load_base(ModelSpec(source=str(tiny_model)), LORA, 3), LORA)
    cored = FedSB(basis="seeded").init(start).adapter
    check_step(engine, cored, {"R", "head"}, clip)
    check_step(engine, start, {"A", "B", "head"}, clip)


def test_noise_has_the_stated_size_also_without_examples(
    engine: PeftEngine, start: Adapter
) -> None:
    training = replace(SGD, lr=1.0, dp_noise=3.0, dp_clip=0.2)
    plan = TrainPlan(start=start, training=training)
    change = moved(engine, plan, [EMPTY])
    values = torch.cat([d.flatten() for d in change.values()])
    assert float(values.std()) == pytest.approx(3.0 * 0.2 / 4, rel=0.1)
    assert not torch.equal(
        values, torch.cat([d.flatten() for d in moved(engine, plan, [EMPTY]).values()])
    )


def test_equal_seeds_of_torch_give_other_noise_and_other_samples(
    engine: PeftEngine, start: Adapter
) -> None:
    """Nothing of it comes from a global generator, nor changes one."""
    plan = TrainPlan(start=start, training=replace(SGD, dp_noise=1.0), seed=7)
    seen: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        torch.manual_seed(11)
        before = torch.get_rng_state()
        seen.append(moved(engine, plan, [batch(1, 2), EMPTY]))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(not torch.equal(seen[0][name], d) for name, d in seen[1].items())


def test_the_noise_of_a_step_is_the_mechanisms(
    engine: PeftEngine, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two empty steps of ones: the change is lr z C / b, and each number has a draw of its own."""
    drawn: list[int] = []

    def ones(count: int) -> torch.Tensor:
        drawn.append(count)
        return torch.ones(count, dtype=torch.float64)

    monkeypatch.setattr("fedft.core.privacy.entropy.gaussian", ones)
    training = replace(SGD, lr=1.0, dp_noise=2.0, dp_clip=0.25)
    change = moved(engine, TrainPlan(start=start, training=training), [EMPTY, EMPTY])
    assert sum(drawn) == 2 * sum(d.numel() for d in change.values())
    for name, d in change.items():
        assert torch.allclose(d, torch.full_like(d, -2 * 2.0 * 0.25 / 4), atol=1e-6), name


def test_an_example_that_overflows_does_not_spoil_the_step(
    engine: PeftEngine, start: Adapter
) -> None:
    """Its gradient is not finite, and counts as zero; the loss is the sum of losses."""
    plan = TrainPlan(start=start, training=SGD)
    bad = replace(start, head={n: t.clone() for n, t in start.head.items()})
    for tensor in bad.head.values():
        tensor.fill_(float("inf"))
    change = moved(engine, replace(plan, start=bad), [batch(1, 2)])
    lora = [d for n, d in change.items() if part_of(n) in ("A", "B")]
    assert lora and all(float(d.abs().max()) < 1e-6 for d in lora)


@pytest.mark.parametrize("bad", [{"dp_noise": -1.0}, {"dp_noise": float("nan")}, {"dp_clip": 0.0},
                                 {"dp_clip": float("inf")}, {"dp_noise": 1e300}])  # fmt: skip
def test_a_plan_with_figures_that_make_no_noise_is_refused(
    bad: dict[str, float], engine: PeftEngine, start: Adapter
) -> None:
    plan = TrainPlan(start=start, training=replace(SGD, **bad))
    with pytest.raises(ConfigError, match="cannot be made"):
        engine.train([plan], [[batch(1)]])


def test_a_layer_without_gradients_by_example_is_refused(
    engine: PeftEngine, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the hooks: without them no step is taken."""
    monkeypatch.setattr(loop, "recording", lambda model: nullcontext())
    with pytest.raises(MismatchError, match="by example"):
        engine.train([TrainPlan(start=start, training=SGD)], [[batch(1)]])


def test_penalties_come_after_the_noise(engine: PeftEngine, start: Adapter) -> None:
    """They are no example's gradient: an empty second step pulls back towards the start."""
    plan = TrainPlan(start=start, training=SGD)
    held = replace(plan, training=replace(SGD, proximal_mu=0.4))
    once = moved(engine, plan, [batch(1, 2)])
    twice = moved(engine, held, [batch(1, 2), EMPTY])
    for name, change in once.items():
        assert torch.allclose(twice[name], (1 - 0.5 * 0.4) * change, atol=1e-6), name


def test_no_number_of_the_examples_is_reported(engine: PeftEngine, start: Adapter) -> None:
    plan = TrainPlan(start=start, training=SGD)
    (trained,) = engine.train([plan], [[batch(1, 2), batch(3)]])
    assert dict(trained.metrics) == {"steps": 2.0}


def test_the_engine_is_as_it_was_afterwards(engine: PeftEngine, start: Adapter) -> None:
    plain = TrainPlan(start=start, training=LocalTraining(lr=1e-2))
    before = moved(engine, plain, [batch(1, 2)])
    engine.train([TrainPlan(start=start, training=SGD)], [[batch(1, 2), EMPTY]])
    after = moved(engine, plain, [batch(1, 2)])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_cohort_engine_refuses(tiny_model: Path, start: Adapter) -> None:
    cohort = CohortEngine(models.load_base(ModelSpec(source=str(tiny_model)), LORA, 3), LORA)
    with pytest.raises(ConfigError, match="example by example"):
        cohort.train([TrainPlan(start=start, training=SGD)], [[batch(1)]])


def test_every_row_is_drawn_independently() -> None:
    class Rows:
        def collate(self, chosen: Any) -> Batch:
            return Batch({}, torch.as_tensor(chosen))

    rows = np.arange(10, 20)
    generator = np.random.default_rng(0)
    drawn = list(poisson_batches(Rows(), rows, 0.2, 5000, generator))  # type: ignore[arg-type]
    sizes = torch.tensor([len(b) for b in drawn], dtype=torch.float64)
    assert len(drawn) == 5000
    assert float(sizes.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(sizes.var()) == pytest.approx(10 * 0.2 * 0.8, abs=0.15)
    for row in rows:
        share = sum(bool((b.labels == row).any()) for b in drawn) / 5000
        assert share == pytest.approx(0.2, abs=0.03)


Table = Callable[..., dict[str, Any]]


def test_a_run_reports_each_sites_own_epsilon(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(
        strategy={"name": "ffa-lora"},
        rounds={"count": 2, "per-round": 3, "evaluate-every": 2},
        training={"steps": 2, "dp": {"noise-multiplier": 1.5, "max-grad-norm": 0.5}},
        engine={"cohort": "auto"},
    )
    run = Run(simulate(parse_config(table), tmp_path / "run").path)
    lines = (run.directory / "privacy.jsonl").read_text().splitlines()
    assert len(lines) == 2
    spent = run.rounds[-1]["privacy"]["example"]
    assert 0 < spent["median"] <= spent["epsilon"]
    assert spent["adjacency"] == "add or remove one example of a client"
    replies = [r for r in run_replies(run) if r["status"] == "ok"]
    assert len(replies) == 6
    assert all(r["epsilon"] > 0 and "loss" not in r for r in replies)
    assert max(r["epsilon"] for r in replies) == spent["epsilon"]


COMBINATIONS: dict[str, dict[str, Any]] = {
    "fed-sb": {"strategy": {"name": "fed-sb"}},
    "fed-sb-seeded": {"strategy": {"name": "fed-sb", "basis": "seeded"}},
    "flora": {"strategy": {"name": "flora"}},
    "rolora": {"strategy": {"name": "rolora"}},
    "fedsa-lora": {"strategy": {"name": "fedsa-lora"}},
    "mixed-ranks": {"strategy": {"name": "hetlora"}, "fleet": {"ranks": [2, 4]}},
    "fedprox": {"strategy": {"name": "fedprox"}},
    "robust": {"strategy": {"name": "krum"}},
    "whole-sites-too": {"strategy": {"name": "central-dp", "noise-multiplier": 1.0}},
    "pissa": {"lora": {"init": "pissa"}},
    "dropout": {"lora": {"dropout": 0.1}},
    "frozen-head": {"lora": {"head": "frozen"}},
    "pruned": {"pruning": {"selection": "random"}, "fleet": {"model-shares": [0.5, 1.0]}},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_a_site_is_asked_to_train_does_not_change_the_account(
    name: str, tiny_table: Table, tmp_path: Path
) -> None:
    training = {"steps": 2, "dp": {"noise-multiplier": 1.5, "max-grad-norm": 0.5}}
    rounds = {"count": 2, "per-round": 3, "evaluate-every": 2}
    config = parse_config(tiny_table(**COMBINATIONS[name], rounds=rounds, training=training))
    run = Run(simulate(config, tmp_path / "run").path)
    assert [line["failures"] for line in run.rounds] == [{}, {}]
    replies = [line for line in run_replies(run) if line["kind"] == "train"]
    assert all("loss" not in line and line["steps"] == 2 for line in replies)
    times: dict[str, int] = {}
    for line in replies:
        times[line["site"]] = times.get(line["site"], 0) + 1
        event = (1.5, min(1.0, 4 / line["examples"]), 2 * times[line["site"]])
        assert line["epsilon"] == example_epsilon([event], 1e-5)


def run_replies(run: Run) -> list[dict[str, Any]]:
    import json

    text = (run.directory / "clients.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(Exception, match=r"opacus is not installed") as caught:
        by_example._opacus()
    assert "fedft[privacy]" in str(caught.value)
