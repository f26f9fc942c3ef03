"""The proxy that gRPC sends a connection through, which nobody told it about but the environment.

gRPC takes the first of ``grpc_proxy``, ``https_proxy`` and ``http_proxy`` (in small letters only)
and sends everything through it, this machine's own addresses included, but for hosts whose name
ends in an entry of ``no_grpc_proxy`` or, where that is not set, ``no_proxy``. A proxy for web pages
often refuses the ports of others, or hangs up on a stream that is quiet for a minute.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from fedft.core.link.secrets import is_loopback

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""That gRPC reads, the first that is set."""

EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
"""Hosts that it reaches directly; the first variable that is set counts."""


def channel_options(target: str) -> list[tuple[str, int]]:
    """Options of a channel: a server on this machine is never looked for behind a proxy."""
    return [("grpc.enable_http_proxy", 0)] if is_loopback(_host(target)) else []


def proxy_note(target: str, environment: Mapping[str, str] = os.environ) -> str:
    """Says that connections go through a proxy, and how they would not; empty where they go straight.

    Args:
        target: ``host:port`` of the server.
        environment: of the process. User and password of a proxy are never repeated.
    """
    variable = next((name for name in VARIABLES if environment.get(name)), None)
    host = _host(target)
    if variable is None or is_loopback(host) or _excepted(host, environment):
        return ""
    return (
        f"{variable} is set, so that gRPC goes through the proxy {_shown(environment[variable])}; "
        f"where the server can be reached without it: no_proxy={host}"
    )


def _host(target: str) -> str:
    return target.rpartition(":")[0].strip("[]")


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    listed = next((environment[name] for name in EXCEPTIONS if environment.get(name)), "")
    entries = (entry.strip() for entry in listed.split(","))
    return any(entry and host.lower().endswith(entry.lower()) for entry in entries)


def _shown(url: str) -> str:
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        return f"{parts.hostname or '?'}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        return "named there"
