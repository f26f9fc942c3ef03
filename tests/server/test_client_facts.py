"""What clients say about themselves, in every combination, over real gRPC: nobody ends the server.

Each run has a client without a word, one with a rank of its own, one with a memory budget, and one
with both, under every rule of real clients, every selection of blocks, and HydraLoRA.
"""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

import fedft.server.serve
from fedft.clients.work import Failure
from fedft.core.errors import ConfigError
from fedft.core.link.framing import Ticket
from fedft.core.record.rundir import RunDir
from fedft.server import pruning
from fedft.server.config import RunConfig, check_real
from fedft.server.config_file import parse_config
from fedft.server.validation import PLAN_FAILED
from fedft.strategies import RULES, rule_names
from tests.server.stub_clients import Notes, Stub, answering, least_mib, run_with

pytestmark = pytest.mark.grpc

Table = Callable[..., dict[str, Any]]

SELECTIONS = ("none", "cka", "random", "stride", "first", "last", "importance")
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hydralora": {"method": "hydralora", "options": {"heads": 3}},
}
OWN_RANK = 2


def rules_of_real_clients() -> list[str]:
    """Rules that a server can run at all: not those of the simulated clock, or of a fixed roster."""
    names = zip(rule_names(), RULES, strict=True)
    return [name for name, rule in names if rule().buffer_size is None and name != "central-dp"]


@pytest.fixture(autouse=True)
def cheap_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedft.server.serve, "CLIENT_APP", answering)
    inline = fedft.server.serve.InlineGrid
    monkeypatch.setattr(
        fedft.server.serve, "InlineGrid", lambda app, nodes: inline(answering, nodes)
    )


def config_of(table: Table, rule: str, selection: str, adapter: str, **more: Any) -> RunConfig:
    """Raises ConfigError where the combination is none."""
    config = parse_config(
        table(
            strategy={"name": rule},
            lora=ADAPTERS[adapter],
            pruning={"selection": selection, **more},
            engine={"verify": False},  # what scores here, scores nothing
            fleet={"clients": 4},
            rounds={"count": 2, "per-round": 4, "quorum": 4, "retries": 0, "deadline-s": 20},
        )
    )
    check_real(config)
    return config


def four(config: RunConfig) -> dict[str, Stub]:
    """Neither, own rank, own budget, both."""
    rank = OWN_RANK if config.strategy.mixed_ranks else config.rank
    return {
        "neither": Stub(),
        "rank": Stub(rank=rank),
        "budget": Stub(memory_mib=least_mib(config, config.rank)),
        "both": Stub(rank=rank, memory_mib=least_mib(config, rank)),
    }


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run.path / "clients.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("rule", rules_of_real_clients())
def test_every_combination_of_facts_runs(
    tiny_table: Table, tmp_path: Path, rule: str, adapter: str
) -> None:
    ran = 0
    for selection in SELECTIONS:
        try:
            config = config_of(tiny_table, rule, selection, adapter)
        except ConfigError:
            continue  # no server starts with it either
        clients = four(config)
        run = run_with(config, tmp_path / selection, clients)
        assert [record["failures"] for record in run.rounds()] == [{}, {}], (selection, lines(run))
        counted = [(x["round"], x["site"]) for x in lines(run) if x["status"] == "ok"]
        assert sorted(counted) == sorted((r, name) for r in (1, 2) for name in clients)
        for record in run.rounds():
            held = record.get("pruning", {}).get("held", {})
            limited = {"budget", "both"} if selection != "none" else set()
            assert {n for n, blocks in held.items() if len(blocks) < 2} == limited
        ran += 1
    if not ran:
        pytest.skip("the rule does not take this adapter")


def test_the_table_is_about_something() -> None:
    assert len(rules_of_real_clients()) >= 20
    assert {"hetlora", "flexlora", "hydralora"} <= set(rules_of_real_clients())


@pytest.mark.parametrize("selection", ["cka", "random"])
def test_halves_of_blocks_too(tiny_table: Table, tmp_path: Path, selection: str) -> None:
    lora = {"target-modules": "all-linear"}
    table = lambda **changes: tiny_table(**{**changes, "lora": lora})  # noqa: E731
    config = config_of(table, "hetlora", selection, "plain", granularity="sublayer")
    run = run_with(config, tmp_path / "run", four(config))
    assert [record["failures"] for record in run.rounds()] == [{}, {}]


