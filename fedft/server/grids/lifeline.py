"""Starts the process that workers are forked from, and ties its life to the driver's first.

What workers need takes seconds to import, and whoever imports does not look at a socket. So before
anything heavy is imported, the kernel is told to end this process as soon as the driver is gone,
however that came about: the driver holds the other end of a pipe on which nothing is ever written.
Runs as a program of its own; up to then it stands on the standard library alone.
"""

import contextlib
import ctypes
import fcntl
import importlib
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1
_F_SETSIG = 10


def main() -> None:
    """``python -m fedft.server.grids.lifeline LIFELINE PROGRAM ARGUMENT…``: ``PROGRAM.main()``, tied."""
    end_with(int(sys.argv.pop(1)))
    importlib.import_module(sys.argv.pop(1)).main()


def end_with(pipe: int) -> None:
    """End this process when the other end of a pipe is closed, whatever it is doing (Linux).

    The kernel's signal for a parent's death would not do: it comes when the *thread* is gone that
    started this process. Nor would a thread of our own: whoever forks must have one only.
    """
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if gone(pipe):  # before the kernel was told
        os._exit(0)


def gone(pipe: int) -> bool:
    """Whether the other end of a pipe is closed."""
    looking = select.poll()
    looking.register(pipe, 0)  # of a hang-up it tells unasked
    return bool(looking.poll(0))


def end_with_parent(parent: int) -> None:
    """End this process with the one it was just forked from, where the kernel can (Linux).

    Args:
        parent: its process id; where it is gone already, so is this process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main()
