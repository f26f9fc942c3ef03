"""Cleans up after a driver that was killed. Runs as a script of its own, on the stdlib alone.

Ray's servers end when their driver is killed, but two of its helper processes outlive it by a
minute, and its folder of logs stays for good. The driver starts this script with a pipe to its
standard input and writes process ids to it, one a line. When the pipe ends, however that came
about, the script kills those processes and removes the folder named on its command line.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

Birth = str | None
"""When a process was started, in the kernel's words; tells it from a later one with its number."""


def birth(pid: int) -> Birth:
    """The start time of a process; None where it is gone or the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name in brackets and may hold anything; field 22 is the start time.
    return stat.rpartition(")")[2].split()[19]


def children(pid: int) -> list[int]:
    """All descendants of a process, nearest first. Empty where there is no /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        parents.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for parent in generation for child in parents.get(parent, [])]
        found += generation
    return found


def reap(births: dict[int, Birth]) -> None:
    """Kills those of the processes that are still the ones they were."""
    for pid, born in births.items():
        if born is not None and birth(pid) == born:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def main() -> None:
    """Waits for the driver's end, then cleans up."""
    folder = Path(sys.argv[1])
    # A Ctrl-C goes to the whole process group, but the driver decides when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    births: dict[int, Birth] = {}
    for line in sys.stdin:
        births[int(line)] = birth(int(line))
    reap(births)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
