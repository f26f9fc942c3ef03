"""A server and its clients, each a process of its own, on loopback with mutual TLS."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fedft.api import Run
from fedft.clients.join import join
from fedft.clients.work import Timing as ClientTiming
from fedft.clients.worker import Site
from fedft.core.data import partition
from fedft.server import identity
from fedft.server.config import RunConfig
from fedft.server.grids.stream import Timing
from fedft.server.run import simulate
from fedft.server.serve import Hosting, serve

FAST = Timing(heartbeat=1.0, silence=10.0, absence=30.0)
QUICK = ClientTiming(heartbeat=1.0, silence=10.0, first_delay=0.1, longest_delay=0.5, give_up=60.0)


@cache
def processes() -> Any:
    """Processes that start in a moment: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fedft.clients.join", "fedft.clients.engines.loop", "fedft.server.serve"]
    )
    return context


class Cable:
    """A network that a test can cut: then nothing gets through and nobody is told, as in life."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._whole = threading.Event()
        self._whole.set()
        self._ends: list[socket.socket] = []
        self.server = 0
        """The port that it leads to."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def cut(self, seconds: float) -> None:
        self._whole.clear()
        time.sleep(seconds)
        self._whole.set()

    def close(self) -> None:
        self._whole.set()
        for end in [self._listener, *self._ends]:
            # Also wakes whoever waits for it in another thread.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._whole.wait()
                far = socket.create_connection(("127.0.0.1", self.server))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._whole.wait()  # what was on its way is sent again once the line is mended
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


@dataclass
class Stage:
    """A server and clients, each a process of its own."""

    processes: Any
    folder: Path
    config: RunConfig
    hosting: Hosting
    server: Any = None
    clients: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int | None] = field(default_factory=dict)
    client_timing: ClientTiming = QUICK
    cable: Cable | None = None
    """Between the server and the clients that are invited."""
    name: str = "run"
    """Of the run directory, by which clients know the run."""
    ledgers: Path | None = None
    """Where the clients keep their ledgers, if not in the folder of the stage."""

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    @property
    def run(self) -> Run:
        return Run(self.run_dir)

    def start_server(self) -> None:
        self.server = self.processes.Process(
            target=serve,
            args=(self.config, self.run_dir, identity.Address()),
            kwargs={"hosting": self.hosting},
            daemon=True,
        )
        self.server.start()

    def invite(self, name: str) -> None:
        until(lambda: (self.run_dir / "identity" / "address.json").exists())
        kit = identity.invite(self.run_dir, name, self.folder / f"{name}.kit")
        if self.cable is not None:
            self.cable.server = int(kit.server.rpartition(":")[2])
            replace(kit, server=f"127.0.0.1:{self.cable.port}").write(self.folder / f"{name}.kit")

    def start_client(self, name: str, data: Path) -> None:
        ledger = self.ledgers or self.folder / "ledger"
        model = self.config.model.source
        site = Site(data, self.ranks.get(name), threads=1, model=model, ledger=ledger)
        process = self.processes.Process(
            target=join,
            args=(self.folder / f"{name}.kit", site),
            kwargs={"folder": self.folder / name, "timing": self.client_timing},
            daemon=True,
        )
        process.start()
        self.clients[name] = process

    def finish(self, seconds: float = 120.0) -> Run:
        self.server.join(seconds)
        assert self.server.exitcode == 0
        for process in self.clients.values():
            process.join(15)
            assert process.exitcode == 0
        return self.run

    def close(self) -> None:
        for process in [self.server, *self.clients.values()]:
            if process is not None and process.is_alive():
                process.kill()
                process.join(10)
        if self.cable is not None:
            self.cable.close()


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


def simulated(config: RunConfig, folder: Path) -> Run:
    return Run(simulate(config, folder).path)


def site_files(config: RunConfig, simulated_run: Run, folder: Path) -> dict[str, Path]:
    """The rows of each site of a simulation, as a file of its own."""
    from fedft.core.data.source import load

    raw = load(config.data, config.model.task, seed=config.seed).train
    assert raw.labels is not None
    source = [json.loads(line) for line in Path(config.data.source).read_text().splitlines()]
    manifest = partition.load(simulated_run.directory / "partition")
    folder.mkdir(exist_ok=True)
    files: dict[str, Path] = {}
    for index in range(len(manifest)):
        rows = [source[raw.lines[row] - 1] for row in manifest.rows_of(index)]
        path = folder / f"{manifest.name_of(index)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[manifest.name_of(index)] = path
    return files


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def rounds_done(play: Stage) -> int:
    file = play.run_dir / "rounds.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def start_all(play: Stage, files: dict[str, Path]) -> None:
    play.start_server()
    for name, file in files.items():
        play.invite(name)
        play.start_client(name, file)
