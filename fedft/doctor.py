"""Can this machine do what fedft needs? Looked at before a user finds out the hard way."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedft.core.extras import EXTRAS, installed

_REQUIRED = ("torch", "transformers", "peft", "flwr", "safetensors", "pydantic")
_ROOM_MIB = 1024


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        ok: whether a run can do with it as it is.
        detail: what was found, and where it is not ok, what to do.
    """

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Look at Python, packages, processor, accelerator, memory, disk and Ray's shared memory."""
    looks: tuple[Callable[[], Finding], ...] = (
        _python,
        _packages,
        _extras,
        _processor,
        _accelerator,
        _disk,
        _shared_memory,
        _hub,
    )
    return [look() for look in looks]


def _python() -> Finding:
    return Finding(
        "python", sys.version_info >= (3, 11), f"{platform.python_version()}, 3.11 or newer"
    )


def _packages() -> Finding:
    missing = [name for name in _REQUIRED if _version(name) is None]
    if missing:
        return Finding("packages", False, f"missing: {', '.join(missing)}; pip install fedft")
    return Finding("packages", True, ", ".join(f"{name} {_version(name)}" for name in _REQUIRED))


def _extras() -> Finding:
    missing = [name for name in EXTRAS if not installed(name)]
    there = ", ".join(name for name in EXTRAS if name not in missing) or "none"
    rest = f"; without {', '.join(missing)}: pip install 'fedft[NAME]'" if missing else ""
    return Finding("extras", True, there + rest)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Finding:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    return Finding(
        "processor", True, f"{os.cpu_count()} cores; {', '.join(fast) or 'no vector flags seen'}"
    )


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", True, torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Finding("accelerator", True, "Apple's GPU: fedft join --device mps")
    return Finding("accelerator", True, "none; runs on the processor")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free // 2**20
    return Finding("disk", free >= _ROOM_MIB, f"{free} MiB free here; {_ROOM_MIB} wanted")


def _shared_memory() -> Finding:
    where = Path("/dev/shm")
    if not where.exists():
        return Finding("shared memory", True, "no /dev/shm; Ray uses the disk")
    free = shutil.disk_usage(where).free // 2**20
    return Finding("shared memory", free >= 64, f"{free} MiB free in /dev/shm; 64 wanted")


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    state = "offline: models come from folders, wheels or the cache" if offline else "online"
    return Finding("model hub", True, state)


def as_text(findings: list[Finding]) -> str:
    """One line a finding."""
    return "\n".join(f"{'ok ' if f.ok else 'NO '} {f.what:<14} {f.detail}" for f in findings)
