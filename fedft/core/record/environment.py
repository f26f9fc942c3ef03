"""What a run ran on: versions, platform, processor, source revision, command line."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedft.core.record.jsonl import Record

SCHEMA = 1
"""Version of the run directory's layout. A newer one is refused."""

_PACKAGES = (
    *("fedft", "torch", "transformers", "peft", "safetensors", "flwr", "ray"),
    *("datasets", "flwr-datasets", "numpy"),
)
_BIT_EXACT = ("torch", "transformers", "peft", "numpy")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def surroundings() -> Record:
    """What the program runs on: versions, platform, processor, source revision, command line.

    Versions come from package metadata; nothing is imported.
    """
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"count": os.cpu_count(), "machine": platform.machine(), "flags": _cpu_flags()},
        "versions": {name: version(name) for name in _PACKAGES},
        "git": git_state(),
    }


def changed_versions(then: Mapping[str, str | None]) -> dict[str, tuple[str | None, str | None]]:
    """Libraries that decide about bits, by (version then, version now), where they differ."""
    pairs = {name: (then.get(name), version(name)) for name in _BIT_EXACT}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    """The processor's features that decide about speed and rounding; empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return [flag for flag in _CPU_FLAGS if line and flag in line[1].split()]


def git_state() -> Record | None:
    """Commit of the repository that this source file is tracked in, and whether it was edited."""
    source = Path(__file__)
    tracked = _git(source.parent, "ls-files", "--error-unmatch", source.name)
    commit = _git(source.parent, "rev-parse", "HEAD")
    status = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    if not tracked or commit is None or status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
