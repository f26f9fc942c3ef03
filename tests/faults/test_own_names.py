"""A user's own files may be called as parts of the program are: none is taken for one."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

Table = Callable[..., dict[str, Any]]

OURS = ("server", "clients", "strategies", "core", "report", "tests", "benchmarks", "examples")
"""Names that are or were parts of the program, or folders of its repository."""

NAMES = (*OURS, "fedft", "flwr", "torch", "peft")

BACKENDS = ["inline", "processes", pytest.param("ray", marks=pytest.mark.ray)]

FEDFT = str(Path(sys.executable).with_name("fedft"))


def own_files(folder: Path, names: tuple[str, ...] = NAMES, then: str = "") -> Path:
    """Modules and packages that say so when they are run; where they say it."""
    said = folder / "said"
    text = f"import os; open({str(said)!r}, 'a').write(f'{{os.getpid()}} {{__name__}}' + chr(10)); {then}"
    for name in names[::2]:
        (folder / f"{name}.py").write_text(text)
    for name in names[1::2]:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    return said


def harmful(folder: Path) -> Path:
    """Files of these names that end whoever imports them."""
    return own_files(folder, then="raise SystemExit('not this one')")


def start(folder: Path, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *command: str | Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(folder, *command, **environment)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, out, err


def small(tiny_table: Table, backend: str) -> dict[str, Any]:
    return tiny_table(
        rounds={"count": 1, "per-round": 2}, engine={"backend": backend, "workers": 1, "cohort": 1}
    )


@pytest.mark.crash
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_among_files_of_these_names_runs_none_of_them(
    backend: str, tiny_table: Table, tmp_path: Path
) -> None:
    said = harmful(tmp_path)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(small(tiny_table, backend)))
    code, _, err = run(tmp_path, FEDFT, "simulate", "config.toml", "--run-dir", "run", "--report")
    assert code == 0, err
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert not said.exists()


@pytest.mark.crash
def test_where_they_come_first_on_the_path_they_are_run(tmp_path: Path) -> None:
    """The control: these files would be found."""
    said = harmful(tmp_path)
    run(tmp_path, FEDFT, "doctor", PYTHONPATH=str(tmp_path))
    assert said.exists()


SCRIPT = """
import json, os, sys
import {modules}

if __name__ == "__main__":
    import fedft

    run = fedft.simulate("config.toml", run_dir="run")
    run.adapter("last").save_pretrained("adapter")
    own = [sys.modules[name].__file__ for name in {names!r}]
    print(json.dumps({{"pid": os.getpid(), "own": own, "ours": sys.modules["fedft.server"].__file__}}))
"""


@pytest.mark.crash
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_script_has_its_own_server_and_runs_ours(
    backend: str, tiny_table: Table, tmp_path: Path
) -> None:
    """Python puts the script's folder first on the path, and workers are told of it."""
    said = own_files(tmp_path, OURS)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(small(tiny_table, backend)))
    (tmp_path / "script.py").write_text(SCRIPT.format(modules=", ".join(OURS), names=OURS))
    code, out, err = run(tmp_path, sys.executable, "script.py")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert all(Path(path).is_relative_to(tmp_path) for path in told["own"])
    assert not Path(told["ours"]).is_relative_to(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    # Once each, by the script: not by the run, nor by its workers.
    assert sorted(said.read_text().split()[1::2]) == sorted(OURS)
    assert {*said.read_text().split()[::2]} == {str(told["pid"])}


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.grpc
def test_a_server_and_its_clients_start_among_files_of_these_names(
    tiny_table: Table, tiny_data: Path, tmp_path: Path
) -> None:
    said = harmful(tmp_path)
    table = tiny_table(rounds={"count": 1, "per-round": 2, "quorum": 2}, fleet={"clients": 2})
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    running = [start(tmp_path, FEDFT, "serve", "config.toml", "--run-dir", "run")]
    with ended(running):
        for name in ("ann", "bob"):
            code, out, err = run(tmp_path, FEDFT, *invitation(name))
            while code and running[0].poll() is None:  # the server is still making its identity
                code, out, err = run(tmp_path, FEDFT, *invitation(name))
            assert code == 0, out + err
            options = ("--data", tiny_data, "--threads", "1", "--site-dir", name)
            options += ("--model", table["model"]["source"], "--give-up", "60")
            running.append(start(tmp_path, FEDFT, "join", f"{name}.kit", *options))
        for process in running:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
    assert not said.exists()


def invitation(name: str) -> tuple[str, ...]:
    return ("invite", name, "--run-dir", "run", "-o", f"{name}.kit")
