"""Law 6 and rows 3 and 4 of the fault catalogue: whole runs on Ray."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedft.api import Run
from fedft.core.errors import EnvironmentFailure
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate

pytestmark = pytest.mark.ray
Table = Callable[..., dict[str, Any]]


def run_on(table: dict[str, Any], folder: Path, **engine: Any) -> Run:
    table = table | {"engine": {**table["engine"], **engine}}
    return Run(simulate(parse_config(table), folder).path)


@pytest.mark.parametrize("cohort", [1, 4])
def test_the_same_bytes_inline_and_on_one_worker_or_two(
    tiny_table: Table, tmp_path: Path, cohort: int
) -> None:
    """With rules that keep state at the sites, too: FedSA-LoRA's B travels to no server."""
    table = tiny_table(
        strategy={"name": "fedsa-lora"}, engine={"cohort": cohort}, data={"holdout": 0.2}
    )
    inline = run_on(table, tmp_path / "inline", backend="inline")
    one = run_on(table, tmp_path / "one", backend="ray", workers=1)
    two = run_on(table, tmp_path / "two", backend="ray", workers=2)
    histories = {run.metrics["history_sha256"] for run in (inline, one, two)}
    assert len(histories) == 1
    scores = [[r.get("sites") for r in run.rounds] for run in (inline, one, two)]
    assert scores[0] == scores[1] == scores[2]


def killer(struck: list[int], victims: Callable[[], list[psutil.Process]], after: Path) -> None:
    """Kill once the run has committed a round."""
    while not (after / "rounds.jsonl").exists() or not (after / "rounds.jsonl").stat().st_size:
        time.sleep(0.02)
    for process in victims():
        os.kill(process.pid, signal.SIGKILL)
        struck.append(process.pid)


def named(*names: str) -> list[psutil.Process]:
    """Descendants of this process whose title starts with one of these."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if Path(process.cmdline()[0]).name.startswith(names):
                found.append(process)
    return found


def test_a_killed_worker_costs_nothing(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(rounds={"count": 30, "evaluate-every": 30})
    whole = run_on(table, tmp_path / "whole", backend="inline")
    struck: list[int] = []
    thread = threading.Thread(
        target=killer, args=(struck, lambda: named("ray::RayServer")[:1], tmp_path / "run")
    )
    thread.start()
    run = run_on(table, tmp_path / "run", backend="ray", workers=2)
    thread.join()
    assert struck
    assert run.metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]


def test_all_of_ray_killed_is_resumable(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(rounds={"count": 40, "evaluate-every": 40})
    whole = run_on(table, tmp_path / "whole", backend="inline")
    struck: list[int] = []
    thread = threading.Thread(
        target=killer,
        args=(struck, lambda: named("gcs_server", "raylet", "ray::"), tmp_path / "run"),
    )
    thread.start()
    with pytest.raises(EnvironmentFailure, match="fedft resume"):
        run_on(table, tmp_path / "run", backend="ray", workers=2)
    thread.join()
    assert struck
    left = [pid for pid in struck if psutil.pid_exists(pid)]
    assert not [p for p in left if psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    resume(tmp_path / "run")
    assert Run(tmp_path / "run").metrics["adapter_sha256"] == whole.metrics["adapter_sha256"]
