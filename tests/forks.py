"""A fresh interpreter of one thread that forks, for tests that kill processes.

pytest's own process is no place to fork from. Earlier tests have left gRPC, Ray and thread pools in
it, and only the thread that forks lives on in the child: a lock that another one holds at that
moment is held there for ever. So the host below is a process of its own, and before each fork it
looks whether it still has a single thread. What it has imported and cached its children inherit,
which makes them start in a moment; one host serves a whole session.

Functions travel by name: they must stand at the top of a module, and their arguments be pickled.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SINGLE = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""For the one library that starts a thread when it is imported: pyarrow's jemalloc."""

FAILED = 99
"""Exit status of a child whose function raised."""


class Forks:
    """The host, seen from a test."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._host = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                env={**os.environ, **SINGLE},
                start_new_session=True,  # so that it ends with all of its children
            )
        self._line = Connection(ours.detach())
        self._done: set[Callable[..., Any]] = set()

    def here(self, call: Callable[..., Any], *args: Any) -> Any:
        """What ``call`` returns in the host itself. What it imports or caches, children inherit."""
        return self._ask("here", call, *args)

    def warmed(self, call: Callable[..., Any], *args: Any) -> None:
        """Import what this needs, once, so that children who do the like start in a moment.

        It is done in a child, which tells what it imported: libraries start threads when they work.
        """
        if call not in self._done:
            self._ask("warmed", call, *args)
            self._done.add(call)

    def start(self, call: Callable[..., None], *args: Any) -> int:
        """Fork a child that does this and ends; its process id.

        Raises:
            RuntimeError: the host has more than one thread.
        """
        return self._ask("start", call, *args)

    def wait(self, child: int, kill_after_s: float | None = None) -> int:
        """How a child ended, as :func:`os.waitpid` says it; with SIGKILL after a while if asked."""
        return self._ask("wait", child, kill_after_s)

    def run(self, call: Callable[..., None], *args: Any) -> int:
        """Start, and wait until it has ended by itself."""
        return self.wait(self.start(call, *args))

    def _ask(self, *question: Any) -> Any:
        self._line.send(question)
        good, answer = self._line.recv()
        if not good:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the host, and what children it still has."""
        self._line.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._host.pid, signal.SIGKILL)
        self._host.wait()


def only_thread() -> None:
    """Make sure that a fork is safe now.

    Raises:
        RuntimeError: this process has another thread, of Python's or of a library's.
    """
    tasks = Path("/proc/self/task")
    if tasks.exists():
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
    else:
        names = [thread.name for thread in threading.enumerate()]
    if len(names) > 1:
        raise RuntimeError(f"a process that forks has one thread; this one: {sorted(names)}")


def _child(line: Connection, call: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Never returns into the host's code."""
    code = FAILED
    try:
        line.close()
        call(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _listed(names: Path, call: Callable[..., Any], *args: Any) -> None:
    call(*args)
    names.write_text("\n".join(sys.modules))


def _host(line: Connection) -> None:
    def start(call: Callable[..., None], *args: Any) -> int:
        only_thread()
        child = os.fork()
        if child == 0:
            _child(line, call, args)
        return child

    def wait(child: int, kill_after_s: float | None) -> int:
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the id is still its own
        return os.waitpid(child, 0)[1]

    def warmed(call: Callable[..., Any], *args: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            names = Path(folder, "names")
            if wait(start(_listed, names, call, *args), None):
                raise RuntimeError("what was to be imported for failed; see above")
            for name in names.read_text().splitlines():
                with contextlib.suppress(ImportError):  # the module of a library's own making
                    importlib.import_module(name)

    actions = {
        "start": start,
        "wait": wait,
        "warmed": warmed,
        "here": lambda call, *args: call(*args),
    }
    while True:
        try:
            action, *args = line.recv()
        except EOFError:
            return
        try:
            answer = True, actions[action](*args)
        except BaseException:
            answer = False, traceback.format_exc()
        line.send(answer)


if __name__ == "__main__":
    importlib.import_module("tests.conftest")  # one thread, no hub, as in the tests themselves
    _host(Connection(int(sys.argv[1])))
