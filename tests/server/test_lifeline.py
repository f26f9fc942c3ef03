"""A driver that is killed with -9 leaves no process behind, at whatever instant it is hit."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from fedft.server.grids import lifeline
from fedft.server.grids.cluster import own_paths

pytestmark = pytest.mark.crash

MARK = "FEDFT_TEST_MARK"

DRIVER = """
    import os, subprocess, sys
    from fedft.server.grids.processes import ProcessGrid

    if "untied" in sys.argv:
        honest = subprocess.Popen

        def untied(command, **options):
            code = "import sys; del sys.argv[1:3]; from fedft.server.grids import forkserver; forkserver.main()"
            return honest([command[0], "-P", "-c", code, *command[4:]], **options)

        subprocess.Popen = untied
    print("ready", flush=True)
    grid = ProcessGrid("toy_app:app", 9, workers=3, imports=["slow_to_import"])
    print("asked", flush=True)
    grid.ready()
    print("up", flush=True)
    sys.stdin.read()
"""


def marked(mark: str) -> list[int]:
    """Processes that live with a mark in the environment they were started with."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            state = (entry.parent / "stat").read_text().rpartition(")")[2].split()[0]
            if f"{MARK}={mark}".encode() in entry.read_bytes() and state != "Z":
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def left(mark: str, seconds: float) -> list[int]:
    """Those that are still there after so many seconds."""
    ends = time.monotonic() + seconds
    while (found := marked(mark)) and time.monotonic() < ends:
        time.sleep(0.05)
    return found


@contextmanager
def driven(
    folder: Path, import_s: float, *arguments: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A driver whose workers' imports take so many seconds; all of it is gone afterwards."""
    (folder / "slow_to_import.py").write_text(f"import time; time.sleep({import_s})\n")
    (folder / "toy_app.py").write_text("def app(message, context): raise ArithmeticError\n")
    mark = uuid4().hex
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), *arguments],
        env={
            **os.environ,
            MARK: mark,
            "PYTHONPATH": os.pathsep.join([str(folder), *own_paths()]),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield mark, driver
    finally:
        driver.kill()
        driver.communicate()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def until(driver: subprocess.Popen[str], word: str) -> None:
    assert driver.stdout is not None
    while (line := driver.stdout.readline().strip()) != word:
        assert line, "the driver ended"


def test_a_driver_killed_while_its_workers_start_leaves_none(tmp_path: Path) -> None:
    with driven(tmp_path, 60) as (mark, driver):
        until(driver, "asked")
        time.sleep(1)
        assert len(marked(mark)) == 2
        driver.kill()
        assert not left(mark, 10)


def test_without_the_lifeline_it_would_go_on_importing(tmp_path: Path) -> None:
    with driven(tmp_path, 60, "untied") as (mark, driver):
        until(driver, "asked")
        time.sleep(1)
        driver.kill()
        assert left(mark, 3)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_at_random_instants_of_a_start(kills: int, tmp_path: Path) -> None:
    drawn = random.Random(kills)
    for _ in range(kills):
        with driven(tmp_path, drawn.choice([0, 0.5, 20])) as (mark, driver):
            until(driver, "ready")
            time.sleep(drawn.expovariate(1 / 1.5))
            driver.kill()
            assert not left(mark, 10)


def test_a_pipe_whose_other_end_is_closed_is_noticed_at_once() -> None:
    end, other = os.pipe()
    try:
        assert not lifeline.gone(end)
        os.close(other)
        assert lifeline.gone(end)
    finally:
        os.close(end)
