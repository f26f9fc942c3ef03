"""A server of clients in a process of its own, which has few descriptors and says what it uses.

Lines come on standard input and are answered on standard output, as JSON:

    use       resident MiB, open descriptors, connections to the port, streams without a hello
    write     opens twenty files in the run directory at once, and writes them
    round     asks client 1 to work; whether it answered
    all       asks every client; how many answered
    joined    how many clients are ready for work
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedft.core.link import link_pb2_grpc
from fedft.core.link.secrets import key_pem, new_key
from fedft.server.grids import hub
from fedft.server.grids.grpc import GrpcGrid
from fedft.server.grids.stream import Terms, Timing
from fedft.server.identity import Address, Audit, Authority, Registry, serial_of

SHAPES = {"a": (64, 128), "b": (128, 64)}
HASHES = {"base_model": "m", "tokenizer": "t", "data_schema": "d"}


def serve(folder: Path, limit: int, clients: int, guarded: bool) -> None:
    """Serve until standard input ends.

    Args:
        folder: of the run.
        limit: descriptors that this process may have.
        clients: how many are enrolled; their credentials are in ``sites.json``.
        guarded: whether connections are bounded.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if not guarded:
        hub.Room.within = classmethod(lambda cls, limit, used: cls(10**6, 10**6, 10**6))  # type: ignore[method-assign,assignment]
    registry, authority = Registry(folder / "identity"), Authority(folder / "identity")
    terms = Terms("run", "{}", HASHES, lambda message: {"arrays": SHAPES})
    grid = GrpcGrid(terms, Address(), registry, authority, Audit(folder), Timing())
    address = Address(port=grid.port)
    sites = {
        f"site-{i:03d}": enrol(registry, authority, address, f"site-{i:03d}")
        for i in range(clients)
    }
    (folder / "sites.json").write_text(json.dumps(sites))
    say(port=grid.port)
    answers = {"use": use, "write": write, "round": ask, "all": ask_all, "joined": joined}
    for line in sys.stdin:
        say(**answers[line.strip()](grid, folder))
    os._exit(0)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def enrol(registry: Registry, authority: Authority, address: Address, name: str) -> list[str]:
    """A site that has joined before: its authority, certificate and key."""
    kit = registry.invite(name, authority, address)
    key = new_key()
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
    certificate = registry.enrol(serial, csr.public_bytes(serialization.Encoding.PEM), authority)
    return [kit.ca, certificate.decode(), key_pem(key).decode()]


def use(grid: GrpcGrid, folder: Path) -> dict[str, Any]:
    own = psutil.Process()
    there = [c for c in own.net_connections("tcp") if c.laddr.port == grid.port and c.raddr]
    return {
        "mib": own.memory_info().rss / 2**20,
        "descriptors": own.num_fds(),
        "connections": len(there),
        "half_open": len(grid._hub._half_open),
    }


def write(grid: GrpcGrid, folder: Path) -> dict[str, Any]:
    try:
        with contextlib.ExitStack() as open_:
            for i in range(20):
                file = open_.enter_context((folder / f"file-{i}").open("w"))
                file.write("x")
    except OSError as error:
        return {"error": str(error.strerror)}
    return {"error": None}


def ask(grid: GrpcGrid, folder: Path) -> dict[str, Any]:
    return {"answered": answered(grid, [1]) == 1}


def ask_all(grid: GrpcGrid, folder: Path) -> dict[str, Any]:
    return {"answered": answered(grid, list(grid.get_node_ids()))}


def answered(grid: GrpcGrid, nodes: list[int]) -> int:
    from tests.server.test_grpc_grid import arrays, message

    global asked
    asked += 1
    record = arrays(SHAPES)
    found = grid.send_and_receive([message(node, asked, record) for node in nodes], timeout=60)
    return sum(not reply.has_error() for reply in found)


asked = 0


def joined(grid: GrpcGrid, folder: Path) -> dict[str, Any]:
    return {"joined": len(grid.connected)}


class Host:
    """The other end of such a server."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self.folder = folder
        self.port: int = self._answer()["port"]

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def until(self, what: str, ready: Any, seconds: float = 60.0) -> dict[str, Any]:
        ends = time.monotonic() + seconds
        while not ready(found := self.ask(what)):
            assert time.monotonic() < ends, found
            time.sleep(0.1)
        return found

    def sites(self) -> dict[str, list[str]]:
        return json.loads((self.folder / "sites.json").read_text())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def stub(self, pem: list[str]) -> tuple[grpc.Channel, Any]:
        """A channel of its own, with a client's certificate."""
        ca, certificate, key = (text.encode() for text in pem)
        channel = grpc.secure_channel(
            f"127.0.0.1:{self.port}",
            grpc.ssl_channel_credentials(ca, key, certificate),
            [("grpc.use_local_subchannel_pool", 1)],
        )
        return channel, link_pb2_grpc.FederationStub(channel)


@contextmanager
def crowded(
    folder: Path, *, limit: int = 1024, clients: int = 1, guarded: bool = True
) -> Iterator[Host]:
    """A server in a process of its own."""
    folder.mkdir(exist_ok=True)
    words = [str(folder), str(limit), str(clients), str(int(guarded))]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server.crowded", *words],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Host(process, folder)
        finally:
            process.kill()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
