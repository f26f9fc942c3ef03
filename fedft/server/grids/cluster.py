"""The Ray processes behind a RayGrid: started for it, or joined by address.

A session of our own is private: its folder has mode 0700, a random token in a 0600 file guards
its ports (Ray binds them on all interfaces), nothing is reported anywhere, and it is gone when
the driver is, however the driver ends.

Ray is imported when the first cluster is made, not before: it takes half a second, and its core
reads the token settings from the environment of that moment.
"""

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedft.core.errors import EnvironmentFailure, SecurityRefusal
from fedft.core.extras import extra
from fedft.server.grids import ray_cleanup

_OBJECT_STORE_BYTES = 2**30
_LEAST_OBJECT_STORE_BYTES = 80 * 2**20  # Ray refuses less
_LONGEST_FOLDER = 38  # characters; Unix sockets lie 65 deeper, and their paths end at 107
_CONNECT_S = 2.0
_START_TRIES = 3

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Silences a warning about a change of default; workers without a GPU keep seeing them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray starts workers at niceness 15, where any other process on the machine starves them.
    "RAY_worker_niceness": "0",
}


class _NotStarted(EnvironmentFailure):
    """Ray is there, and its processes did not come up."""


class Cluster:
    """A connection to Ray.

    Use :func:`start`, :func:`join` or :func:`borrow` to get one.

    Attributes:
        ray: the module, imported.
        node_id: of the Ray node this process is on.
    """

    def __init__(self, ray: Any, session: "_Session | None", *, owned: bool) -> None:
        self.ray = ray
        self._session = session
        self._owned = owned
        self._dead = False
        context = ray.get_runtime_context()
        self.node_id: str = context.get_node_id()
        self._servers = [_host_and_port(context.gcs_address), self._raylet()]
        if session is not None:
            session.adopt_servers()

    def _raylet(self) -> tuple[str, int]:
        node = next(n for n in self.ray.nodes() if n["NodeID"] == self.node_id)
        return node["NodeManagerAddress"], node["NodeManagerPort"]

    def adopt(self, pid: int, node_id: str) -> None:
        """Makes sure that a worker's process does not outlive the session."""
        if self._session is not None and node_id == self.node_id:
            self._session.adopt(pid)

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers with these needs fit, each within one node."""
        total = 0
        for node in self.ray.nodes():
            has: Mapping[str, float] = node["Resources"] if node["Alive"] else {}
            fits = int(has.get("CPU", 0) / cpus)
            total += min(fits, int(has.get("GPU", 0) / gpus)) if gpus else fits
        return total

    def check(self) -> None:
        """Finds out whether Ray is still there.

        Ray itself would wait a minute for lost servers and then end this process.

        Raises:
            EnvironmentFailure: its servers cannot be reached.
        """
        if not self._dead and all(_reachable(*server) for server in self._servers):
            return
        self._dead = True
        raise EnvironmentFailure(
            "Ray's processes are gone: its servers do not answer any more",
            fix="Look for the out-of-memory killer in the system log, then resume the run.",
        )

    def close(self) -> None:
        """Disconnects, and ends what was started. May be called again."""
        session, self._session = self._session, None
        if self._dead and session is not None:
            session.reap()  # or Ray's own shutdown waits for processes that hang on lost servers
        if self._owned:
            self._owned = False
            self.ray.shutdown()
        if session is not None:
            session.close()


def start(cpus: int, *, gpus: bool) -> Cluster:
    """Starts a private Ray session on this machine.

    Ray's processes choose their ports and then open them, so that they may collide with each
    other or anybody else: what does not start is tried again, from nothing.

    Args:
        cpus: CPU slots to offer to workers.
        gpus: offer the GPUs of this machine too.

    Raises:
        EnvironmentFailure: Ray is not installed or does not start.
    """
    for _ in range(_START_TRIES - 1):
        with contextlib.suppress(_NotStarted):
            return _start(cpus, gpus=gpus)
    return _start(cpus, gpus=gpus)


def _start(cpus: int, *, gpus: bool) -> Cluster:
    session = _Session()
    # Workers must find what this process finds, also what a script put on its path.
    environment = {**session.auth, "PYTHONPATH": os.pathsep.join(own_paths())}
    try:
        ray = _connect(
            environment,
            address="local",
            num_cpus=cpus,
            num_gpus=None if gpus else 0,
            object_store_memory=_object_store_bytes(),
            # A folder of its own in ours, because Ray opens up the one it is given to everybody.
            _temp_dir=str(session.folder / "r"),
        )
        return Cluster(ray, session, owned=True)
    except BaseException:
        session.adopt_servers()
        session.reap()  # before Ray's own clearing up, which would wait for servers that hang
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()
        session.close()
        raise


def join(address: str) -> Cluster:
    """Connects to a Ray cluster that is already running.

    The token is taken from where Ray takes it: ``RAY_AUTH_TOKEN``, the file that
    ``RAY_AUTH_TOKEN_PATH`` names, or ``~/.ray/auth_token``. A cluster without tokens is joined
    only where ``RAY_AUTH_MODE=disabled`` says so. All nodes need this project and its
    dependencies installed; besides that nothing here assumes that they share anything.

    Args:
        address: ``host:port`` of its head, or ``"auto"`` for one on this machine.

    Raises:
        EnvironmentFailure: it cannot be reached.
        SecurityRefusal: it did not accept the token, or there is none.
    """
    if address != "auto":
        host, port = _host_and_port(address)
        if not _reachable(host, port):
            raise EnvironmentFailure(
                f"there is no Ray cluster at {address}: nothing listens there",
                fix="Start one with 'ray start --head', or check address and firewall.",
            )
    return Cluster(_connect({}, address=address), None, owned=True)


def borrow() -> Cluster | None:
    """The cluster this process is connected to already, if so. Closing leaves it alone."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return Cluster(ray, None, owned=False)


