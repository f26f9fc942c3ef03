"""Lies are the lies they say they are, and told by the same sites everywhere."""

import pytest
import torch

from fedft.clients.attack import liars, records_sent_by, sent_by
from fedft.core.spec import AttackSpec, DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.types import Adapter, Factors, TrainPlan

START = Adapter({"m": Factors(torch.ones(1, 3), torch.zeros(2, 1), 1.0)}, {"bias": torch.ones(2)})
PLAN = TrainPlan(start=START, round=4)
TRUTH = {
    name: t + torch.arange(1.0, t.numel() + 1).view(t.shape) for name, t in START.tensors().items()
}


def task(clients: int = 10, **attack: object) -> TaskSpec:
    return TaskSpec(
        model=ModelSpec(),
        lora=LoraSpec(),
        data=DataSpec(),
        clients=clients,
        attack=AttackSpec.model_validate(attack) if attack else None,
    )


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float((t - START.tensors()[n]).square().sum()) for n, t in tensors.items()) ** 0.5


def test_a_share_of_the_sites_lies_and_the_seed_says_which():
    assert len(liars(0, 50, 0.2)) == 10
    assert liars(0, 50, 0.2) == liars(0, 50, 0.2) != liars(1, 50, 0.2)
    assert liars(0, 50, 0.0) == frozenset()


def test_the_others_tell_the_truth():
    spec = task(kind="sign-flip", share=0.2)
    honest = set(range(10)) - liars(spec.seed, 10, 0.2)
    assert len(honest) == 8
    for index in honest:
        assert sent_by(spec, index, PLAN, TRUTH) is TRUTH
    assert sent_by(task(), min(liars(0, 10, 0.2)), PLAN, TRUTH) is TRUTH


def test_a_flipped_sign():
    spec = task(kind="sign-flip", share=0.2, scale=3.0)
    for index in liars(spec.seed, 10, 0.2):
        lie = sent_by(spec, index, PLAN, TRUTH)
        for name, start in START.tensors().items():
            assert torch.equal(lie[name] - start, -3.0 * (TRUTH[name] - start))


def test_liars_that_collude_point_the_same_way():
    spec = task(kind="collude", share=0.2, scale=2.0)
    a, b = (sent_by(spec, index, PLAN, TRUTH) for index in sorted(liars(spec.seed, 10, 0.2)))
    assert all(torch.equal(a[name], b[name]) for name in TRUTH)
    assert norm(dict(a)) == pytest.approx(2 * norm(TRUTH), rel=1e-5)
    other = sent_by(spec, min(liars(0, 10, 0.2)), TrainPlan(start=START, round=5), TRUTH)
    assert not torch.equal(a["bias"], other["bias"])


def test_liars_lie_in_what_they_send_beside_the_adapter():
    records = {"drift": TRUTH, "count": {"n": torch.tensor(3.0)}}
    spec = task(kind="sign-flip", share=0.2, scale=3.0)
    index = min(liars(spec.seed, 10, 0.2))
    honest = min(set(range(10)) - liars(spec.seed, 10, 0.2))
    assert records_sent_by(spec, honest, PLAN, records) is records
    assert records_sent_by(task(), index, PLAN, records) is records
    lie = records_sent_by(spec, index, PLAN, records)
    assert float(lie["count"]["n"]) == -9.0
    assert all(torch.equal(lie["drift"][name], -3.0 * t) for name, t in TRUTH.items())
    together = task(kind="collude", share=0.2, scale=2.0)
    a, b = (records_sent_by(together, i, PLAN, records) for i in sorted(liars(0, 10, 0.2)))
    assert all(torch.equal(a["drift"][name], b["drift"][name]) for name in TRUTH)
    length = sum(float(t.square().sum()) for t in TRUTH.values()) ** 0.5
    found = sum(float(t.square().sum()) for t in a["drift"].values()) ** 0.5
    assert found == pytest.approx(2 * length, rel=1e-5)
