"""Whole runs on a compressed wire: what they cost, that they resume to the bit, who refuses what."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedft.api import Run
from fedft.clients import app
from fedft.clients.given import task_of
from fedft.core.errors import ConfigError, Interrupted, MismatchError, UpdateRejected
from fedft.core.link.codes import word_of
from fedft.core.link.framing import check, describe
from fedft.core.terms import entry
from fedft.core.types import Adapter, Factors, Site, TrainPlan
from fedft.core.wire import changes, compress
from fedft.core.wire.changes import Packing
from fedft.core.wire.codec import packed_reply
from fedft.core.wire.compress import COMPRESSORS, Bf16, Compressor, Fp32, Int8, Key
from fedft.server.checkpoints import Checkpoints
from fedft.server.config_file import configured, parse_config
from fedft.server.forecast import forecast
from fedft.server.run import resume, simulate
from fedft.server.validation import Limits, validate
from tests.core.top_k import TopK
from tests.server.test_run import without_seconds

Table = Callable[..., dict[str, Any]]
WAYS: list[Any] = ["fp32", "bf16", "int8", {"name": "int8", "block": 64}]


@pytest.fixture
def top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more row, as another package would bring it."""
    monkeypatch.setattr(compress, "COMPRESSORS", (*COMPRESSORS, TopK))
    monkeypatch.setitem(compress.REGISTRY.own, "top-k", TopK)  # type: ignore[arg-type]


def run_of(table: Mapping[str, Any], folder: Path, **options: Any) -> Run:
    return Run(simulate(parse_config(table), folder, **options).path)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run.directory / "clients.jsonl").read_text().splitlines()]


# ── costs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS[2:], ids=str)
def test_a_run_sends_the_bytes_that_plan_said_and_learns(
    tiny_table: Table, tmp_path: Path, way: Any
) -> None:
    table = tiny_table(
        engine={"compressor": way}, rounds={"count": 6, "evaluate-every": 6}, training={"epochs": 3}
    )
    (client,) = forecast(parse_config(table))["clients"]
    run = run_of(table, tmp_path / "run")
    assert {line["bytes_up"] for line in lines(run)} == {client["bytes"]["up"]}
    for line in run.rounds:
        assert line["bytes"]["up"] == 4 * client["bytes"]["up"]
        assert line["bytes"]["down"] == 4 * client["bytes"]["down"]
    assert run.metrics["final"]["accuracy"] > 0.6  # three classes: chance is a third


def test_int8_sends_a_quarter_up_and_float32_down(tiny_table: Table) -> None:
    costs = {
        way: forecast(parse_config(tiny_table(engine={"compressor": way})))["clients"][0]["bytes"]
        for way in ("fp32", "bf16", "int8")
    }
    assert costs["bf16"]["up"] * 2 == costs["bf16"]["down"] * 2 == costs["fp32"]["up"]
    assert costs["int8"]["down"] == costs["fp32"]["down"]
    assert 0.25 < costs["int8"]["up"] / costs["fp32"]["up"] < 0.27


def test_rounding_is_noise_and_not_another_result(tiny_table: Table, tmp_path: Path) -> None:
    runs = {
        way: run_of(tiny_table(engine={"compressor": way}), tmp_path / way)
        for way in ("fp32", "int8")
    }
    hashes = {run.metrics["adapter_sha256"] for run in runs.values()}
    assert len(hashes) == 2
    a, b = (run.adapter("last").factors().tensors() for run in runs.values())
    start = _start(tiny_table)
    moved = sum(float((a[n] - start[n]).square().sum()) for n in a) ** 0.5
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
    assert 0 < apart < 0.05 * moved


def _start(tiny_table: Table) -> Mapping[str, Tensor]:
    from fedft.core import models
    from fedft.core.spec import LoraSpec, ModelSpec

    model = ModelSpec(source=tiny_table()["model"]["source"])
    lora = LoraSpec(rank=4, alpha=8)
    return models.initial_adapter(models.schema(model, lora, 3), lora, 4, 0).tensors()


