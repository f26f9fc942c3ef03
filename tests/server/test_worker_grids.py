"""Grids with worker processes, on Ray and forked: serving, broadcast, deaths, deadlines."""

import os
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedft.api import Run
from fedft.core.errors import ConfigError, EnvironmentFailure
from fedft.server.config_file import parse_config
from fedft.server.grids import cluster as clusters
from fedft.server.grids import workers
from fedft.server.grids.flower import APP_CRASHED, APP_RAISED
from fedft.server.grids.processes import ProcessGrid
from fedft.server.grids.ray import RayGrid
from fedft.server.grids.workers import WorkerGrid
from fedft.server.run import simulate
from tests.server.toy_workers import about, driving, gone, importable, receive, request

pytestmark = [
    pytest.mark.timeout(120),
    # Ray leaves its handles of /dev/null and of its servers to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file <_io.*/dev/null:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

Grid = WorkerGrid[Any]
Make = Callable[..., Grid]


@pytest.fixture(scope="module", params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a grid of the kind in hand. One Ray session serves all tests."""
    if request.param == "processes":
        yield ProcessGrid
        return
    session = clusters.start(2, gpus=False)
    yield RayGrid
    session.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with importable(tmp_path_factory.mktemp("toy")) as reference:
        yield reference


@pytest.fixture
def grid(toy: str, make: Make) -> Iterator[Grid]:
    with make(toy, 100, {"lr": 0.1}, workers=2) as grid:
        yield grid


# --- serving ---


def test_a_worker_gets_the_sites_that_it_knows(grid: Grid) -> None:
    """What it keeps of them saves it work. Nobody stays idle for it."""
    grid.ready()

    def served(nodes: list[int]) -> dict[int, int]:
        replies = receive(grid, grid.push_messages(request(n, sleep=0.3) for n in nodes))
        return {r.metadata.src_node_id: about(r)["pid"] for r in replies}

    first = served([1, 2])
    assert len(set(first.values())) == 2
    assert served([2, 1]) == served([1, 2]) == first
    third = served([3])[3]
    known = [n for n, pid in first.items() if pid == third]
    assert len(set(served([3, *known]).values())) == 2


def test_workers_stay_and_load_the_app_once(grid: Grid) -> None:
    replies = grid.send_and_receive([request(n, sleep=0.01) for n in range(1, 21)])
    assert [r.metadata.src_node_id for r in replies] == list(range(1, 21))
    loaded = {about(r)["pid"]: about(r)["loaded"] for r in replies}
    assert len(loaded) == 2
    assert all(about(r)["loaded"] == loaded[about(r)["pid"]] for r in replies)
    assert os.getpid() not in loaded


def test_workers_have_one_thread_no_hub_and_the_drivers_niceness(grid: Grid) -> None:
    (reply,) = grid.send_and_receive([request(1)])
    found = about(reply)
    assert (found["threads"], found["offline"], found["nice"]) == ("1", "1", os.nice(0))


def test_pull_does_not_block_and_gives_each_reply_once(grid: Grid) -> None:
    grid.ready()
    ids = grid.push_messages([request(1, sleep=0.5)])
    started = time.monotonic()
    assert grid.pull_messages(ids) == []
    assert time.monotonic() - started < 0.3
    assert len(receive(grid, ids)) == 1
    assert grid.pull_messages(ids) == []
    assert not grid.wait(ids)


def test_replies_come_in_order_of_completion(grid: Grid) -> None:
    grid.ready()
    ids = grid.push_messages([request(1, sleep=0.6), request(2), request(3)])
    assert [r.metadata.src_node_id for r in receive(grid, ids)] == [2, 3, 1]


def test_a_state_lives_from_message_to_message_and_messages_to_a_node_wait_in_line(
    grid: Grid,
) -> None:
    replies = grid.send_and_receive([request(9, remember=True, sleep=0.02) for _ in range(6)])
    assert [about(r)["calls"] for r in replies] == [1, 2, 3, 4, 5, 6]
    assert list(grid.states) == [9]
    grid.states_committed([9])
    grid.send_and_receive([request(9)])  # reads its state only
    assert grid.touched_states() == {}


def test_a_state_counts_when_its_reply_is_pulled_and_the_node_goes_on_with_it(grid: Grid) -> None:
    _, second = grid.push_messages([request(9, remember=True) for _ in range(2)])
    assert [about(r)["calls"] for r in receive(grid, [second])] == [2]
    grid.states_committed([9])
    third, other = grid.push_messages([request(9, remember=True), request(8, sleep=0.3)])
    receive(grid, [other])
    assert grid.wait([third])
    assert grid.touched_states() == {}
    grid.cancel([third])
    (reply,) = grid.send_and_receive([request(9, remember=True)])
    assert about(reply)["calls"] == 3


def test_the_last_jobs_of_a_round_go_before_the_next_round(grid: Grid) -> None:
    """Also where a worker knows a site of the next round."""
    grid.ready()
    receive(grid, grid.push_messages([request(1, sleep=0.2), request(2, sleep=0.2)]))
    last = grid.push_messages([request(n, sleep=0.1) for n in (3, 4, 5, 6)])
    following = grid.push_messages([request(n, round_=2, sleep=0.3) for n in (1, 2)])
    order = [r.metadata.src_node_id for r in receive(grid, [*last, *following])]
    assert sorted(order[:4]) == [3, 4, 5, 6]


def test_a_client_that_raises_gives_an_error_reply(grid: Grid) -> None:
    replies = grid.send_and_receive([request(1), request(2, **{"raise": True})])
    assert replies[0].has_content()
    assert replies[1].error.code == APP_RAISED
    assert "ArithmeticError: as told" in str(replies[1].error.reason)


def test_no_more_jobs_are_in_flight_than_workers(grid: Grid) -> None:
    grid.ready()
    ids = grid.push_messages([request(n) for n in range(1, 51)])
    assert len(grid._queue) == 48
    assert len(receive(grid, ids)) == 50


# --- broadcast ---


def count_shared(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> list[ArrayRecord]:
    shared: list[ArrayRecord] = []
    share = grid._share
    monkeypatch.setattr(grid, "_share", lambda record: shared.append(record) or share(record))
    return shared


def test_shared_arrays_are_stored_once_a_push(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = count_shared(grid, monkeypatch)
    shared = ArrayRecord([np.ones(50_000, np.float32)])
    replies = grid.send_and_receive([request(n, shared) for n in range(1, 21)])
    assert [about(r)["sum"] for r in replies] == [50_000.0] * 20
    assert [record is shared for record in stored] == [True]
    other = ArrayRecord([np.full(50_000, 2, np.float32)])
    replies = grid.send_and_receive([request(n, other) for n in (1, 2)])
    assert [about(r)["sum"] for r in replies] == [100_000.0] * 2
    assert len(stored) == 2


def test_a_client_that_changes_what_it_was_sent_changes_nobody_elses(grid: Grid) -> None:
    shared = ArrayRecord([np.ones(50_000, np.float32)])
    jobs = [[request(n, shared, spoil=True) for n in (1, 2, 3)]]
    replies = receive(grid, grid.push_jobs(jobs))
    assert [about(r)["sum"] for r in replies] == [50_000.0] * 3


def test_arrays_of_one_message_and_small_ones_are_not_stored(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = count_shared(grid, monkeypatch)
    own = [ArrayRecord([np.full(50_000, n, np.float32)]) for n in (1, 2)]
    small = ArrayRecord([np.ones(10, np.float32)])
    messages = [request(1, own[0]), request(2, own[1]), request(3, small), request(4, small)]
    sums = [about(r)["sum"] for r in grid.send_and_receive(messages)]
    assert sums == [50_000.0, 100_000.0, 10.0, 10.0]
    assert stored == []


# --- deaths and deadlines ---


def test_a_job_whose_worker_is_killed_is_tried_once_more(grid: Grid, tmp_path: Path) -> None:
    log, once = str(tmp_path / "log"), str(tmp_path / "once")
    messages = [request(1, log=log, **{"die-once": once}), request(2)]
    replies = grid.send_and_receive(messages, timeout=60)
    assert [r.has_content() for r in replies] == [True, True]
    pids = Path(log).read_text().split()
    assert len(pids) == 2
    assert pids[0] != pids[1], "the job went to a new worker"
    assert grid.workers == 2
    grid.ready()


def test_a_job_that_kills_two_workers_gives_error_replies_and_the_others_go_on(
    grid: Grid, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    ids = grid.push_jobs([[request(1, log=log, die=True), request(2)], [request(3)], [request(4)]])
    replies = {r.metadata.src_node_id: r for r in receive(grid, ids, 60)}
    assert {n: r.has_error() for n, r in replies.items()} == {1: True, 2: True, 3: False, 4: False}
    assert replies[1].error.code == APP_CRASHED
    assert len(Path(log).read_text().split()) == 2
    assert grid.send_and_receive([request(1)])[0].has_content()


def test_a_cancelled_message_is_not_answered_and_leaves_no_state(grid: Grid) -> None:
    grid.ready()
    late = request(1, sleep=0.5, remember=True)
    replies = grid.send_and_receive([late, request(2)], timeout=0.3)
    assert [r.metadata.src_node_id for r in replies] == [2]
    (again,) = grid.send_and_receive([request(1, remember=True)])
    time.sleep(0.5)
    assert grid.pull_messages([late.metadata.message_id]) == []
    assert about(again)["calls"] == 1
    assert grid.states[1].config_records["calls"]["n"] == 1


def test_a_worker_stuck_in_an_abandoned_job_is_replaced(
    toy: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_STUCK_S", 0.2)
    with make(toy, 9, workers=1) as grid:
        grid.ready()
        assert grid.send_and_receive([request(1, sleep=600.0)], timeout=0.3) == []
        assert grid.send_and_receive([request(2)], timeout=60)[0].has_content()


def test_an_app_that_cannot_be_loaded_is_a_config_error(make: Make) -> None:
    with (
        make("no_such_module:app", 9, workers=1) as grid,
        pytest.raises(ConfigError, match="'no_such_module:app' cannot be loaded"),
    ):
        grid.send_and_receive([request(1)], timeout=60)


# --- processes of their own ---

DRIVER = """
    import os, sys
    from flwr.app import ConfigRecord, Message, RecordDict
    from fedft.server.grids.processes import ProcessGrid

    grid = ProcessGrid("toy_app:app", 9, workers=2)
    grid.ready()
    pids = [pid for worker in grid._workers for pid in worker.births]
    print(grid._forkserver.pid, *pids, flush=True)
    do = ConfigRecord({"sleep": 600.0})
    grid.wait(grid.push_messages([Message(RecordDict({"do": do}), 1, "train")]))
"""


@pytest.fixture
def driver(toy: str) -> Iterator[subprocess.Popen[str]]:
    """A script without a guard: no worker ever imports it."""
    with driving("-c", textwrap.dedent(DRIVER)) as process:
        yield process


def test_no_process_outlives_a_driver_that_is_killed(driver: subprocess.Popen[str]) -> None:
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 3
    assert not gone(pids, 0.2)
    driver.kill()
    assert gone(pids, 10)


def test_without_what_forks_them_there_are_no_workers(toy: str) -> None:
    with ProcessGrid(toy, 9, workers=1) as grid:
        grid.ready()
        pids = [pid for worker in grid._workers for pid in worker.births]
        ids = grid.push_messages([request(1, sleep=600.0)])
        grid._forkserver.kill()
        with pytest.raises(EnvironmentFailure, match="forked from is gone"):
            receive(grid, ids)
        assert gone(pids, 10)


def test_a_closed_grid_leaves_no_process(toy: str) -> None:
    grid = ProcessGrid(toy, 9, workers=2)
    grid.ready()
    pids = [grid._forkserver.pid, *(pid for worker in grid._workers for pid in worker.births)]
    assert len(pids) == 3
    grid.close()
    assert gone(pids, 10)


def test_folders_where_one_stands_are_not_taken_for_the_program(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with ProcessGrid(toy, 9, workers=1) as grid:
        assert grid.send_and_receive([request(1)], timeout=30)[0].has_content()


def test_what_workers_need_is_imported_once_for_all_of_them(tmp_path: Path) -> None:
    log = tmp_path / "imported-by"
    (tmp_path / "logged_app.py").write_text(
        f"import os\nopen({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "def app(message, context): raise ArithmeticError\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with ProcessGrid("logged_app:app", 9, workers=3, imports=["logged_app"]) as grid:
            grid.ready()
            assert log.read_text().split() == [str(grid._forkserver.pid)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_has_the_same_bytes_in_this_process_and_in_others(
    tiny_table: Callable[..., dict[str, Any]], tmp_path: Path, workers: int
) -> None:
    """With a rule that keeps state at the sites, too: FedSA-LoRA's B travels to no server."""
    hashes: set[str] = set()
    for engine in ({"backend": "inline"}, {"backend": "processes", "workers": workers}):
        table = tiny_table(
            strategy={"name": "fedsa-lora"}, engine={"cohort": 2, **engine}, data={"holdout": 0.2}
        )
        run = Run(simulate(parse_config(table), tmp_path / engine["backend"]).path)
        hashes.add(run.metrics["history_sha256"])
    assert len(hashes) == 1


def test_numbers_that_make_no_sense_are_refused(make: Make, toy: str) -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        make(toy, 9, workers=0)
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        make(toy, 9, threads=0)


def test_a_system_that_cannot_fork_is_told_so(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(EnvironmentFailure, match="cannot fork"):
        ProcessGrid(toy, 9)


def test_gpus_and_clusters_are_for_ray() -> None:
    with pytest.raises(ConfigError, match="knows no GPUs and no other machine"):
        parse_config({"engine": {"backend": "processes", "gpus-per-worker": 1}})
