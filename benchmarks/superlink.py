"""A Flower deployment on loopback: a SuperLink with TLS, SuperNodes with keys of their own.

Used by the benchmark of a round's overhead and by the test of ``flwr run .`` on a deployment.
Everything that is started is ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedft.server.identity import Address, Authority

NAME = "loopback"
"""What ``flwr`` calls the SuperLink."""


@dataclass(frozen=True)
class Deployment:
    """A running SuperLink and its SuperNodes.

    Attributes:
        address: of the SuperLink.
        environment: for ``flwr`` and everything that it starts.
        logs: folder with one log a process.
    """

    address: str
    environment: Mapping[str, str]
    logs: Path

    def flwr(self, *arguments: str, cwd: Path, timeout: float = 1200.0) -> str:
        """What a ``flwr`` command printed.

        Raises:
            RuntimeError: it failed.
        """
        ran = subprocess.run(
            ["flwr", *arguments],
            cwd=cwd,
            env=self.environment,
            timeout=timeout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if ran.returncode:
            raise RuntimeError(f"flwr {arguments[0]}: {ran.stdout}\n{self.said()}")
        return ran.stdout

    def online(self) -> int:
        """SuperNodes that have proved who they are and can be given work."""
        listed = self.flwr("supernode", "list", NAME, "--format", "json", cwd=self.logs)
        return sum(node["status"] == "online" for node in json.loads(listed)["nodes"])

    def said(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"── {log.name}\n{log.read_text()[-3000:]}" for log in self._logs())

    def _logs(self) -> list[Path]:
        return sorted(self.logs.glob("*.log"))

    def processes(self) -> list[int]:
        """Everything alive that was started here, by its environment."""
        mark = f"FLWR_HOME={self.environment['FLWR_HOME']}".encode()
        return [int(e.name) for e in Path("/proc").glob("[0-9]*") if mark in _environment(e)]


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # gone, or not ours


@contextmanager
def deployment(folder: Path, supernodes: int, strangers: int = 0) -> Iterator[Deployment]:
    """Start a SuperLink and SuperNodes that are registered by their public keys.

    Args:
        folder: of certificates, keys, logs and state.
        supernodes: how many; each has its ``partition-id``.
        strangers: SuperNodes more, whose keys nobody registered.

    Raises:
        TimeoutError: something does not come up.
    """
    authority = Authority(folder / "tls")
    authority.server(Address())
    port = free_port()
    _configure(folder / "home", port, folder / "tls" / "ca.pem")
    running = Deployment(f"127.0.0.1:{port}", _surroundings(folder / "home"), folder / "logs")
    running.logs.mkdir()
    with ExitStack() as stack:
        stack.callback(_end, running)
        _start(stack, running, "superlink", _superlink(folder, port))
        until(lambda: _answers(port), 120, "the SuperLink does not come up", running)
        for index in range(supernodes + strangers):
            key = _keypair(folder / f"node-{index}")
            if index < supernodes:
                running.flwr("supernode", "register", f"{key}.pub", NAME, cwd=folder)
            _start(
                stack, running, f"node-{index}", _supernode(folder, port, key, index, supernodes)
            )
        until(lambda: running.online() == supernodes, 180, "too few SuperNodes", running)
        yield running


def _surroundings(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def _configure(home: Path, port: int, ca: Path) -> None:
    home.mkdir()
    table = f'[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{ca}"\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "{NAME}"\n\n{table}')


def _superlink(folder: Path, port: int) -> list[str]:
    tls = folder / "tls"
    return [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(tls / "ca.pem")),
        *("--ssl-certfile", str(tls / "server.pem"), "--ssl-keyfile", str(tls / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str(folder / "state.db")),
    ]


def _supernode(folder: Path, port: int, key: Path, index: int, count: int) -> list[str]:
    return [
        *("flower-supernode", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())),
        *("--root-certificates", str(folder / "tls" / "ca.pem")),
        *("--auth-supernode-private-key", str(key)),
        *("--node-config", f"partition-id={index} num-partitions={count}"),
    ]


def _keypair(path: Path) -> Path:
    """As ``ssh-keygen -t ecdsa -b 384`` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.touch(mode=0o600)
    path.write_bytes(private)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")
    return path


def _start(stack: ExitStack, running: Deployment, name: str, command: list[str]) -> None:
    log = stack.enter_context((running.logs / f"{name}.log").open("wb"))
    process = subprocess.Popen(
        command, cwd=running.logs.parent, env=running.environment, stdout=log, stderr=log
    )
    stack.callback(_stop, process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end(running: Deployment) -> None:
    """End what the processes that were started have started, and left behind."""
    closes = time.monotonic() + 10.0
    while (left := running.processes()) and time.monotonic() < closes:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(ready: Callable[[], bool], seconds: float, what: str, running: Deployment) -> None:
    """Wait for something.

    Raises:
        TimeoutError: it did not come in time; with what the logs say.
    """
    closes = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > closes:
            raise TimeoutError(f"{what}\n{running.said()}")
        time.sleep(0.5)
