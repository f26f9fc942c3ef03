"""The repository as a Flower app: the grid's laws on a stand-in, and one real ``flwr run``."""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedft.core.errors import ConfigError, EnvironmentFailure, MismatchError
from fedft.server.app import _check_version, configuration, main
from fedft.server.config_file import configured, parse_config
from fedft.server.grids.inline import Fault, Faults, InlineGrid
from fedft.server.grids.superlink import SuperLinkGrid
from fedft.server.run import simulate
from fedft.server.setting import CLIENT_APP

Table = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


class StandIn(Grid):
    """Flower's grid as its callers see it: random node ids, replies by polling, nothing to wait on.

    ``order`` are the partitions of the nodes; ``refuses`` is a partition that takes no message,
    told as Flower's own grids tell it (``None`` or nothing in the list of ids).
    """

    def __init__(self, order: list[int], *, faults: Faults | None = None) -> None:
        self._inner = InlineGrid(CLIENT_APP, max(order) + 1, faults=faults)
        ids = random.Random(0).sample(range(2**40, 2**60), len(order))
        self.partition = dict(zip(ids, order, strict=True))
        self.refuses: int | None = None
        self.taken: Any = None
        self.polled: list[set[str]] = []
        self.sent: Counter[str] = Counter()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partition)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        about = message.metadata
        partition = self.partition[about.dst_node_id]
        self.sent[about.message_type] += 1
        twin = Message(message.content, partition + 1, about.message_type, group_id=about.group_id)
        (id_,) = self._inner.push_messages([twin])
        about.__dict__["_message_id"] = id_
        if partition == self.refuses:
            self._inner.cancel([id_])
            return [] if self.taken is None else [self.taken]
        return [id_]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.polled.append(set(message_ids))
        return self._inner.pull_messages(self.polled[-1])

    def set_run(self, run: Any) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        return self._inner.run

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise AssertionError("deprecated in Flower")

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise AssertionError("cannot be interrupted")


def query(node: int, round_: int = 0) -> Message:
    return Message(RecordDict(), node, MessageType.QUERY, group_id=str(round_))


def test_the_server_scores_the_global_model_itself(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(tiny_table(engine={"cohort": 1}))
    plain = simulate(config, tmp_path / "plain").summary()
    (tmp_path / "config.toml").write_text(config.to_toml())
    flower, target = StandIn(list(range(8))), tmp_path / "flower"
    monkeypatch.setattr(flower.run, "fab_version", version("fedft"))
    settings = {"config": str(tmp_path / "config.toml"), "set": "", "run-dir": str(target)}
    main(flower, Context(flower.run.run_id, 0, {}, RecordDict(), settings))
    summary = json.loads((target / "summary.json").read_text())
    assert summary["adapter_sha256"] == plain["adapter_sha256"]
    assert summary["final"] == plain["final"] and summary["final"]
    # Each message costs Flower a process: none is spent on what the server holds itself.
    assert flower.sent.keys() == {MessageType.QUERY, MessageType.TRAIN}


@pytest.mark.parametrize("rule", ["fedavg-lora", "fedsa-lora"])  # without and with own parts
def test_a_run_on_flowers_grid_gives_the_same_bytes(
    rule: str, tiny_table: Table, tmp_path: Path
) -> None:
    config = parse_config(tiny_table(data={"holdout": 0.25}, strategy={"name": rule}))
    plain = simulate(config, tmp_path / "plain").summary()
    order = random.Random(1).sample(range(8), 8)
    flower = simulate(config, tmp_path / "flower", grid=SuperLinkGrid(StandIn(order), 8)).summary()
    assert flower["adapter_sha256"] == plain["adapter_sha256"]
    assert flower["history_sha256"] == plain["history_sha256"]
    assert flower["final"] == plain["final"]


def test_messages_reach_the_site_they_are_meant_for() -> None:
    grid = SuperLinkGrid(StandIn([2, 0, 1]), 3)
    ids = grid.push_jobs([[query(1), query(3)], [query(2)]])
    assert grid.wait(ids, 5.0)
    replies = {r.metadata.reply_to_message_id: r for _ in ids for r in grid.pull_messages(ids)}
    indices = [replies[id_].content.config_records["config"]["index"] for id_ in ids]
    assert indices == [0, 2, 1]
    assert grid.pull_messages(ids) == []  # each once


def test_nodes_that_are_no_site_are_left_alone() -> None:
    grid = SuperLinkGrid(StandIn([4, 1, 0]), 2)
    (id_,) = grid.push_jobs([[query(2, round_=7)]])
    assert grid.wait([id_], 5.0)
    (reply,) = grid.pull_messages([id_])
    assert reply.content.config_records["config"]["index"] == 1
    assert reply.metadata.group_id == "7"


@pytest.mark.parametrize("taken", [None, ""])
def test_a_message_that_flower_does_not_take_is_an_error_reply(taken: str | None) -> None:
    flower = StandIn([0, 1])
    grid = SuperLinkGrid(flower, 2)
    flower.refuses, flower.taken = 1, taken
    ids = grid.push_jobs([[query(1), query(2)]])
    replies: list[Message] = []
    while len(replies) < 2:
        assert grid.wait(ids, 5.0)
        replies += grid.pull_messages(ids)
    failed = {r.metadata.reply_to_message_id: r.has_error() for r in replies}
    assert [failed[id_] for id_ in ids] == [False, True]


def test_late_replies_are_taken_off_flowers_hands_and_dropped() -> None:
    late = Fault("delay", node=1, message_type=MessageType.QUERY, seconds=0.2, ordinal=1)
    flower = StandIn([0, 1], faults=Faults((late,)))
    grid = SuperLinkGrid(flower, 2)
    (slow,) = grid.push_jobs([[query(1)]])
    assert not grid.wait([slow], 0.01)
    grid.cancel([slow])
    time.sleep(0.3)
    (quick,) = grid.push_jobs([[query(2)]])
    assert grid.wait([quick], 5.0)
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([slow, quick])] == [quick]
    while slow in flower.polled[-1]:
        assert not grid.wait(["nothing"], 0.01)  # asks for what is late until it has come
        assert len(flower.polled) < 100


