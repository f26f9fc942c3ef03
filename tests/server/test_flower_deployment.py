"""``flwr run .`` on a deployment: TLS, SuperNodes known by their keys, and the bytes of a simulation."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from benchmarks.superlink import NAME, deployment
from fedft.server.config_file import configured, parse_config
from fedft.server.run import simulate

Table = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by their environment"),
]


def test_two_supernodes_behind_a_superlink_give_the_bytes_of_a_simulation(
    tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(fleet={"clients": 2}, rounds={"count": 1, "per-round": 2})
    config = parse_config(table)
    ours = simulate(configured(config, {}), tmp_path / "ours").summary()
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tomllib.loads(config.to_toml())))
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "app", ignore=left_out)
    target = tmp_path / "flower"
    settings = f'config="{tmp_path}/config.toml" run-dir="{target}"'
    folder = tmp_path / "deployment"
    folder.mkdir()
    with deployment(folder, 2, strangers=1) as running:
        said = running.flwr(
            "run", ".", NAME, "--stream", "--run-config", settings, cwd=tmp_path / "app"
        )
        assert (target / "summary.json").is_file(), said + running.said()
        assert running.online() == 2  # the third, whose key nobody registered, was not let in
    assert not running.processes()
    theirs = json.loads((target / "summary.json").read_text())
    assert theirs["adapter_sha256"] == ours["adapter_sha256"]
    assert theirs["history_sha256"] == ours["history_sha256"]
