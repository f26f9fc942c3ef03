"""Row 45 of the fault catalogue: a fifth of the sites lie. FedAvg-LoRA is the positive control."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.api import Run
from fedft.server.config_file import parse_config
from fedft.server.run import simulate

Table = Callable[..., dict[str, Any]]
ROBUST = ("coordinate-median", "multi-krum")


@pytest.fixture
def poisoned(tiny_table: Table) -> Table:
    """Two of ten sites lie, and all take part in every round."""

    def table(attack: dict[str, Any] | None, rule: str) -> dict[str, Any]:
        fleet: dict[str, Any] = {"clients": 10}
        if attack:
            fleet["attack"] = {"share": 0.2, **attack}
        table = tiny_table(
            fleet=fleet,
            rounds={"count": 5, "per-round": 10, "evaluate-every": 5},
            training={"epochs": 3},
            strategy={"name": rule},
            engine={"cohort": 10},
        )
        return {**table, "data": {**table["data"], "partition": {"kind": "iid"}}}

    return table


def accuracy(table: dict[str, Any], folder: Path) -> float:
    return Run(simulate(parse_config(table), folder).path).metrics["final"]["accuracy"]


ATTACKS = {"sign-flip": 6.0, "collude": 20.0}


@pytest.mark.parametrize("kind", ATTACKS)
def test_robust_rules_stand_what_the_mean_does_not(
    kind: str, poisoned: Table, tmp_path: Path
) -> None:
    """Three classes: chance is a third."""
    attack = {"kind": kind, "scale": ATTACKS[kind]}
    mean = accuracy(poisoned(attack, "fedavg-lora"), tmp_path / "mean")
    assert mean < 0.5
    for rule in ROBUST:
        assert accuracy(poisoned(attack, rule), tmp_path / rule) > mean + 0.15, rule


def test_without_liars_the_mean_learns(poisoned: Table, tmp_path: Path) -> None:
    assert accuracy(poisoned(None, "fedavg-lora"), tmp_path / "honest") > 0.65


@pytest.mark.ray
def test_the_same_lies_on_ray(poisoned: Table, tmp_path: Path) -> None:
    table = poisoned({"kind": "sign-flip", "scale": 2.0}, "krum")
    inline = Run(simulate(parse_config(table), tmp_path / "inline").path)
    table["engine"] = {**table["engine"], "backend": "ray", "workers": 2}
    ray = Run(simulate(parse_config(table), tmp_path / "ray").path)
    assert ray.metrics["history_sha256"] == inline.metrics["history_sha256"]
