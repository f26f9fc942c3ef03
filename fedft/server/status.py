"""How a run of real clients stands, for people and for Prometheus: read-only, over plain HTTP.

The server's own thread tells a :class:`Board` what happens; requests read the board's present,
frozen :class:`Standing`. No request takes a lock, opens a file of the run, or changes anything.
"""

import ipaddress
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedft.core.errors import EnvironmentFailure
from fedft.core.link.secrets import is_loopback
from fedft.core.record.rundir import RunDir
from fedft.server.identity import Client
from fedft.server.messages import Waiting
from fedft.server.standing import Board, View
from fedft.server.status_page import HEADERS, page

logger = logging.getLogger(__name__)

_LABELS = 40
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_VISITORS = 32
"""Requests that are answered at the same time; who comes then is hung up on."""
_REQUEST_S = 10.0
"""Within which a request must be sent and its answer taken."""


class Presence(Protocol):
    """Who is connected, see :class:`~fedft.server.grids.grpc.GrpcGrid`."""

    @property
    def connected(self) -> frozenset[str]:
        """Names of the sites that are ready for work."""
        ...

    @property
    def doing(self) -> Mapping[str, str]:
        """Site → what it says it does."""
        ...

    @property
    def turned_away(self) -> Mapping[str, str]:
        """Name → why that client was refused, or left before it had joined."""
        ...


