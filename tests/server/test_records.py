"""Named records of tensors beside the adapter, through whole runs: by hand, everywhere alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.api import Run
from fedft.core.errors import Interrupted, UpdateRejected
from fedft.core.types import TrainPlan
from fedft.server import setting
from fedft.server.checkpoints import Checkpoints
from fedft.server.collect import plain
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.forecast import forecast
from fedft.server.run import resume, simulate
from tests.server import drift

Table = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _term(monkeypatch: pytest.MonkeyPatch) -> None:
    drift.at_clients(monkeypatch)
    drift.at_server(monkeypatch)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "clients.jsonl").read_text().splitlines()]


def state_of(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """The anchor in the server's last state, and what every client has kept."""
    checkpoints = Checkpoints(run.directory / "checkpoints", keep=2)
    checkpoint = checkpoints.load()
    assert checkpoint is not None
    sites = {name: dict(checkpoints.sites[name]) for name in checkpoints.sites}
    return checkpoint.state.record("anchor"), sites


def holds_by_hand(run: Run) -> None:
    """The law of the term, whatever the run's clients, blocks and backend."""
    anchor, counts = drift.twin(lines(run))
    found, kept = state_of(run)
    assert found
    for tensor in found.values():
        assert torch.allclose(tensor.double(), torch.full_like(tensor, anchor).double(), rtol=1e-5)
    assert kept.keys() == counts.keys()
    for site, tensors in kept.items():
        assert {name.partition("/")[0] for name in tensors} == {"own-drift"}
        assert all(bool((t == counts[site]).all()) for t in tensors.values())


def run_of(config: RunConfig, folder: Path, **options: Any) -> Run:
    return Run(simulate(config, folder, **options).path)


@pytest.mark.parametrize("cohort", [1, 4])
def test_a_run_goes_by_hand_and_is_forecast_to_the_byte(
    cohort: int, tiny_table: Table, tmp_path: Path
) -> None:
    config = parse_config(tiny_table(engine={"cohort": cohort}))
    run = run_of(config, tmp_path / "run")
    holds_by_hand(run)
    cost = forecast(config)
    assert [line["bytes"] for line in run.rounds] == [cost["bytes_per_round"]] * 4
    one = cost["clients"][0]
    assert one["bytes"] == {"up": 8 * one["trainable"], "down": 8 * one["trainable"]}


