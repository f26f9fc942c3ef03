"""What a round costs when nobody trains: server → client → server, over TLS on loopback.

    python -m benchmarks.overhead [--only resident-100] [--resume]

The adapter is that of MiniLM at rank 8: 24 float32 arrays, 0.3 MB, new in every round. A round is
everything from making its messages to having every reply, checked. ``resident-N`` are N of our own
client sessions, each with its certificate and its stream, in at most two processes; the work is to
give back what came. ``supernode-1`` is the same on one Flower SuperNode behind a SuperLink with TLS
and node authentication; its client app imports NumPy and nothing more.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks.record import add_options, measure_sections
from benchmarks.superlink import NAME, deployment
from fedft.clients.session import Session
from fedft.clients.work import Connection, Failure, Offer
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Expected, Ticket
from fedft.core.link.secrets import Credentials, key_pem, new_key, read_private, write_private
from fedft.core.quiet import quiet
from fedft.server.grids.grpc import GrpcGrid
from fedft.server.grids.stream import Terms
from fedft.server.identity import Address, Audit, Authority, Registry, serial_of

SECTIONS = ["resident-1", "resident-100", "supernode-1"]
ARRAYS, SIDE = 24, 3072
SHAPES = {f"layer.{i}": (SIDE,) for i in range(ARRAYS)}
HASHES = {"base_model": "-", "tokenizer": "-", "data_schema": "-"}
WARM_UP = 3
PROCESSES = 2
APP = Path(__file__).parent / "noop_app"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--clients", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.clients:
        asyncio.run(attend(json.loads(read_private(arguments.clients))))
        return
    measure_sections("overhead", arguments, SECTIONS, SECTIONS, section)


def section(key: str) -> Mapping[str, Any]:
    kind, _, count = key.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        measured = resident if kind == "resident" else supernodes
        result = measured(Path(folder), int(count))
    print(json.dumps(result), flush=True)
    return result


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of rounds, in milliseconds."""
    ordered = sorted(1000 * s for s in seconds)
    return {
        "rounds": len(ordered),
        "median_ms": round(statistics.median(ordered), 2),
        "fastest_ms": round(ordered[0], 2),
        "p90_ms": round(ordered[int(0.9 * (len(ordered) - 1))], 2),
        "slowest_ms": round(ordered[-1], 2),
    }


# ── resident clients ──────────────────────────────────────────────────────────────────────────


class Echo:
    """A worker that gives back what it gets. See :class:`fedft.clients.work.Worker`."""

    def load(self, run: str, task: str, hashes: Mapping[str, str]) -> Offer:
        return Offer(1, None, None, hashes)

    def expected(self, plan: str, header: pb.Content) -> Expected:
        return {"arrays": SHAPES}

    def work(self, ticket: Ticket, plan: str, content: RecordDict) -> RecordDict | Failure:
        content["metrics"] = MetricRecord({"num-examples": 1})
        return content

    def judged(self, ticket: Ticket, *, counted: bool) -> None: ...


async def attend(sites: Mapping[str, Any]) -> None:
    """Be several sites, until the run is over."""
    sessions = [
        Session(Connection(sites["target"], name, _credentials(pems)), Echo())
        for name, pems in sites["sites"].items()
    ]
    await asyncio.gather(*(session.attend() for session in sessions))


def _credentials(pems: Sequence[str]) -> Credentials:
    return Credentials(*(pem.encode() for pem in pems))


def resident(folder: Path, count: int) -> dict[str, Any]:
    """Rounds with our own clients."""
    registry, authority = Registry(folder / "identity"), Authority(folder / "identity")
    terms = Terms("overhead", "{}", HASHES, expected=lambda message: {"arrays": SHAPES})
    process = psutil.Process()
    with (
        GrpcGrid(terms, Address(), registry, authority, Audit(folder)) as grid,
        ExitStack() as stack,
    ):
        target = f"127.0.0.1:{grid.port}"
        names = [f"site-{i:03d}" for i in range(count)]
        sites = {name: _enrolled(registry, authority, name) for name in names}
        empty = process.memory_info().rss
        begun = time.perf_counter()
        for share in range(min(count, PROCESSES)):
            own = {"target": target, "sites": {n: sites[n] for n in names[share::PROCESSES]}}
            stack.enter_context(_clients(folder / f"clients-{share}.json", own))
        if not grid.wait_connected(lambda there: len(there) == count, 120):
            raise TimeoutError(f"{len(grid.connected)} of {count} clients are connected")
        connected = time.perf_counter() - begun
        rounds = 200 if count == 1 else 30
        seconds: list[float] = []
        memory: list[int] = []
        for number in range(WARM_UP + rounds):
            seconds.append(_round(grid, number, count))
            memory.append(process.memory_info().rss)
        grid.drain(finished=True, reason="measured")
    events = [
        json.loads(line)["event"] for line in (folder / "audit.jsonl").read_text().splitlines()
    ]
    return {
        **spread(seconds[WARM_UP:]),
        "clients": count,
        "refusals": events.count("refused"),
        "connect_s": round(connected, 2),
        "server_mib": {
            "before_clients": empty >> 20,
            "after_first_rounds": memory[WARM_UP] >> 20,
            "largest": max(memory) >> 20,
            "after_last_round": memory[-1] >> 20,
        },
    }


def _enrolled(registry: Registry, authority: Authority, name: str) -> list[str]:
    """CA, certificate and key of a site, without the trip over the network."""
    kit = registry.invite(name, authority, Address(port=1))
    key = new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
    pem = registry.enrol(serial, csr.public_bytes(serialization.Encoding.PEM), authority)
    return [kit.ca, pem.decode(), key_pem(key).decode()]


@contextmanager
def _clients(path: Path, sites: Mapping[str, Any]) -> Iterator[None]:
    """A process of sites; it ends when the run is over."""
    write_private(path, json.dumps(sites).encode())
    command = [sys.executable, "-m", "benchmarks.overhead", "--clients", str(path)]
    with subprocess.Popen(command, cwd=APP.parents[1]) as process:
        try:
            yield
            process.wait(30)
        finally:
            process.kill()


def _round(grid: GrpcGrid, number: int, count: int) -> float:
    begun = time.perf_counter()
    arrays = {name: Array(np.full(shape, number, np.float32)) for name, shape in SHAPES.items()}
    adapter = ArrayRecord(arrays)
    config = ConfigRecord({"plan": json.dumps({"steps": 0, "rank": 8}), "task": ""})
    content = RecordDict({"arrays": adapter, "config": config})
    messages = [Message(content, 1 + i, "train", group_id=str(number)) for i in range(count)]
    ids = set(grid.push_messages(messages))
    while ids:
        if not grid.wait(ids, 60):
            raise TimeoutError(f"round {number}: {len(ids)} replies are missing")
        for reply in grid.pull_messages(ids):
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            ids.discard(reply.metadata.reply_to_message_id)
    return time.perf_counter() - begun


# ── Flower's SuperNodes ───────────────────────────────────────────────────────────────────────


def supernodes(folder: Path, count: int) -> dict[str, Any]:
    """Rounds of a Flower app that does nothing."""
    rounds, output = 6, folder / "seconds.json"
    settings = f'rounds={rounds + 1} arrays={ARRAYS} side={SIDE} output="{output}"'
    with deployment(folder, count) as running:
        running.flwr("run", ".", NAME, "--stream", "--run-config", settings, cwd=APP)
        seconds = json.loads(output.read_text())
    return {**spread(seconds[1:]), "clients": count}


if __name__ == "__main__":
    main()