class _Metrics(Collector):
    """A view as Prometheus knows it. Names and units follow Prometheus's own conventions."""

    def __init__(self, look: Callable[[], View]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        view = self._look()
        now = view.standing
        yield CounterMetricFamily("fedft_rounds", "Rounds committed.", value=now.round)
        yield GaugeMetricFamily("fedft_rounds_target", "Rounds the run has at most.", now.target)
        yield GaugeMetricFamily("fedft_run_over", "1 when the run is over.", int(view.over))
        yield SummaryMetricFamily(
            *("fedft_round_seconds", "Wall seconds of committed rounds."),
            count_value=now.round,
            sum_value=sum(now.seconds.values()),
        )
        yield _labelled("fedft_round_phase_seconds", "Wall seconds by phase.", "phase", now.seconds)
        yield _labelled(
            *("fedft_wire_bytes", "Bytes of tensors, seen from the server.", "direction"),
            {"received": now.up, "sent": now.down},
        )
        yield _labelled(*("fedft_failures", "Replies that did not count.", "reason"), now.failures)
        yield GaugeMetricFamily(
            "fedft_clients_connected", "Clients ready for work.", len(view.connected)
        )
        yield GaugeMetricFamily(
            *("fedft_clients_turned_away", "Clients whose last attempt to join was refused."),
            len(view.turned_away),
        )
        yield from _waiting(now.waiting)
        states = GaugeMetricFamily("fedft_clients", "Clients in the register.", labels=["state"])
        for state, count in sorted(Counter(client.state for client in view.clients).items()):
            states.add_metric([state], count)
        yield states
        scores = GaugeMetricFamily("fedft_evaluation", "Newest evaluation.", labels=["metric"])
        for name, value in list(now.scores.items())[:_LABELS]:
            scores.add_metric([name], value)
        yield scores


def _waiting(waiting: Waiting | None) -> Iterator[Metric]:
    """Whom the run waits for; all of it 0 while it waits for nobody."""
    now = time.monotonic()
    values = (0, 0, 0.0, 0.0)
    if waiting is not None:
        missing = waiting.wanted - waiting.done
        values = missing, waiting.done, now - waiting.since, max(0.0, waiting.ends - now)
    about = {
        "clients": "Clients that are waited for.",
        "done": "Clients that have done what is waited for.",
        "seconds": "Seconds since the waiting began.",
        "left_seconds": "Seconds until it is given up.",
    }
    for (name, text), value in zip(about.items(), values, strict=True):
        yield GaugeMetricFamily(f"fedft_waiting_{name}", text, value)


def _labelled(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, about, labels=[label])
    for key, value in sorted(closed(values).items()):
        family.add_metric([key], value)
    return family


def closed(values: Mapping[str, float]) -> Mapping[str, float]:
    """Values by label, with what is no plain word, or one too many, added up as ``other``.

    A time series lives for ever in whoever reads it: no text may become one that anybody chose.
    """
    plain = [word for word in values if _WORD.fullmatch(word)][:_LABELS]
    other = sum(value for word, value in values.items() if word not in plain)
    known = {word: values[word] for word in plain}
    return {**known, "other": known.get("other", 0) + other} if len(plain) < len(values) else known


class _Server(ThreadingHTTPServer):
    """Answers ``/`` and ``/metrics``.

    Args:
        host, port: to bind.
        look: takes a view.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, look: Callable[[], View]) -> None:
        self.look = look
        self.metrics = CollectorRegistry()
        self.metrics.register(_Metrics(look))
        ProcessCollector(registry=self.metrics)
        self.open = not is_loopback(host)
        self._visitors: dict[socket.socket, float] = {}  # → when it came, monotonic
        super().__init__((host, port), _Answer)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Each visitor costs a thread and a descriptor, so that there are few at a time."""
        if len(self._visitors) >= _VISITORS:
            return False
        self._visitors[request] = time.monotonic()
        return True

    def shutdown_request(self, request: Any) -> None:
        self._visitors.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: who drips its request byte by byte, or takes no answer, is hung up on."""
        oldest = time.monotonic() - _REQUEST_S
        for visitor, came in list(self._visitors.items()):
            if came < oldest:
                with suppress(OSError):
                    visitor.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request of %s broke", client_address, exc_info=True)


class _Answer(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _REQUEST_S
    server_version, sys_version = "fedft", ""

    def do_GET(self) -> None:
        if not self._for_us():
            self._send(421, "text/plain; charset=utf-8", b"this name is not mine\n")
            return
        match self.path.partition("?")[0]:
            case "/":
                self._send(200, "text/html; charset=utf-8", page(self.server.look()).encode())
            case "/metrics":
                self._send(200, CONTENT_TYPE_LATEST, generate_latest(self.server.metrics))
            case _:
                self._send(404, "text/plain; charset=utf-8", b"there is / and /metrics\n")

    do_HEAD = do_GET

    def _for_us(self) -> bool:
        """Whether the request names this machine's loopback.

        A page of another site, whose name was made to point here, must not be able to read this.
        """
        host = self.headers.get("Host", "")
        return self.server.open or is_loopback(host.rpartition(":")[0] or host)

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


@contextmanager
def showing(host: str, port: int, look: Callable[[], View]) -> Iterator[str]:
    """Answer requests, in threads of their own, until the block ends.

    Args:
        host: address to bind.
        port: to bind; 0 lets the system choose.
        look: takes a view; called in those threads.

    Yields:
        The URL of the page.

    Raises:
        EnvironmentFailure: the address cannot be bound.
    """
    try:
        server = _Server(host, port, look)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot show the status on {host}:{port}: {error.strerror}",
            fix="Choose another --status-port, or stop what uses it.",
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="fedft-status", daemon=True)
    thread.start()
    try:
        yield f"http://{_bracketed(host)}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def looker(
    run: RunDir,
    board: Board,
    clients: Callable[[], Mapping[str, Client]],
    presence: Presence,
) -> Callable[[], View]:
    """What takes views of a run.

    Args:
        run: its directory.
        board: is told about its rounds.
        clients: reads the register.
        presence: says who is ready for work, and what they do.
    """
    begun = time.monotonic()

    def look() -> View:
        listed = tuple(client for _, client in sorted(clients().items()))
        uptime = time.monotonic() - begun
        return View(
            run.path.name,
            run.finished,
            board.standing,
            listed,
            presence.connected,
            uptime,
            presence.doing,
            presence.turned_away,
        )

    return look
