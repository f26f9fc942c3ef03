"""Asynchronous aggregation: the schedule by hand, and the laws of runs (5, 6) on the clock."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.api import Run
from fedft.core.errors import ConfigError, Interrupted
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate

Table = Callable[..., dict[str, Any]]

SPEEDS = {"speeds": [1.0, 2.0, 10.0], "up-mbps": [1.0], "down-mbps": [4.0]}


def run_of(table: dict[str, Any], folder: Path, **options: Any) -> Run:
    return Run(simulate(parse_config(table), folder, **options).path)


def untimed(run: Run) -> list[dict[str, Any]]:
    """The rounds without what a stopwatch says."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.rounds]


def replies(run: Run) -> list[dict[str, Any]]:
    lines = (run.directory / "clients.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in kept]


RULES = {
    "fedasync": {"name": "fedasync"},
    "fedbuff": {"name": "fedbuff", "size": 2, "inner": {"name": "fedex-lora"}},
    "nested": {"name": "fedavgm", "beta": 0.5, "inner": {"name": "fedbuff", "size": 3}},
    "personal": {"name": "fedbuff", "size": 2, "inner": {"name": "fedsa-lora"}},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes(
    rule: dict[str, Any],
    tiny_table: Table,
    tmp_path: Path,
    stop_after: Callable[[int], Any],
) -> None:
    """Law 5: what sites are at lies in the state."""
    table = tiny_table(fleet=SPEEDS, rounds={"count": 7, "per-round": 4}, strategy=rule)
    whole = run_of(table, tmp_path / "whole")
    assert max(line["staleness"]["max"] for line in whole.rounds) >= 2
    for rounds in (1, 4):
        stop = stop_after(rounds)
        with pytest.raises(Interrupted):
            run_of(table, tmp_path / str(rounds), trackers=[stop], stop=stop)
        resumed = Run(resume(tmp_path / str(rounds)).path)
        assert resumed.metrics["history_sha256"] == whole.metrics["history_sha256"]
        assert resumed.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
        assert untimed(resumed) == untimed(whole)
        assert replies(resumed) == replies(whole)


def test_the_schedule_by_hand(tiny_table: Table, tmp_path: Path) -> None:
    """FedBuff's clock is the time of the K-th reply; every reply but one of those starts a job."""
    table = tiny_table(
        fleet=SPEEDS,
        rounds={"count": 5, "per-round": 3},
        training={"steps": 2},
        strategy={"name": "fedbuff", "size": 2},
    )
    run = run_of(table, tmp_path / "run")
    lines = [line for line in replies(run) if line["kind"] == "train"]
    assert [sum(line["round"] == r for line in lines) for r in range(1, 6)] == [2] * 5
    # An update ends when its last reply is there: that one was under way for at most all of the time.
    ends = {line["round"]: line["clock"]["elapsed"] for line in run.rounds}
    assert list(ends.values()) == sorted(ends.values())
    for line in lines:
        begun = ends[line["round"]] - line["device_seconds"]
        version = line["round"] - 1 - line["staleness"]
        # It began when its version was the newest.
        assert begun <= ends.get(version + 1, begun) + 1e-9
        assert begun + line["device_seconds"] <= ends[line["round"]] + 1e-9
    total = sum(line["device_seconds"] for line in lines)
    assert sum(line["clock"]["device_seconds"] for line in run.rounds) == pytest.approx(total)
    assert sum(line["clock"]["seconds"] for line in run.rounds) == pytest.approx(ends[5])


def test_sites_of_equal_speed_make_synchronous_rounds(tiny_table: Table, tmp_path: Path) -> None:
    """FedBuff with K = concurrency on equal devices: nothing is ever stale, and nobody idles."""
    equal = {"up-mbps": [1.0]}
    asynchronous = tiny_table(
        fleet=equal,
        rounds={"per-round": 4},
        training={"steps": 2},
        strategy={"name": "fedbuff", "size": 4},
    )
    run = run_of(asynchronous, tmp_path / "async")
    assert [line["staleness"] for line in run.rounds] == [{"mean": 0.0, "max": 0}] * 4
    up = 8e-6 * run.rounds[0]["bytes"]["up"] / 4
    assert [line["clock"]["seconds"] for line in run.rounds] == pytest.approx([up] * 4)


@pytest.mark.parametrize("backend", [{}, {"cohort": 4}])
def test_the_engine_trains_the_replies_of_an_update_together(
    backend: dict[str, Any], tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(fleet=SPEEDS, strategy={"name": "fedbuff", "size": 4}, engine=backend)
    run = run_of(table, tmp_path / "run")
    assert run.metrics["status"] == "finished"
    assert all(len(set(line["cohort"])) == 4 for line in run.rounds), "a client is once in a buffer"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fleet": {}}, "needs the simulated clock"),
        ({"strategy": {"name": "fedbuff", "size": 9}}, "waits for 9 replies of different clients"),
        ({"rounds": {"spares": 1}}, "spares and quorum are of rounds"),
        ({"rounds": {"quorum": 2}}, "spares and quorum are of rounds"),
        ({"pruning": {"selection": "stride"}}, "compares layers round by round"),
    ],
)
def test_what_an_asynchronous_run_cannot_be(
    changes: dict[str, Any], why: str, tiny_table: Table
) -> None:
    table = {"fleet": SPEEDS, "strategy": {"name": "fedbuff", "size": 4}, **changes}
    with pytest.raises(ConfigError, match=why):
        parse_config(tiny_table(**table))


@pytest.mark.parametrize("rule", [{"name": "fedasync"}, {"name": "fedbuff", "size": 2}])
def test_a_deadline_that_nobody_can_meet(
    rule: dict[str, Any], tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(fleet={"speeds": [0.01]}, rounds={"deadline-s": 2.0}, strategy=rule)
    with pytest.raises(ConfigError, match=r"deadline-s = 2, and the fastest of \d+ clients"):
        run_of(table, tmp_path / "run")


def test_jobs_that_outlive_their_window_are_lost(tiny_table: Table, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("profile,start_s,end_s\nday,0,40\nnight,30,100\n")
    table = tiny_table(
        fleet={"speeds": [1.0, 10.0], "availability": str(trace), "period-s": 100.0},
        rounds={"count": 8, "per-round": 3},
        strategy={"name": "fedbuff", "size": 2},
    )
    run = run_of(table, tmp_path / "run")
    lost = [line for line in replies(run) if line.get("status") == "left"]
    assert lost, "no job was ever lost: the windows are too long to show anything"
    assert run.metrics["status"] == "finished"
    assert untimed(run_of(table, tmp_path / "again")) == untimed(run)
