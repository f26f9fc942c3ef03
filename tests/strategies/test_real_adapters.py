"""The identities of methods on adapters that were really trained: MiniLM, WordNet, four sites."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedft.clients.engines.loop import PeftEngine
from fedft.core import algebra, meters, models, seeds
from fedft.core.data.batches import batches
from fedft.core.data.source import prepare
from fedft.core.folding import fold
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.types import Adapter, ClientUpdate, LocalTraining, ServerState, Site
from fedft.strategies import (
    FedAvgLoRA,
    FedExLoRA,
    FedMomentum,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    LoRAFAIR,
    RoLoRA,
    Strategy,
)

MODEL, LORA = ModelSpec(), LoraSpec(rank=4, alpha=8, layers=(4, 5))
SITES, ROUNDS = 4, 2


class Bench:
    """A resident MiniLM and four sites with two classes each."""

    def __init__(self) -> None:
        folder = models.resolve(MODEL)
        self.data = prepare(DataSpec(), MODEL.task, models.input_encoder(MODEL, folder))
        base = models.load_base(MODEL, LORA, len(self.data.classes))
        self.engine = PeftEngine(base, LORA)
        labels = self.data.train.labels
        assert labels is not None
        self.rows = [np.flatnonzero((labels // 3) == k)[:32] for k in range(SITES)]

    def initial(self) -> Adapter:
        return models.initial_adapter(self.engine.base.shapes, LORA, LORA.rank, seed=0)

    def updates(self, rule: Strategy, state: ServerState) -> list[ClientUpdate]:
        training = LocalTraining(steps=3, lr=5e-3)
        found: list[ClientUpdate] = []
        for k, rows in enumerate(self.rows):
            site = Site(f"site-{k}", examples=10 * (k + 1))
            plan = replace(rule.plan(state, site), training=training, site=site.name)
            generator = seeds.torch_generator(0, "batches", state.round, site.name)
            own = list(batches(self.data.train, rows, 8, steps=3, generator=generator))
            trained = self.engine.train([plan], [own])[0].adapter
            sent = trained.tensors(plan.send)
            found.append(ClientUpdate(site.name, site.examples, sent, plan.start))
        return found

    def rounds(
        self, rule: Strategy
    ) -> list[tuple[ServerState, Sequence[ClientUpdate], ServerState]]:
        state, history = rule.init(self.initial()), []
        for _ in range(ROUNDS):
            updates = self.updates(rule, state)
            after = rule.aggregate(state, updates)
            history.append((state, updates, after))
            state = after
        return history


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def relative_bias(
    before: ServerState, updates: Sequence[ClientUpdate], after: ServerState
) -> float:
    value = meters.measure(before, fold(updates), after)["bias"]["relative"]
    assert value is not None
    return value


@pytest.mark.parametrize(
    "rule", [FFALoRA(), RoLoRA(), FLoRA(), FedExLoRA(), FedMomentum()], ids=lambda r: r.name
)
def test_exact_rules_have_no_bias(bench: Bench, rule: Strategy) -> None:
    for step in bench.rounds(rule):
        assert relative_bias(*step) <= 1e-6


def test_fedavg_has_one_and_lora_fair_never_more(bench: Bench) -> None:
    before, updates, average = bench.rounds(FedAvgLoRA())[-1]
    bias = relative_bias(before, updates, average)
    assert bias > 1e-3  # control: there is something to remove
    corrected = [
        relative_bias(before, updates, LoRAFAIR(ridge=ridge).aggregate(before, updates))
        for ridge in (1e-6, 1e-3, 1e-1, 10.0, 1e9)
    ]
    assert all(value <= bias * (1 + 1e-6) for value in corrected)
    assert corrected == sorted(corrected)
    assert corrected[0] < 0.999 * bias
    assert corrected[-1] == pytest.approx(bias, rel=1e-6)


def test_flexlora_loses_exactly_the_tail_of_the_spectrum(bench: Bench) -> None:
    _before, updates, after = bench.rounds(FlexLoRA())[-1]
    p = [u.examples / sum(v.examples for v in updates) for u in updates]
    for module, applied in after.adapter.factors.items():
        mean = algebra.stack([u.adapter.factors[module] for u in updates], p)
        tail = algebra.singular_values(mean)[applied.rank :].square().sum().sqrt()
        residual = torch.linalg.norm(mean.product().double() - applied.product().double())
        whole = algebra.norm(mean)
        assert float(tail) > 1e-4 * whole  # control: the tail is not empty
        assert abs(float(residual - tail)) <= 1e-6 * whole
