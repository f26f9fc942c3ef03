"""A proxy in the environment: named where it may be the reason, never used for this machine."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fedft.clients import enrolment
from fedft.clients.proxies import VARIABLES, channel_options, proxy_note
from fedft.clients.session import Session
from fedft.clients.work import Connection, Timing
from fedft.core.errors import EnvironmentFailure
from fedft.core.link.secrets import Credentials, Kit


class Proxy:
    """Takes connections, writes down what they ask for, and hangs up."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.url = f"http://ann:secret@127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(64))

    def close(self) -> None:
        self._listener.close()


def call(target: str, options: list[tuple[str, int]]) -> None:
    """One call, which fails: nobody is there."""
    with grpc.insecure_channel(target, options=options) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/x/y")(b"", timeout=5)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in (*VARIABLES, "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = Proxy()
    yield made
    made.close()


TARGET = "fed.example.invalid:7443"


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_proxy_is_named_with_its_variable_and_without_its_password(variable: str) -> None:
    note = proxy_note(TARGET, {variable: "http://ann:secret@proxy.example:3128"})
    assert f"{variable} is set" in note and "proxy.example:3128" in note
    assert "no_proxy=fed.example.invalid" in note
    assert "ann" not in note and "secret" not in note


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"grpc_proxy": ""},
        {"HTTPS_PROXY": "http://p:1"},  # gRPC reads small letters only
        {"all_proxy": "http://p:1"},
        {"https_proxy": "http://p:1", "no_proxy": "localhost, .Example.invalid"},
        {"https_proxy": "http://p:1", "no_grpc_proxy": "invalid", "no_proxy": "other"},
    ],
)
def test_where_no_proxy_is_used_none_is_named(environment: dict[str, str]) -> None:
    assert proxy_note(TARGET, environment) == ""


@pytest.mark.parametrize("url", ["p", "p:1", "http://[::1", "//", "http://p:port"])
def test_whatever_stands_in_the_variable_is_told(url: str) -> None:
    assert "https_proxy is set" in proxy_note(TARGET, {"https_proxy": url})
    first = proxy_note(TARGET, {"http_proxy": "http://last:1", "grpc_proxy": "http://first:1"})
    assert "first:1" in first and "last" not in first


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_not_behind_a_proxy(host: str) -> None:
    target = f"{host}:7443"
    assert proxy_note(target, {"https_proxy": "http://p:1"}) == ""
    assert channel_options(target) and not channel_options(TARGET)


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_is_written_here_is_what_grpc_does(
    variable: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    for target, options in ((TARGET, channel_options(TARGET)), ("127.0.0.1:9", [])):
        proxy.asked.clear()
        call(target, options)
        assert proxy.asked[0].startswith(f"CONNECT {target}".encode())
    proxy.asked.clear()
    call("127.0.0.1:9", channel_options("127.0.0.1:9"))
    assert proxy.asked == []


def test_enrolling_through_a_proxy_that_refuses_names_it(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", proxy.url)
    monkeypatch.setattr(enrolment, "tls_trouble", lambda *_: None)
    kit = Kit("ann", TARGET, "ca", "certificate", "key", "2100-01-01T00:00:00+00:00")
    show = Credentials(b"", b"", b"")
    with pytest.raises(EnvironmentFailure, match="https_proxy is set") as caught:
        enrolment._call_enrol(kit, show, enrolment.pb.EnrolRequest())
    assert "secret" not in str(caught.value)


def test_a_session_that_cannot_connect_names_the_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("grpc_proxy", proxy.url)
    told: list[str] = []
    timing = Timing(first_delay=0.01, longest_delay=0.01, give_up=0.0)
    session = Session(
        Connection(TARGET, "ann", None),
        worker=None,  # type: ignore[arg-type]  # never gets to work
        tell=told.append,
        timing=timing,
    )
    with pytest.raises(EnvironmentFailure, match="grpc_proxy is set"):
        asyncio.run(session.attend())