def test_a_federation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(EnvironmentFailure, match=r"1 SuperNodes .* clients = 2"):
        SuperLinkGrid(StandIn([0]), 2, registration_s=0.0)
    with pytest.raises(ConfigError, match="both have partition-id 1"):
        SuperLinkGrid(StandIn([1, 1]), 2)
    with pytest.raises(ConfigError, match="no SuperNode has partition-id 1"):
        SuperLinkGrid(StandIn([0, 2]), 2)
    raising = Faults((Fault("raise", node=1),))
    with pytest.raises(EnvironmentFailure, match="cannot say which client it is"):
        SuperLinkGrid(StandIn([0, 1], faults=raising), 2)
    silent = Faults((Fault("drop", node=1),))
    with pytest.raises(EnvironmentFailure, match="1 of 2 SuperNodes did not say"):
        SuperLinkGrid(StandIn([0, 1], faults=silent), 2, identity_s=0.05)


def test_the_run_config_of_the_repository_is_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    flower = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    settings = flower["config"]
    config = configuration(settings)
    assert config.fleet.clients == config.rounds.per_round == 2  # Flower's own default
    assert config.engine.cohort == 1
    changed = configuration(settings | {"set": "rounds.count=7 strategy.name=ffa-lora"})
    assert (changed.rounds.count, changed.strategy.name) == (7, "ffa-lora")
    with pytest.raises(ConfigError, match="rounds"):
        configuration(settings | {"set": "rounds.cuont=7"})


def test_a_bundle_of_another_version_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"fedft 0\.0\.0"):
        _check_version("0.0.0")


# --- the real thing ---


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def until(said: Callable[[], bool], seconds: float, what: str) -> None:
    closes = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < closes, what
        time.sleep(0.2)


def processes(home: Path) -> dict[int, str]:
    """Everything alive that was started with this FLWR_HOME: pid → command line."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # gone, or not ours
        if f"FLWR_HOME={home}".encode() in environment:
            found[int(entry.name)] = command
    return found


def of_runs(home: Path) -> list[str]:
    """The processes that are not the SuperLink's own."""
    return [c for c in processes(home).values() if "flower-super" not in c]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A local SuperLink as ``flwr run`` starts it, but waited for longer; the environment to use."""
    home, port = tmp_path / "home", free_port()
    ray = tempfile.mkdtemp(prefix="fd-")  # Unix sockets need a short path
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Or Flower installs the dependencies of the bundle into an environment of its own.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "RAY_TMPDIR": ray,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", port, "--database", str(tmp_path / "state.db")]
    command += ["--control-api-address", f"127.0.0.1:{environment['FLWR_LOCAL_CONTROL_API_PORT']}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **quiet) as superlink:
        try:
            until(lambda: healthy(port), 90, "the SuperLink does not come up")
            yield environment
        finally:
            superlink.terminate()
            try:
                superlink.wait(30)
                until(lambda: not processes(home), 30, f"left behind: {processes(home)}")
            finally:
                for pid in processes(home):
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(ray, ignore_errors=True)


def healthy(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by their environment")
@pytest.mark.timeout(300)
def test_flwr_run_gives_the_bytes_of_a_simulation(
    flower: dict[str, str], tiny_table: Table, tmp_path: Path
) -> None:
    config = parse_config(
        tiny_table(fleet={"clients": 4}, rounds={"count": 3, "per-round": 3}, seed=3)
    )
    ours = simulate(configured(config, {"rounds.count": 2}), tmp_path / "ours").summary()
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tomllib.loads(config.to_toml())))
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "app", ignore=left_out)

    home, target = Path(flower["FLWR_HOME"]), tmp_path / "flower"
    assert processes(home)  # the SuperLink: processes are found at all
    settings = f'config="{tmp_path}/config.toml" set="rounds.count=2" run-dir="{target}"'
    federation = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = ["flwr", "run", ".", "--stream", "--run-config", settings]
    ran = subprocess.run(
        [*command, "--federation-config", federation],
        cwd=tmp_path / "app",
        env=flower,
        timeout=240,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (target / "summary.json").is_file(), ran.stdout
    theirs = json.loads((target / "summary.json").read_text())
    assert theirs["status"] == "finished"
    assert theirs["rounds"] == 2
    assert theirs["adapter_sha256"] == ours["adapter_sha256"]
    assert theirs["history_sha256"] == ours["history_sha256"]
    assert theirs["bytes"] == ours["bytes"]
    until(lambda: not of_runs(home), 30, f"left behind: {of_runs(home)}")
