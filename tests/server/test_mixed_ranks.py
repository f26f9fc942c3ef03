"""Runs whose clients have ranks 4, 8 and 16: exact, resumable, and the same in both engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.api import Run
from fedft.clients.engines.cohort import CohortEngine
from fedft.core.adapters.scale import effective
from fedft.core.errors import Interrupted
from fedft.core.types import ServerState, TrainPlan
from fedft.server.checkpoints import Checkpoints
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.run import resume, simulate
from tests.forks import Forks
from tests.server.test_run import killed_runs, run_of, without_seconds

Table = Callable[..., dict[str, Any]]
RANKS = {"ranks": [4, 8, 16]}
EXACT: dict[str, Any] = {"strategy": {"name": "exact-mixed-rank"}, "fleet": RANKS, "seed": 1}
MODULES, D, HEAD = 4, 32, 3 * 32 + 3


def state_of(run: Run) -> ServerState:
    found = Checkpoints(run.directory / "checkpoints").load()
    assert found is not None
    return found.state


@pytest.mark.parametrize("cohort", [1, 4])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_run_of_mixed_ranks_loses_nothing(
    tiny_table: Table, tmp_path: Path, cohort: int, wire: str
) -> None:
    table = tiny_table(**EXACT, engine={"cohort": cohort, "wire": wire}, rounds={"count": 6})
    run = run_of(table, tmp_path / "run")
    assert {reply["rank"] for reply in _replies(run)} == {4, 8, 16}
    for line in run.rounds:
        assert line["failures"] == {}
        assert line["bias"]["relative"] < 1e-5
        assert abs(line["bias"]["forgotten"]) < 1e-5
        assert line["lag"]["function_jump"] < 1e-5  # all clients resume from the whole model
    assert run.metrics["final"]["accuracy"] > 0.4  # chance is a third


def test_what_a_rule_forgets_is_in_the_record(tiny_table: Table, tmp_path: Path) -> None:
    for name, forgets in (("flexlora", True), ("raflora", False), ("fedmomentum", False)):
        run = run_of(tiny_table(**EXACT | {"strategy": {"name": name}}), tmp_path / name)
        mixed = run.rounds[1:]  # before the first round there is nothing to forget
        assert run.rounds[0]["bias"]["forgotten"] == 0.0
        most = max(line["bias"]["forgotten"] for line in mixed)
        assert (most > 0.05) == forgets
        assert all("forgotten" in x for line in mixed for x in line["bias"]["layers"].values())
    keep = {"name": "flexlora", "beyond-rank": "server"}
    run = run_of(tiny_table(**EXACT | {"strategy": keep}), tmp_path / "keep")
    assert max(abs(line["bias"]["forgotten"]) for line in run.rounds) < 0.05


def test_both_engines_train_the_same_model(tiny_table: Table, tmp_path: Path) -> None:
    runs = [
        run_of(
            tiny_table(**EXACT, engine={"cohort": cohort}, rounds={"count": 2, "per-round": 8}),
            tmp_path / str(cohort),
        )
        for cohort in (1, 4)
    ]
    plain, stacked = (effective(s.adapter, s.delta) for s in map(state_of, runs))
    for module, f in plain.factors.items():
        x, y = f.product(), stacked.factors[module].product()
        assert float((x - y).norm() / x.norm()) < 1e-3
    for name, tensor in plain.head.items():
        assert torch.allclose(tensor, stacked.head[name], atol=1e-4)


def test_clients_of_one_rank_share_a_pass_and_others_do_not(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is frozen under one rank is not what is frozen under another."""
    seen: list[tuple[int, set[int]]] = []
    train = CohortEngine._train

    def watched(self: CohortEngine, plans: list[TrainPlan], batches: Any) -> Any:
        seen.append((plans[0].round, {plan.start.rank for plan in plans}))
        return train(self, plans, batches)

    monkeypatch.setattr(CohortEngine, "_train", watched)
    table = tiny_table(**EXACT, engine={"cohort": 8}, rounds={"count": 3, "per-round": 8})
    run_of(table, tmp_path / "run")
    assert {len(ranks) for round_, ranks in seen if round_ > 1} == {1}
    assert sorted(min(ranks) for round_, ranks in seen if round_ == 3) == [4, 8, 16]
    # In the first round nothing is frozen, and all go together.
    assert [ranks for round_, ranks in seen if round_ == 1] == [{4, 8, 16}]


def test_bytes_on_the_wire_are_the_formula(tiny_table: Table, tmp_path: Path) -> None:
    """pi(r_k) both ways; from the second round on the frozen part at rank min(d, D + R - r_k)."""
    table = tiny_table(**EXACT)
    config = parse_config(table)
    run = run_of(table, tmp_path / "run")
    first = forecast(config)
    assert {c["rank"]: c["bytes"]["down"] for c in first["clients"]} == {
        r: 4 * (MODULES * r * 2 * D + HEAD) for r in (4, 8, 16)
    }
    merged = 0
    ranks = {reply["site"]: reply["rank"] for reply in _replies(run)}
    for line in run.rounds:
        own = [ranks[name] for name in line["cohort"]]
        up = sum(4 * (MODULES * r * 2 * D + HEAD) for r in own)
        frozen = [min(D, merged + 16 - r) if line["round"] > 1 else 0 for r in own]
        assert line["bytes"]["up"] == up
        assert line["bytes"]["down"] == up + sum(4 * MODULES * q * 2 * D for q in frozen)
        merged = min(D, merged + max(min(D, sum(own) + 16 - min(own)) - 16, 0))


def test_a_stopped_run_of_mixed_ranks_ends_with_the_same_bytes(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    table = tiny_table(**EXACT, engine={"cohort": 4})
    whole = run_of(table, tmp_path / "whole")
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        simulate(parse_config(table), tmp_path / "cut", trackers=[stop], stop=stop)
    assert len(Run(tmp_path / "cut").rounds) == 2
    cut = Run(resume(tmp_path / "cut").path)
    assert cut.metrics["history_sha256"] == whole.metrics["history_sha256"]
    assert without_seconds(cut.rounds) == without_seconds(whole.rounds)


@pytest.mark.crash
def test_random_kills_of_a_run_of_mixed_ranks_lose_nothing(
    tiny_table: Table, tmp_path: Path, forks: Forks
) -> None:
    killed_runs(tiny_table(**EXACT, engine={"cohort": 4}), tmp_path, forks, kills=6)


def test_it_composes_with_layer_pruned_clients(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(
        **EXACT | {"fleet": {**RANKS, "memory-budgets-mib": [1.2, 1000.0]}},
        pruning={"selection": "stride"},
    )
    run = run_of(table, tmp_path / "run")
    assert all(line["bias"]["relative"] < 1e-5 for line in run.rounds)
    cut = [set(line["pruning"]["held"]) for line in run.rounds]
    assert any(0 < len(sites) < 4 for sites in cut), "some clients hold one block, others both"


def test_plan_says_which_rules_forget(tiny_table: Table) -> None:
    for name, forgets in (("flexlora", True), ("hetlora", True), ("exact-mixed-rank", False)):
        for ranks in (RANKS, {"ranks": [4, 4]}):
            config = parse_config(tiny_table(strategy={"name": name}, fleet=ranks))
            said = "forgets  " in as_text(config, forecast(config))
            assert said == (forgets and ranks == RANKS)


def _replies(run: Run) -> list[dict[str, Any]]:
    import json

    lines = (run.directory / "clients.jsonl").read_text(encoding="utf-8").splitlines()
    return [reply for reply in map(json.loads, lines) if reply["kind"] == "train"]
