"""The federation beside the plain loop: the same work is counted on both sides."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import federation
from fedft.clients.engines.loop import PeftEngine

Table = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("backend", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_round_and_the_loop_are_counted_over_the_same_work(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    trained: list[tuple[str, int]] = []
    engine = PeftEngine

    def train(self: Any, plans: Any, batches: Any) -> Any:
        trained.extend((plan.site, len(own)) for plan, own in zip(plans, batches, strict=True))
        return engine._train(self, plans[0], batches[0])

    monkeypatch.setattr(engine, "train", train)
    table = tiny_table(
        rounds={"count": 4, "evaluate-every": 4},
        engine={"backend": backend, "workers": 1},
        training={"steps": 3},
    )
    result = federation.section(table)
    assert len(trained) == 4 * 4
    assert all(steps == 3 for _, steps in trained)
    assert result["loop_cpu_s"]["n"] == 2  # neither the first round nor the last counts
    parts = result["round_cpu_s"]
    assert parts.keys() == {"worker", "driver", "ray"}
    assert parts["worker"]["median"] > 0
    assert parts["driver"]["median"] > 0
    assert result["over_loop"]["worker + driver"]["low"] > result["over_loop"]["worker"]["low"]
