"""A Ray cluster of two nodes: the way past one machine gives the bytes of one machine."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fedft.api import Run
from fedft.server.config_file import parse_config
from fedft.server.grids.ray import RayGrid
from fedft.server.run import simulate
from fedft.server.setting import open_grid

pytestmark = pytest.mark.ray
Table = Callable[..., dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def node(*role: str) -> Iterator[None]:
    """A Ray node of one CPU; in the foreground, so that ending the command ends the node."""
    ray = Path(sys.executable).with_name("ray")
    common = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    process = subprocess.Popen(
        [str(ray), "start", *role, *common],
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "RAY_worker_niceness": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, which asks for a token."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in settings.items():
            patch.setenv(name, value)
        # Unix sockets have short paths; pytest's own temporary folders are too deep.
        folder = stack.enter_context(TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
        head = ["--head", f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}"]
        stack.enter_context(node(*head, "--node-ip-address=127.0.0.1", "--include-dashboard=false"))
        wait_for(address)
        stack.enter_context(node(f"--address={address}", "--node-ip-address=127.0.0.1"))
        yield address


def wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 90
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the head node did not start"
            time.sleep(0.2)


def test_two_nodes_give_the_bytes_of_one(tiny_table: Table, tmp_path: Path, two_nodes: str) -> None:
    """FedSA-LoRA keeps state at the sites, which must follow them from node to node."""
    table = tiny_table(strategy={"name": "fedsa-lora"}, data={"holdout": 0.2})
    here = Run(simulate(parse_config(table), tmp_path / "here").path)
    engine = {"backend": "ray", "workers": 2, "cohort": 1, "ray-address": two_nodes}
    config = parse_config(table | {"engine": engine})
    with open_grid(config) as grid:
        assert isinstance(grid, RayGrid)
        grid.ready()  # two workers of one CPU each, on nodes that have one each
        nodes = [n for n in grid._cluster.ray.nodes() if n["Alive"]]
        assert [n["Resources"]["CPU"] for n in nodes] == [1, 1]
        there = Run(simulate(config, tmp_path / "there", grid=grid).path)
    assert there.metrics["history_sha256"] == here.metrics["history_sha256"]
    assert [r.get("sites") for r in there.rounds] == [r.get("sites") for r in here.rounds]