# ── the same bytes, whatever happens ──────────────────────────────────────────────────────────


def test_a_stopped_run_on_int8_ends_with_the_same_bytes(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    table = tiny_table(engine={"compressor": "int8"})
    cut_short(table, tmp_path, stop_after)


def test_what_clients_keep_survives_a_stop(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any], top_k: None
) -> None:
    table = tiny_table(
        engine={"compressor": {"name": "top-k", "share": 0.1}}, rounds={"per-round": 6}
    )
    whole = cut_short(table, tmp_path, stop_after)
    checkpoints = Checkpoints(whole.directory / "checkpoints")
    assert checkpoints.load() is not None and checkpoints.sites
    for kept in checkpoints.sites.values():
        assert all(name.startswith(entry(changes.LEFT, "")) for name in kept)
        assert any(bool(t.abs().max() > 0) for t in kept.values())
    forecasted = forecast(parse_config(table))["clients"][0]["bytes"]["up"]
    assert {line["bytes_up"] for line in lines(whole)} == {forecasted}


def test_what_clients_keep_counts(
    tiny_table: Table, tmp_path: Path, top_k: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: clients who forget what they left out end elsewhere."""
    table = tiny_table(engine={"compressor": "top-k"}, rounds={"per-round": 6})
    whole = run_of(table, tmp_path / "whole")
    monkeypatch.setattr(TopK, "stateful", False)
    assert (
        run_of(table, tmp_path / "forgetful").metrics["adapter_sha256"]
        != whole.metrics["adapter_sha256"]
    )


def cut_short(table: Mapping[str, Any], tmp_path: Path, stop_after: Callable[[int], Any]) -> Run:
    whole = run_of(table, tmp_path / "whole")
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        simulate(parse_config(table), tmp_path / "cut", trackers=[stop], stop=stop)
    assert len(Run(tmp_path / "cut").rounds) == 2
    cut = Run(resume(tmp_path / "cut").path)
    assert cut.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
    assert cut.metrics["history_sha256"] == whole.metrics["history_sha256"]
    assert without_seconds(cut.rounds) == without_seconds(whole.rounds)
    return whole


@pytest.mark.parametrize("strategy", ["flora", "fedsa-lora", "fed-sb"])
def test_rules_of_every_shape_take_it(tiny_table: Table, tmp_path: Path, strategy: str) -> None:
    table = tiny_table(
        engine={"compressor": "int8"}, strategy={"name": strategy}, rounds={"count": 2}
    )
    assert run_of(table, tmp_path / "run").metrics["rounds"] == 2


def test_mixed_ranks_take_it(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(
        engine={"compressor": "int8", "cohort": 4},
        strategy={"name": "exact-mixed-rank"},
        fleet={"ranks": [2, 4]},
        rounds={"count": 2},
    )
    costs = {c["rank"]: c["bytes"]["up"] for c in forecast(parse_config(table))["clients"]}
    run = run_of(table, tmp_path / "run")
    assert {(line["rank"], line["bytes_up"]) for line in lines(run)} == set(costs.items())


@pytest.mark.grpc
def test_two_client_processes_give_the_bytes_of_a_simulation_on_int8(
    tiny_table: Table, stage: Callable[..., Any], tmp_path: Path
) -> None:
    """Law 6 over gRPC, with headers of int8."""
    from tests.server.stage import simulated, site_files, start_all

    config = parse_config(
        tiny_table(
            fleet={"clients": 2}, rounds={"count": 2, "per-round": 2}, engine={"compressor": "int8"}
        )
    )
    reference = simulated(config, tmp_path / "simulated")
    play = stage(config)
    start_all(play, site_files(config, reference, tmp_path / "files"))
    run = play.finish()
    for key in ("adapter_sha256", "history_sha256", "bytes"):
        assert run.metrics[key] == reference.metrics[key]


# ── one client among others ───────────────────────────────────────────────────────────────────


def test_a_client_that_diverged_costs_no_other_its_reply(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = app.sent_by

    def diverged(task: Any, index: int, plan: TrainPlan, tensors: Any) -> Any:
        sent = dict(real(task, index, plan, tensors))
        if plan.site == sorted(seen | {plan.site})[0]:
            name = next(iter(sent))
            sent[name] = sent[name] * torch.nan
        seen.add(plan.site)
        return sent

    seen: set[str] = set()
    monkeypatch.setattr(app, "sent_by", diverged)
    table = tiny_table(
        engine={"compressor": "int8", "cohort": 4},
        rounds={"count": 1, "per-round": 4, "quorum": 2, "evaluate-every": 1},
    )
    run = run_of(table, tmp_path / "run")
    failed = [line for line in lines(run) if line["status"] != "ok"]
    assert failed and len(failed) < 4
    assert "NaN" in json.dumps(failed[0])


NAME = "base_model.model.q.lora_A.weight"


def plan() -> TrainPlan:
    adapter = Adapter({"q": Factors(torch.ones(4, 100), torch.zeros(3, 4), 1.0)})
    return TrainPlan(adapter, send=frozenset({"A"}), site="ann", round=1)


def reply(one: Compressor, tensors: Mapping[str, Tensor] | None = None) -> Any:
    sent = plan().sent() if tensors is None else tensors
    packing = Packing(one, Key(0, 1, "ann"), plan().start.tensors())
    return packed_reply(sent, 5, {}, packing)[0]


@pytest.mark.parametrize("one", [Fp32(), Bf16(), Int8(), Int8(block=16)], ids=str)
def test_a_server_takes_what_its_run_is_sent_in_and_nothing_else(one: Compressor) -> None:
    site = Site("ann", 9)
    moved = {name: t + 0.5 for name, t in plan().sent().items()}
    update = validate(reply(one, moved), plan(), site, Limits(), one)
    assert torch.allclose(update.tensors[NAME], moved[NAME], atol=0.01)
    expected = {"arrays": {NAME: (4, 100)}}
    for other in (Fp32(), Bf16(), Int8(), Int8(block=16), TopK()):
        if other == one or (one.cast and other.cast):
            continue
        header = describe(reply(other))
        for take in (
            lambda sent=other: validate(reply(sent), plan(), site, Limits(), one),
            lambda header=header: check(header, expected, one),
        ):
            with pytest.raises(UpdateRejected) as refused:
                take()
            assert refused.value.reason in ("format", "dtype", "size")


def test_a_norm_is_that_of_what_was_decoded() -> None:
    site, limits = Site("ann", 9), Limits(update_norm=3.0)
    near = {name: t + 0.1 for name, t in plan().sent().items()}  # 0.1 sqrt(400) = 2
    validate(reply(Int8(), near), plan(), site, limits, Int8())
    far = {name: t + 0.2 for name, t in plan().sent().items()}
    with pytest.raises(UpdateRejected, match="moved by 4"):
        validate(reply(Int8(), far), plan(), site, limits, Int8())


def test_a_change_beyond_float32_is_refused_at_the_server() -> None:
    """Each end of the sum is finite, and the sum is not."""
    huge = TrainPlan(
        Adapter({"q": Factors(torch.full((4, 100), 3e38), torch.zeros(3, 4), 1.0)}),
        send=frozenset({"A"}),
    )
    packing = Packing(Int8(), Key(), {NAME: torch.zeros(4, 100)})
    content = packed_reply({NAME: torch.full((4, 100), 3e38)}, 5, {}, packing)[0]
    with pytest.raises(UpdateRejected) as refused:
        validate(content, huge, Site("ann", 9), Limits(), Int8())
    assert refused.value.reason == "nan"


# ── configuration ─────────────────────────────────────────────────────────────────────────────


def test_the_old_name_is_read_and_the_new_one_written(tiny_table: Table) -> None:
    old, new = (parse_config(tiny_table(engine={key: "bf16"})) for key in ("wire", "compressor"))
    assert old == new and old.engine.compressor == Bf16()
    assert 'compressor = "bf16"' in old.to_toml() and "wire" not in old.to_toml()
    assert configured(parse_config(tiny_table()), {"engine.wire": "bf16"}) == new
    with pytest.raises(ConfigError, match="wire = 'fp32' is the old name of compressor"):
        parse_config(tiny_table(engine={"wire": "fp32", "compressor": "int8"}))


def test_a_run_of_an_older_version_is_gone_on_with(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    """Its configuration has the old name, and no other of this kind."""
    table = tiny_table(engine={"compressor": "bf16"}, rounds={"count": 2, "evaluate-every": 2})
    whole = run_of(table, tmp_path / "whole")
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        simulate(parse_config(table), tmp_path / "cut", trackers=[stop], stop=stop)
    file = tmp_path / "cut" / "config.toml"
    assert file.read_text().count('compressor = "bf16"') == 1
    file.write_text(file.read_text().replace('compressor = "bf16"', 'wire = "bf16"'))
    cut = Run(resume(tmp_path / "cut", changed=parse_config(table)).path)
    assert cut.metrics["history_sha256"] == whole.metrics["history_sha256"]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_configuration_comes_back_and_the_task_says_what_it_said(
    tiny_table: Table, way: Any
) -> None:
    config = parse_config(tiny_table(engine={"compressor": way}))
    assert configured(config, {}) == config
    task = json.loads(config.task().model_dump_json())
    assert task["wire"] == way
    assert task_of(json.dumps(task)).wire == way


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("int4", "no compressor is called"),
        ({"name": "int8", "block": 3}, "at least 16"),
        (8, "a name is expected"),
    ],
)
def test_a_compressor_that_is_none_is_told(tiny_table: Table, given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        parse_config(tiny_table(engine={"compressor": given}))
    assert "[engine" in str(told.value) and "compressor" in str(told.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"training": {"dp": {}}}, r"compressor = 'int8': under \[training\] dp"),
        ({"strategy": {"name": "central-dp"}}, "compressor = 'int8': central-dp"),
        ({"strategy": {"name": "krum"}}, "krum chooses"),
        ({"strategy": {"name": "multi-krum"}}, "multi-krum chooses"),
        ({"strategy": {"name": "coordinate-median"}}, "coordinate-median chooses"),
        ({"strategy": {"name": "trimmed-mean"}}, "trimmed-mean chooses"),
        (
            {"strategy": {"name": "fedprox", "mu": 0.1, "inner": {"name": "krum"}}},
            "krum chooses",
        ),
    ],
)
def test_it_is_refused_by_name_where_it_makes_no_sense(
    tiny_table: Table, tables: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tiny_table(engine={"compressor": "int8"}, **tables))
    for cast in ("fp32", "bf16"):
        parse_config(tiny_table(engine={"compressor": cast}, **tables))


@pytest.mark.parametrize(
    "wire", ["zip9", {"name": "int8", "block": 1}, {"name": "os:system"}, {}, "", {"name": ["x"]}]
)
def test_a_real_client_refuses_a_server_that_names_what_it_does_not_know(
    tiny_table: Table, wire: Any
) -> None:
    task = json.loads(parse_config(tiny_table()).task().model_dump_json()) | {"wire": wire}
    with pytest.raises(MismatchError, match="in a way that this client does not know") as told:
        task_of(json.dumps(task))
    assert word_of(told.value) == "task" and "same version" in told.value.fix
    with pytest.raises(MismatchError, match="cannot be read"):
        task_of(json.dumps(task | {"wire": 8}))
