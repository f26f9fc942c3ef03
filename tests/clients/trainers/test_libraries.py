"""TRL's trainers and Lightning's on networks of two small blocks, by the examples' own functions."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedft.core.examples import TokenExamples
from fedft.core.types import TrainPlan
from tests.clients.trainers.conftest import EXAMPLES, Room, federated

pytestmark = [
    pytest.mark.slow,  # importing TRL takes longer than the training
    pytest.mark.filterwarnings("ignore"),  # what libraries warn of is not ours
]

Table = Callable[..., dict[str, Any]]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of the example as a module, which it is under its own name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("script", ["train", "dpo"])
def test_trl_trains_what_it_is_given_and_wraps_nothing(
    chat_table: dict[str, Any], scripts: Any, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(chat_table)
    assert isinstance(room.bench.data.train, TokenExamples)
    engine = room.engine("plain")
    monkeypatch.setattr(engine, "_make", scripts(script).make_trainer)

    def found(plan: TrainPlan) -> Any:
        (result,) = engine.train([plan], [[]])
        return result

    first = found(room.plan())
    before, after = room.plan().start.tensors(), first.adapter.tensors()
    assert any(not torch.equal(after[n], t) for n, t in before.items())
    assert first.metrics["steps"] == {"train": 4, "dpo": 2}[script] and first.metrics["loss"] > 0
    again = found(room.plan()).adapter.tensors()
    assert all(torch.equal(again[n], after[n]) for n in after)
    assert found(room.plan(rank=2)).adapter.rank == 2  # of a client that can do less
    assert room.reloads == 0


@pytest.mark.parametrize("script", ["train", "dpo"])
def test_a_part_that_the_plan_leaves_stays_with_trl_too(
    chat_table: dict[str, Any], scripts: Any, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(chat_table)
    engine = room.engine("plain")
    monkeypatch.setattr(engine, "_make", scripts(script).make_trainer)
    plan = room.plan(train=frozenset({"B"}))
    (found,) = engine.train([plan], [[]])
    before, after = plan.start.tensors(), found.adapter.tensors()
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert moved and all("lora_B" in name for name in moved)


@pytest.mark.parametrize("script", ["train", "dpo"])
def test_whole_runs_learn(
    chat_table: dict[str, Any], scripts: Any, script: str, tmp_path: Path
) -> None:
    """The right answer is the same for all: its perplexity falls below that of the base."""
    learnt = federated(chat_table, scripts(script).make_trainer, tmp_path / "run")
    final = learnt.metrics["final"]
    assert [line["failures"] for line in learnt.rounds] == [{}, {}]
    assert final["perplexity"] < 11  # of eleven words, one after the other at random


@pytest.mark.parametrize("script", ["classify", "with_lightning"])
def test_classifiers_by_transformers_and_by_lightning(
    tiny_table: Table, scripts: Any, script: str, tmp_path: Path
) -> None:
    table = tiny_table(training={"steps": 12, "batch-size": 8, "lr": 2e-2})
    table["rounds"] = {"count": 4, "per-round": 8, "evaluate-every": 4}
    learnt = federated(table, scripts(script).make_trainer, tmp_path / "run")
    again = federated(table, scripts(script).make_trainer, tmp_path / "again")
    assert learnt.metrics["final"]["accuracy"] > 1 / 3
    assert all(line["failures"] == {} for line in learnt.rounds)
    assert again.metrics["adapter_sha256"] == learnt.metrics["adapter_sha256"]
