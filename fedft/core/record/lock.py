"""The lock of a run directory: one process writes there, any number read."""

import os
import weakref
from pathlib import Path

from fedft.core import system
from fedft.core.errors import EnvironmentFailure
from fedft.core.files import disk

NAME = ".lock"
"""Of the file in the folder; it holds the number of the process that writes."""


class Lock:
    """Held from its making to :meth:`release`, or until its process dies, however it dies.

    Args:
        folder: to be written in.

    Raises:
        EnvironmentFailure: the disk refused, or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = _taken(folder)
        _held.add(self)

    def __bool__(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Gives it back; once more does nothing."""
        if self._descriptor is not None:
            _held.discard(self)
            os.close(self._descriptor)
            self._descriptor = None


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _release_in_child() -> None:
    # A lock lives as long as any copy of its descriptor: a forked worker that outlives a killed
    # server would keep the run locked.
    for lock in list(_held):
        lock.release()


system.in_forked_children(_release_in_child)


def _taken(folder: Path) -> int:
    """A descriptor of the locked file."""
    path = folder / NAME
    with disk(f"lock {path}"):
        descriptor = system.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            system.lock(descriptor, wait=False)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise EnvironmentFailure(
                f"{folder} is being written by another process, pid {holder}",
                fix="Wait for it or stop it; two servers cannot share a run directory.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
