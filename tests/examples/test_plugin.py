"""The example package, installed beside fedft as a stranger's: from TOML, from Python, and checked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedft.api import Run

ROOT = Path(__file__).parents[2]
Table = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the package as pip installs it, without a network."""
    work = tmp_path_factory.mktemp("plugin")
    source = work / "source"  # building writes into it
    shutil.copytree(ROOT / "examples" / "plugin", source, ignore=shutil.ignore_patterns("build"))
    target = work / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=240)
    yield target


def run(site: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own that finds the package where it was installed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def fedft(site: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(site, folder, "-c", "from fedft.cli import main; main()", *arguments)


def config(table: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_everything_that_it_registers_keeps_the_laws(site: Path, tmp_path: Path) -> None:
    done = fedft(site, tmp_path, "check-plugin", "fedft-example-plugin", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert not [f for f in findings if f["outcome"] == "broken"]
    assert {f["name"] for f in findings} == registered()


def registered() -> set[str]:
    import tomllib

    project = tomllib.loads((ROOT / "examples/plugin/pyproject.toml").read_text())["project"]
    return {name for group in project["entry-points"].values() for name in group}


def test_a_run_from_toml_in_worker_processes(site: Path, tmp_path: Path, tiny_table: Table) -> None:
    shipped = ROOT / "examples" / "plugin" / "config.toml"
    import tomllib

    asked = tomllib.loads(shipped.read_text())
    parts = {part: asked[part] for part in ("strategy", "evaluation")}
    table = tiny_table(rounds={"count": 2}, **parts)
    for part in ("model", "training"):  # a stranger's task and method beside what tests need
        table[part] = {**table.get(part, {}), **asked[part]}
    path = config(
        {**table, "engine": {**table.get("engine", {}), "backend": "processes"}}, tmp_path
    )
    done = fedft(site, tmp_path, "simulate", path, "--run-dir", "run", "--workers", 1)
    assert done.returncode == 0, done.stderr
    recorded = Run(tmp_path / "run").metrics
    assert recorded["rounds"] == 2
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert Run(tmp_path / "run").rounds[-1]["meters"]["head_share"]["share"] is not None
    assert environment["plugins"].keys() == registered()
    assert environment["plugins"]["tempered"]["package"] == "fedft-example-plugin 0.1.0"
    # What is installed under a plain name needs no repetition.
    assert fedft(site, tmp_path, "resume", "run").returncode == 0
    # Without the package the name is told.
    missing = fedft(tmp_path / "nowhere", tmp_path, "resume", "run")
    assert missing.returncode == 2
    for kind in ("rule is called 'tempered'", "task is called 'smoothed-classification'"):
        assert f"no {kind}" in missing.stderr


def test_the_same_from_python(site: Path, tmp_path: Path, tiny_table: Table) -> None:
    path = config(tiny_table(rounds={"count": 1}), tmp_path)
    script = ROOT / "examples" / "plugin" / "run.py"
    done = run(site, tmp_path, script, path, "comparison")
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "comparison").iterdir() if p.is_dir())
    assert names == ["fedavg-lora-seed0", "tempered-seed0"]
    text = (tmp_path / "comparison" / "tempered-seed0" / "config.toml").read_text()
    assert 'name = "tempered"' in text and "power = 0.25" in text
    assert 'task = "smoothed-classification"' in text and 'kind = "sparse"' in text
