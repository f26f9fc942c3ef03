"""What is Ray's own in the Ray grid: room, sessions, tokens, lost servers."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedft.core.errors import EnvironmentFailure, SecurityRefusal
from fedft.server.grids import cluster as clusters
from fedft.server.grids.cluster import Cluster
from fedft.server.grids.ray import RayGrid
from tests.server.toy_workers import driving, gone, importable

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(120),
    # Ray leaves its handles of /dev/null and of its servers to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file <_io.*/dev/null:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with importable(tmp_path_factory.mktemp("toy")) as reference:
        yield reference


@pytest.fixture(scope="module")
def session() -> Iterator[Cluster]:
    cluster = clusters.start(2, gpus=False)
    yield cluster
    cluster.close()


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
    from fedft.server.grids import cluster
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
    from fedft.server.grids.ray import RayGrid
    from fedft.core.errors import FedftError
    try:
        with RayGrid("toy_app:app", 3, workers=1, address=sys.argv[1]) as grid:
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
    from fedft.server.grids import ray_cleanup
    from fedft.server.grids.ray import RayGrid

    if __name__ == "__main__":
        grid = RayGrid("toy_app:app", 9, workers=1)
        grid.ready()
        pids = ray_cleanup.children(os.getpid())
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
    with driving(str(script)) as process:
        yield process


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
    keep = [pid for pid, name in names.items() if b"ray_cleanup.py" in name]
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
