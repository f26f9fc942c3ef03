"""Rows 2, 9 and 10 for a whole run: its disk strikes at every system call of a round's commit."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forks import SINGLE

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("trap") / "disk.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, HERE / "disk.c", "-ldl"],
        check=True,
    )
    return library


@pytest.fixture
def struck(
    trap: Path, tiny_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def run(error: int, *how: str) -> dict[str, Any]:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(tiny_table(rounds={"count": 3, "evaluate-every": 1})))
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.disk", tmp_path, config, str(error), *how],
            env={**os.environ, **SINGLE, "LD_PRELOAD": str(trap)},
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        print(f"{found['calls']} system calls, {found['ended']} ended the process")
        return found

    return run


def test_a_run_that_is_killed_at_any_system_call_ends_with_the_same_bytes(
    struck: Callable[..., dict[str, Any]],
) -> None:
    found = struck(0)
    assert found["faults"] == []
    assert found["calls"] == found["ended"] > 40


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_system_call_pauses_the_run(
    struck: Callable[..., dict[str, Any]], code: int
) -> None:
    """Exit 3 with the path; nothing half-written stays; there is space again, and it goes on."""
    found = struck(code)
    assert found["faults"] == []
    assert found["ended"] > 40


def test_the_harness_notices_a_careless_commit(struck: Callable[..., dict[str, Any]]) -> None:
    """Positive control."""
    assert any("no checkpoint of any" in fault for fault in struck(0, "careless")["faults"])
