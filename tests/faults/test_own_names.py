"""A user's own files may be called as parts of the program are: none is taken for one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

NAMES = ("server", "clients", "strategies", "fedft", "flwr", "torch", "peft")


def own_files(folder: Path) -> Path:
    """Modules and packages that say so when they are run; where they say it."""
    said = folder / "said"
    text = f"open({str(said)!r}, 'a').write(__file__ + chr(10)); raise SystemExit('not this one')"
    for name in NAMES[::2]:
        (folder / f"{name}.py").write_text(text)
    for name in NAMES[1::2]:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    return said


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.crash
@pytest.mark.parametrize("backend", ["inline", "processes"])
def test_a_run_among_files_of_these_names_runs_none_of_them(
    backend: str, tiny_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    said = own_files(tmp_path)
    table = tiny_table(
        rounds={"count": 1, "per-round": 2}, engine={"backend": backend, "workers": 1, "cohort": 1}
    )
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    program = str(Path(sys.executable).with_name("fedft"))
    done = run(tmp_path, program, "simulate", "config.toml", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert not said.exists()


@pytest.mark.crash
def test_where_they_come_first_on_the_path_they_are_run(tmp_path: Path) -> None:
    """The control: these files would be found."""
    said = own_files(tmp_path)
    program = str(Path(sys.executable).with_name("fedft"))
    run(tmp_path, program, "doctor", PYTHONPATH=str(tmp_path))
    assert said.exists()