class _Session:
    """The folder, the token and the processes of a private Ray session."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(parent) + len("/fedft-ray-12345678") > _LONGEST_FOLDER:
            parent = "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="fedft-ray-", dir=parent))
        self.auth = self._auth()
        self._births: dict[int, ray_cleanup.Birth] = {}
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", ray_cleanup.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _auth(self) -> dict[str, str]:
        if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            return {}  # the user's own
        token = self.folder / "token"
        handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32))
        return {"RAY_AUTH_TOKEN_PATH": str(token)}

    def adopt_servers(self) -> None:
        """Takes in the processes that Ray started: those with our folder on their command line,
        and their children. This process may have other children, which are none of our business.
        """
        for pid in ray_cleanup.children(os.getpid()):
            with contextlib.suppress(OSError):
                if os.fsencode(self.folder) in Path(f"/proc/{pid}/cmdline").read_bytes():
                    self.adopt(pid, *ray_cleanup.children(pid))

    def adopt(self, *pids: int) -> None:
        """Takes processes into the session; they end with it at the latest."""
        assert self._reaper.stdin is not None
        for pid in pids:
            if pid == self._reaper.pid or pid in self._births:
                continue  # the reaper has the folder on its command line too
            self._births[pid] = ray_cleanup.birth(pid)
            self._reaper.stdin.write(f"{pid}\n")
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.flush()

    def reap(self) -> None:
        """Kills what is left of the session."""
        ray_cleanup.reap(self._births)

    def close(self) -> None:
        """Lets the reaper kill what is left and remove the folder, and waits for it."""
        assert self._reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.close()
        self._reaper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _connect(environment: Mapping[str, str], **settings: Any) -> Any:
    """``ray.init``, quietly and without its side effects on this process. Returns the module."""
    with _environment(_QUIET | {"RAY_AUTH_MODE": "token"}, environment), _own_signal_handler():
        with extra("simulation", "[engine] backend = 'ray' needs it; 'processes' does without"):
            import ray
            from ray.job_config import JobConfig

        class Here(JobConfig):
            """A job whose workers search where this process does, and not in its folder first.

            Ray puts the current folder before all else on their path: a file there that is called
            as a package (``types.py``, ``torch.py``) would be imported in its place.
            """

            def _runtime_env_has_working_dir(self) -> bool:
                return True  # Ray leaves the path alone then

        _read_auth_settings()
        try:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=Here(),
                **settings,
            )
        except Exception as error:
            raise _explained(error) from error
    return ray


def _explained(error: Exception) -> EnvironmentFailure | SecurityRefusal:
    text = str(error)
    # Something listens there, or the address would have been refused before; a wrong token looks
    # like a lost connection from here, a missing one has an error of its own.
    if isinstance(error, ConnectionError) or type(error).__name__ == "AuthenticationError":
        return SecurityRefusal(
            "the Ray cluster did not accept this process, most likely for its token: "
            f"{text.splitlines()[0]}",
            fix="Set RAY_AUTH_TOKEN_PATH to the cluster's token file, or RAY_AUTH_MODE=disabled "
            "for a cluster without tokens.",
        )
    return _NotStarted(
        f"Ray did not start: {type(error).__name__}: {text}",
        fix="Check free memory, /dev/shm and the temporary folder; or set engine.backend to "
        "'inline'.",
    )


def _read_auth_settings() -> None:
    """Makes Ray's core read the token settings again.

    It reads them once, when it is loaded; by then somebody else may have imported it, or an
    earlier session of this process may have used another token.
    """
    core: Any = importlib.import_module("ray._raylet")  # compiled; it has no types
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str], settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as Ray starts; its processes inherit them.

    Args:
        defaults: set where the user set nothing.
        settings: set in any case.
    """
    before = dict(os.environ)
    os.environ.update({k: v for k, v in defaults.items() if k not in before} | dict(settings))
    try:
        yield
    finally:
        for name in defaults.keys() | settings.keys():
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, which ``ray.init`` would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def own_paths() -> list[str]:
    """What is on this process's import path and not part of its Python installation."""
    installed = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)}
    paths = [str(Path(p).resolve()) for p in sys.path]  # '' is the working directory
    mine = [p for p in paths if not any(Path(p).is_relative_to(i) for i in installed)]
    return list(dict.fromkeys(mine))


def _object_store_bytes() -> int:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return _OBJECT_STORE_BYTES
    free = shutil.disk_usage(shm).free
    return max(_LEAST_OBJECT_STORE_BYTES, min(_OBJECT_STORE_BYTES, free * 8 // 10))


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise EnvironmentFailure(
            f"the Ray address {address!r} is not of the form host:port",
            fix="Use the address that 'ray start --head' printed, or \"auto\".",
        )
    return host.strip("[]"), int(port)


def _reachable(host: str, port: int) -> bool:
    """Whether something listens there. Two tries: a lost packet is no lost cluster."""
    for pause in (0.2, 0.0):
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError:
            time.sleep(pause)
        else:
            return True
    return False
