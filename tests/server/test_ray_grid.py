"""The Ray grid: workers, broadcast, deaths, tokens. One Ray session serves most tests here."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedft.core.errors import ConfigError, EnvironmentFailure, SecurityRefusal
from server.grids import cluster as clusters
from server.grids import reaper, workers
from server.grids.cluster import Cluster
from server.grids.flower import APP_CRASHED, APP_RAISED
from server.grids.ray import RayGrid

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(120),
    # Ray leaves its handles of /dev/null and of its servers to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file <_io.*/dev/null:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

# Does what the message says, and reports where it ran.
TOY = """
    import os, signal, sys, time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict

    LOADED = time.time()

    def app(message, context):
        do = message.content.config_records["do"] if "do" in message.content else {}
        Path(do["log"]).open("a").write(f"{os.getpid()}\\n") if "log" in do else None
        if do.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if do.get("die-once") and not Path(do["die-once"]).exists():
            Path(do["die-once"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if do.get("raise"):
            raise ArithmeticError("as told")
        time.sleep(do.get("sleep", 0.0))
        calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
        if do.get("remember"):
            context.state["calls"] = ConfigRecord({"n": calls})
        about = ConfigRecord({
            "pid": os.getpid(), "loaded": LOADED, "calls": calls, "threads": os.environ["OMP_NUM_THREADS"],
            "offline": os.environ.get("HF_HUB_OFFLINE", ""), "nice": os.nice(0),
            "sum": float(sum(a.sum() for a in message.content["arrays"].to_numpy_ndarrays()))
            if "arrays" in message.content else 0.0,
        })
        return Message(RecordDict({"about": about}), reply_to=message)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_ray_app.py").write_text(textwrap.dedent(TOY))
    sys.path.insert(0, str(folder))
    yield "toy_ray_app:app"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def session() -> Iterator[Cluster]:
    cluster = clusters.start(2, gpus=False)
    yield cluster
    cluster.close()


@pytest.fixture
def grid(toy: str, session: Cluster) -> Iterator[RayGrid]:
    with RayGrid(toy, 100, {"lr": 0.1}, workers=2) as grid:
        yield grid


def request(node: int, arrays: ArrayRecord | None = None, **do: Any) -> Message:
    content = RecordDict({"do": ConfigRecord(do)})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, node, "train", group_id="1")


def about(reply: Message) -> dict[str, Any]:
    return dict(reply.content.config_records["about"])


def receive(grid: RayGrid, ids: list[str], timeout: float = 30.0) -> list[Message]:
    replies: list[Message] = []
    deadline = time.monotonic() + timeout
    while len(replies) < len(ids) and grid.wait(ids, deadline - time.monotonic()):
        replies += grid.pull_messages(ids)
    return replies


def count_puts(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    puts: list[Any] = []
    put: Callable[[Any], Any] = cluster.ray.put
    monkeypatch.setattr(cluster.ray, "put", lambda value: puts.append(value) or put(value))
    return puts


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all of these processes end within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(reaper.birth(pid) is None for pid in pids):
            return True
        time.sleep(0.1)
    return False


# --- serving ---


def test_a_worker_gets_the_sites_that_it_knows(grid: RayGrid) -> None:
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


def test_workers_stay_and_load_the_app_once(grid: RayGrid) -> None:
    replies = grid.send_and_receive([request(n, sleep=0.01) for n in range(1, 21)])
    assert [r.metadata.src_node_id for r in replies] == list(range(1, 21))
    loaded = {about(r)["pid"]: about(r)["loaded"] for r in replies}
    assert len(loaded) == 2
    assert all(about(r)["loaded"] == loaded[about(r)["pid"]] for r in replies)
    assert os.getpid() not in loaded


def test_workers_have_one_thread_no_hub_and_the_drivers_niceness(grid: RayGrid) -> None:
    (reply,) = grid.send_and_receive([request(1)])
    found = about(reply)
    assert (found["threads"], found["offline"], found["nice"]) == ("1", "1", os.nice(0))


def test_pull_does_not_block_and_gives_each_reply_once(grid: RayGrid) -> None:
    grid.ready()
    ids = grid.push_messages([request(1, sleep=0.5)])
    started = time.monotonic()
    assert grid.pull_messages(ids) == []
    assert time.monotonic() - started < 0.3
    assert len(receive(grid, ids)) == 1
    assert grid.pull_messages(ids) == []
    assert not grid.wait(ids)


def test_replies_come_in_order_of_completion(grid: RayGrid) -> None:
    grid.ready()
    ids = grid.push_messages([request(1, sleep=0.6), request(2), request(3)])
    assert [r.metadata.src_node_id for r in receive(grid, ids)] == [2, 3, 1]


def test_a_state_lives_from_message_to_message_and_messages_to_a_node_wait_in_line(
    grid: RayGrid,
) -> None:
    replies = grid.send_and_receive([request(9, remember=True, sleep=0.02) for _ in range(6)])
    assert [about(r)["calls"] for r in replies] == [1, 2, 3, 4, 5, 6]
    assert list(grid.states) == [9]
    grid.states_committed([9])
    grid.send_and_receive([request(9)])  # reads its state only
    assert grid.touched_states() == {}


def test_a_client_that_raises_gives_an_error_reply(grid: RayGrid) -> None:
    replies = grid.send_and_receive([request(1), request(2, **{"raise": True})])
    assert replies[0].has_content()
    assert replies[1].error.code == APP_RAISED
    assert "ArithmeticError: as told" in str(replies[1].error.reason)


def test_no_more_jobs_are_in_flight_than_workers(grid: RayGrid) -> None:
    grid.ready()
    ids = grid.push_messages([request(n) for n in range(1, 51)])
    assert len(grid._queue) == 48
    assert len(receive(grid, ids)) == 50


# --- broadcast ---


def test_shared_arrays_are_stored_once_a_push(
    grid: RayGrid, session: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts = count_puts(session, monkeypatch)
    shared = ArrayRecord([np.ones(50_000, np.float32)])
    replies = grid.send_and_receive([request(n, shared) for n in range(1, 21)])
    assert [about(r)["sum"] for r in replies] == [50_000.0] * 20
    assert [record is shared for record in puts] == [True]
    grid.send_and_receive([request(n, shared) for n in (1, 2)])
    assert len(puts) == 2


def test_arrays_of_one_message_and_small_ones_are_not_stored(
    grid: RayGrid, session: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts = count_puts(session, monkeypatch)
    own = [ArrayRecord([np.full(50_000, n, np.float32)]) for n in (1, 2)]
    small = ArrayRecord([np.ones(10, np.float32)])
    messages = [request(1, own[0]), request(2, own[1]), request(3, small), request(4, small)]
    sums = [about(r)["sum"] for r in grid.send_and_receive(messages)]
    assert sums == [50_000.0, 100_000.0, 10.0, 10.0]
    assert puts == []


# --- deaths and deadlines ---


def test_a_job_whose_worker_is_killed_is_tried_once_more(grid: RayGrid, tmp_path: Path) -> None:
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
    grid: RayGrid, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    ids = grid.push_jobs([[request(1, log=log, die=True), request(2)], [request(3)], [request(4)]])
    replies = {r.metadata.src_node_id: r for r in receive(grid, ids, 60)}
    assert {n: r.has_error() for n, r in replies.items()} == {1: True, 2: True, 3: False, 4: False}
    assert replies[1].error.code == APP_CRASHED
    assert len(Path(log).read_text().split()) == 2
    assert grid.send_and_receive([request(1)])[0].has_content()


def test_a_cancelled_message_is_not_answered_and_leaves_no_state(grid: RayGrid) -> None:
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
    toy: str, session: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_STUCK_S", 0.2)
    with RayGrid(toy, 9, workers=1) as grid:
        grid.ready()
        assert grid.send_and_receive([request(1, sleep=600.0)], timeout=0.3) == []
        assert grid.send_and_receive([request(2)], timeout=60)[0].has_content()


def test_an_app_that_cannot_be_loaded_is_a_config_error(session: Cluster) -> None:
    with (
        RayGrid("no_such_module:app", 9, workers=1) as grid,
        pytest.raises(ConfigError, match="'no_such_module:app' cannot be loaded"),
    ):
        grid.send_and_receive([request(1)], timeout=60)


def test_workers_that_no_node_has_room_for_are_refused(toy: str, session: Cluster) -> None:
    with pytest.raises(EnvironmentFailure, match="no Ray node has room"):
        RayGrid(toy, 9, workers=1, threads=64)


# --- the session ---


def test_a_session_is_private_and_leaves_the_process_as_it_was(session: Cluster) -> None:
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert session._session is not None
    token = session._session.folder / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert session._session.folder.stat().st_mode & 0o777 == 0o700
    assert len(token.read_text()) >= 32


STUMBLE = """
    import sys
    import ray
    from server.grids import cluster
    init, calls = ray.init, []
    def stumbling(**settings):
        calls.append(settings["_temp_dir"])
        init(**settings)
        if len(calls) <= int(sys.argv[1]):
            raise RuntimeError("the raylet timed out")
    ray.init = stumbling
    try:
        started = cluster.start(1, gpus=False)
        print(len(set(calls)), started.room(1, 0))
        started.close()
    except cluster.EnvironmentFailure as error:
        print(len(set(calls)), str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    ("failures", "said"), [(1, "2 1"), (3, "3 Ray did not start: RuntimeError: the raylet timed")]
)
def test_a_start_that_fails_is_tried_again_from_nothing(failures: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUMBLE), str(failures)],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        stdout=subprocess.PIPE,
        text=True,
        timeout=200,
    )
    assert done.stdout.startswith(said)


JOIN = """
    import sys
    from server.grids.ray import RayGrid
    from fedft.core.errors import FedftError
    try:
        with RayGrid("toy_ray_app:app", 3, workers=1, address=sys.argv[1]) as grid:
            from flwr.app import Message, RecordDict
            print(grid.send_and_receive([Message(RecordDict(), 1, "train")])[0].has_content())
    except FedftError as error:
        print(type(error).__name__, error)
"""


def test_a_cluster_is_joined_with_its_token_and_closed_to_others(
    session: Cluster, toy: str
) -> None:
    address = session.ray.get_runtime_context().gcs_address
    assert session._session is not None
    right = (session._session.folder / "token").read_text()
    paths = os.pathsep.join([str(Path.cwd()), *(p for p in sys.path if "toy" in p)])
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}

    def join(**settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(JOIN), address]
        env = clean | {"PYTHONPATH": paths, "HOME": "/nonexistent"} | settings
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    attempts = [
        join(RAY_AUTH_TOKEN=right),
        join(RAY_AUTH_TOKEN="x" * 43),
        join(RAY_AUTH_MODE="disabled"),
        join(),
    ]
    outputs = [attempt.communicate(timeout=90)[0] for attempt in attempts]
    assert outputs[0] == "True\n"
    for refused in outputs[1:]:
        assert refused.startswith(SecurityRefusal.__name__)
        assert "RAY_AUTH_TOKEN_PATH" in refused


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="nothing listens"):
        clusters.join("127.0.0.1:9")
    assert time.monotonic() - started < 5


# What a driver of its own goes through; the session above would survive neither.
DRIVER = """
    import os, sys, time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict
    from fedft.core.errors import EnvironmentFailure
    from server.grids import reaper
    from server.grids.ray import RayGrid

    if __name__ == "__main__":
        grid = RayGrid("toy_ray_app:app", 9, workers=1)
        grid.ready()
        pids = reaper.children(os.getpid())
        print(grid._cluster._session.folder, *pids, flush=True)
        do = ConfigRecord({"sleep": 600.0})
        ids = grid.push_messages([Message(RecordDict({"do": do}), 1, "train")])
        try:
            grid.wait(ids)
        except EnvironmentFailure as error:
            print(type(error).__name__, time.time(), flush=True)
        grid.close()
        print("closed", time.time(), flush=True)
"""


@pytest.fixture
def driver(toy: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    paths = os.pathsep.join([str(Path.cwd()), *(p for p in sys.path if "toy" in p)])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def started(driver: subprocess.Popen[str]) -> tuple[Path, list[int]]:
    assert driver.stdout is not None
    folder, *pids = driver.stdout.readline().split()
    return Path(folder), [int(pid) for pid in pids]


@pytest.mark.parametrize("victims", ["all", "servers"])
def test_if_ray_is_killed_the_driver_is_told_within_seconds(
    driver: subprocess.Popen[str], victims: str
) -> None:
    folder, pids = started(driver)
    time.sleep(0.5)
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    keep = [pid for pid, name in names.items() if b"reaper.py" in name]
    servers = [p for p, name in names.items() if b"gcs_server" in name or b"raylet/raylet" in name]
    assert len(servers) == 2
    assert len(keep) == 1
    killed = time.time()
    for pid in servers if victims == "servers" else set(pids) - set(keep):
        os.kill(pid, signal.SIGKILL)
    output, _ = driver.communicate(timeout=60)
    words = output.split()
    assert words[0] == EnvironmentFailure.__name__
    assert float(words[1]) - killed < 6
    assert float(words[3]) - killed < 15
    assert driver.returncode == 0
    assert gone(pids, 5)
    assert not folder.exists()


def test_nothing_outlives_a_driver_that_is_killed(driver: subprocess.Popen[str]) -> None:
    folder, pids = started(driver)
    assert len(pids) >= 5
    driver.kill()
    driver.wait()
    assert gone(pids, 10)
    assert not folder.exists()
