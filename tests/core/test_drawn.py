"""Batches are made when they are asked for, one at a time, whatever number a plan names."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedft.clients.resident import Workbench, workbench
from fedft.core import seeds
from fedft.core.data.batches import batches
from fedft.core.drawn import Drawn, Overtime, distinct, traced, within
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.types import Batch, LocalTraining


def numbered(made: list[int], end: int = 10**15) -> Iterator[Batch]:
    for i in range(end):
        made.append(i)
        yield Batch({"x": torch.full((2, 1000), float(i))}, torch.full((2,), i))


def drawn(made: list[int], length: int) -> Drawn:
    return Drawn(lambda: numbered(made), length, 7)


def test_in_order_each_is_made_once() -> None:
    made: list[int] = []
    all_ = drawn(made, 5)
    assert not made and len(all_) == 5 and all_
    assert [int(all_[i].labels[0]) for i in (0, 0, 1, 2, 2, 3)] == [0, 0, 1, 2, 2, 3]
    assert made == [0, 1, 2, 3]
    assert int(all_[-1].labels[0]) == 4 and made == [0, 1, 2, 3, 4]
    assert [int(b.labels[0]) for b in all_] == [0, 1, 2, 3, 4]
    assert int(all_[3].labels[0]) == 3, "again from the start"
    with pytest.raises(IndexError):
        all_[5]
    assert not drawn(made, 0) and list(drawn(made, 0)) == []


def test_a_length_without_bound_takes_no_memory() -> None:
    endless = drawn([], 10**30)
    assert endless
    tracemalloc.start()
    try:
        for batch, _ in zip(endless, range(3000), strict=False):
            assert len(batch) == 2
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000
    kept = list(drawn([], 300))  # positive control: 300 of them held are 2.4 MB of numbers
    assert sum(b.inputs["x"].nbytes for b in kept) > 2_000_000


def test_work_out_of_time_gets_no_batch() -> None:
    all_ = drawn([], 5)
    with within(-1.0), pytest.raises(Overtime):
        all_[0]
    with within(60.0):
        all_[0]
    all_[1]  # outside of it nothing is limited


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    own = tmp_path_factory.mktemp("own") / "own.jsonl"
    own.write_text("\n".join(tiny_data.read_text().splitlines()[:30]) + "\n")
    task = TaskSpec(
        model=ModelSpec(source=str(tiny_model)),
        lora=LoraSpec(rank=2),
        data=DataSpec(source=str(own), test_fraction=0.0),
        site="ann",
    )
    return workbench(task.model_dump_json())


@pytest.mark.parametrize("size", [1, 4, 7, 30, 64, 10**9])
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 9, 40])
def test_they_are_the_batches_of_the_list_and_know_how_many_rows_are_seen(
    bench: Workbench, size: int, steps: int | None
) -> None:
    training = LocalTraining(batch_size=size, steps=steps, epochs=2)
    found = bench.training_batches(0, 3, training)
    generator = seeds.torch_generator(0, "batches", 3, "ann")
    rows = np.arange(30)
    listed = list(
        batches(bench.data.train, rows, size, epochs=2, steps=steps, generator=generator, pool="a")
    )
    assert len(found) == len(listed)
    for one, other in zip(found, listed, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    assert distinct(found, 30) == distinct(listed, 30) == min(30, sum(map(len, listed)))
    assert traced(found) and traced(listed)


def test_no_plan_makes_a_client_allocate_without_bound(bench: Workbench) -> None:
    """The plan itself costs nothing; each batch costs its rows."""
    tracemalloc.start()
    try:
        for training in (
            LocalTraining(epochs=10**9),
            LocalTraining(steps=10**12),
            LocalTraining(epochs=10**9, dp_noise=1.0, batch_size=8),
            LocalTraining(steps=10**12, dp_noise=1.0, batch_size=10**9),
        ):
            found = bench.training_batches(0, 1, training)
            assert found and len(found) >= 10**9
            assert sum(len(found[i]) for i in range(20)) > 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