@pytest.mark.parametrize("rule", ["fedavg-lora", "fedbuff", "fedavgm"])
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_records(
    rule: str, tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    """Server's slots and clients' state survive, also where clients are at work on old versions."""
    changes: dict[str, Any] = {"strategy": {"name": rule}}
    if rule == "fedbuff":
        speeds = {"speeds": [1.0, 2.0, 10.0], "up-mbps": [1.0], "down-mbps": [4.0]}
        changes = {"strategy": {"name": rule, "size": 2}, "fleet": speeds}
    config = parse_config(tiny_table(**changes))
    whole = run_of(config, tmp_path / "whole")
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        run_of(config, tmp_path / "cut", trackers=[stop], stop=stop)
    cut = Run(resume(tmp_path / "cut").path)
    keys = ("adapter_sha256", "history_sha256", "bytes", "final")
    assert [cut.metrics[k] for k in keys] == [whole.metrics[k] for k in keys]
    (anchor, kept), (anchor_cut, kept_cut) = state_of(whole), state_of(cut)
    assert anchor.keys() == anchor_cut.keys()
    assert all(torch.equal(anchor[name], anchor_cut[name]) for name in anchor)
    assert kept.keys() == kept_cut.keys()
    for site, tensors in kept.items():
        assert all(torch.equal(t, kept_cut[site][name]) for name, t in tensors.items())
    _, counts = drift.twin(lines(whole))
    assert {s: int(next(iter(t.values())).max()) for s, t in kept.items()} == counts
    if rule != "fedbuff":  # under which an old anchor is what some clients were sent
        holds_by_hand(cut)


def test_forked_workers_agree(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run_of(parse_config(tiny_table()), tmp_path / "here")
    monkeypatch.setattr(setting, "CLIENT_APP", "tests.server.drift_app:app")
    engine = {"backend": "processes", "workers": 2, "cohort": 1}
    there = run_of(parse_config(tiny_table(engine=engine)), tmp_path / "there")
    holds_by_hand(there)
    assert there.metrics["adapter_sha256"] == here.metrics["adapter_sha256"]
    (a, _), (b, _) = state_of(here), state_of(there)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_records_are_in_the_forecast_of_memory(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record down and one up, and twice one that stays: four numbers beside each that learns."""
    config = parse_config(tiny_table())
    with_term = forecast(config)["clients"][0]
    monkeypatch.undo()
    without = forecast(config)["clients"][0]
    assert with_term["memory_mib"]["adapter"] == pytest.approx(
        without["memory_mib"]["adapter"] * (20 + 4 * 4) / 20
    )
    assert without["bytes"] == {"up": 4 * without["trainable"], "down": 4 * without["trainable"]}


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"name": "krum"}, "krum over fedavg-lora picks clients"),
        ({"name": "multi-krum"}, "picks clients"),
        ({"name": "norm-clip"}, "bounds the change"),
        ({"name": "trimmed-mean", "inner": {"name": "fedavg-lora"}}, "one summary"),
        ({"name": "coordinate-median", "inner": {"name": "fedavg-lora"}}, "one summary"),
        ({"name": "central-dp", "inner": {"name": "fedavg-lora"}, "delta": 0.01}, "its noise"),
        ({"name": "fedprox", "inner": {"name": "krum"}}, "picks clients"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_rules_that_look_at_the_adapter_alone_refuse_records_by_name(
    rule: dict[str, Any], says: str, tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match=says) as refused:
        parse_config(tiny_table(strategy=rule))
    assert "'drift' of the term drift" in str(refused.value)
    monkeypatch.undo()
    parse_config(tiny_table(strategy=rule))  # control: without the term there is nothing to refuse


def test_dp_sgd_refuses_records_by_name(tiny_table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table(training={"dp": {"noise-multiplier": 1.0}})
    with pytest.raises(Exception, match="'drift' of the term drift would leave without any"):
        parse_config(table)
    monkeypatch.undo()
    parse_config(table)


@pytest.mark.parametrize("engine", [{"cohort": 1}, {"backend": "processes", "workers": 2}])
def test_what_a_refused_reply_left_at_its_client_does_not_count(
    engine: dict[str, Any], tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a real client, which is told; else its records and the server's would fall apart."""
    if "backend" in engine:  # whose workers are to know the term, too
        monkeypatch.setattr(setting, "CLIENT_APP", "tests.server.drift_app:app")
    honest = plain.validate

    def strict(content: Any, plan: TrainPlan, site: Any, *rest: Any) -> Any:
        update = honest(content, plan, site, *rest)
        if plan.round in (2, 3) and site.name.endswith(("1", "4", "6")):
            raise UpdateRejected("norm", "as it happens")
        return update

    monkeypatch.setattr(plain, "validate", strict)
    table = tiny_table(engine=engine, rounds={"quorum": 1, "count": 5, "per-round": 6})
    run = run_of(parse_config(table), tmp_path / "run")
    assert any(line["failures"] for line in run.rounds)
    holds_by_hand(run)


def test_an_attempt_that_does_not_count_leaves_nothing_at_clients(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, refused = plain.validate, 3

    def strict(content: Any, plan: TrainPlan, site: Any, *rest: Any) -> Any:
        nonlocal refused
        if plan.round == 2 and refused:
            refused -= 1
            raise UpdateRejected("norm", "as it happens")
        return honest(content, plan, site, *rest)

    monkeypatch.setattr(plain, "validate", strict)
    table = tiny_table(rounds={"quorum": 2, "retries": 2, "count": 4})
    run = run_of(parse_config(table), tmp_path / "run")
    assert [line["attempts"] for line in run.rounds] == [1, 2, 1, 1]
    attempts = [x for x in lines(run) if x["round"] == 2 and x["status"] == "ok"]
    assert len(attempts) == 5, "one of the attempt that did not count, four of the one that did"
    counted = [x for x in lines(run) if x is not attempts[0] and x != attempts[0]]
    anchor, counts = drift.twin(counted)
    found, kept = state_of(run)
    assert all(torch.allclose(t, torch.full_like(t, anchor), rtol=1e-5) for t in found.values())
    assert {s: int(next(iter(t.values())).max()) for s, t in kept.items()} == counts