def test_a_client_that_cannot_be_planned_costs_itself_its_place(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the table: with ranks looked up where only the run's own stand, it is seen."""
    honest = pruning.site_footprint

    def only_known(config: RunConfig, shapes: Any, geometry: Any, rank: int, **options: Any) -> Any:
        return {config.rank: honest(config, shapes, geometry, rank, **options)}[rank]

    config = config_of(tiny_table, "hetlora", "random", "plain")
    clients = four(config)
    config = parse_config(
        {
            **config.model_dump(mode="json", by_alias=True, exclude_none=True),
            "rounds": {"count": 2, "per-round": 4, "quorum": 3, "deadline-s": 20},
        }
    )
    monkeypatch.setattr(pruning, "site_footprint", only_known)
    notes = Notes()
    run = run_with(config, tmp_path / "run", clients, trackers=[notes])
    assert [record["failures"] for record in run.rounds()] == [{"plan": ["both"]}] * 2
    assert all(set(record["cohort"]) == set(clients) for record in run.rounds())
    [first, second] = [line for line in lines(run) if line["site"] == "both"]
    assert first["code"] == second["code"] == PLAN_FAILED
    assert first["status"] == "plan" and "KeyError: 2" in first["reason"]


def spoiled(good: RecordDict, how: str) -> RecordDict:
    """A good answer with something wrong in it."""
    arrays, metrics = good.array_records["arrays"], dict(good.metric_records["metrics"])
    if how == "no metrics":
        return RecordDict({"arrays": arrays})
    change = {
        "nan": lambda x: x * np.nan,
        "shape": lambda x: x.T.copy(),
        "dtype": lambda x: x.astype(np.int64),
    }.get(how, lambda x: x)
    record = ArrayRecord({name: Array(change(array.numpy())) for name, array in arrays.items()})
    if how == "nothing":
        record = ArrayRecord({})
    if how == "examples":
        metrics["num-examples"] = -1
    if how == "inf":
        metrics["loss"] = float("inf")
    return RecordDict({"arrays": record, "metrics": MetricRecord(metrics)})


def bad(seed: int, over: threading.Event) -> Callable[[Ticket, RecordDict], Any]:
    """Answers as chance will have it."""
    rng = random.Random(seed)
    spoils = ("nan", "shape", "dtype", "nothing", "no metrics", "examples", "inf")

    def answer(ticket: Ticket, good: RecordDict) -> Any:
        match rng.choice(["good", "raise", "fail", "hang", "late", *spoils]):
            case "good":
                return None
            case "raise":
                raise ZeroDivisionError("[red] \x1b[31m")
            case "fail":
                return Failure(rng.choice([-5, 0, 110, 111, 2**31 - 1]), "x" * 5000)
            case "hang":
                over.wait(60)
                return None
            case "late":
                over.wait(3.5)
                return None
            case how:
                return spoiled(good, how)

    return answer


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_others_answer_two_good_clients_finish_the_run(
    tiny_table: Table, tmp_path: Path, seed: int
) -> None:
    """Nothing here was chosen: rule, selection, facts and answers are drawn."""
    rng, over = random.Random(seed), threading.Event()
    rule = rng.choice(["fedavg-lora", "hetlora", "flora", "flexlora", "krum", "fedsa-lora"])
    selection = rng.choice(["none", "cka", "random"])
    rounds = {"count": 4, "per-round": 6, "quorum": 2, "deadline-s": 3, "gather-s": 1}
    table = tiny_table(
        strategy={"name": rule},
        pruning={"selection": selection},
        fleet={"clients": 6},
        data={"holdout": rng.choice([0.0, 0.2])},
        rounds={**rounds, "evaluate-every": 2},
        engine={"verify": False},  # what scores here, scores nothing
    )
    config = parse_config(table)
    mixed = config.strategy.mixed_ranks
    clients = {
        f"site-{i}": Stub(
            rank=rng.choice([None, 1, 2, 3, 4]) if mixed else None,
            memory_mib=rng.choice([None, least_mib(config, 4)]),
            answer=(lambda ticket, good: None) if i < 2 else bad(10 * seed + i, over),
        )
        for i in range(6)
    }
    try:
        run = run_with(config, tmp_path / "run", clients, linger_s=1.0)
    finally:
        over.set()
    counted = {(x["round"], x["site"]) for x in lines(run) if x["status"] == "ok"}
    assert {(r, f"site-{i}") for r in range(1, 5) for i in range(2)} <= counted
    assert len(run.rounds()) == 4
