"""Why two ends of a TLS connection do not trust each other, in a sentence.

gRPC says "unavailable" to all of it; a handshake of Python's own tells what it is.
"""

import contextlib
import socket
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fedft.core.link.secrets import Credentials, load_certificate, span, time_trouble

_NEAR = timedelta(hours=1)
"""How near the ends of its time a certificate is where another clock may see it outside."""
_TIME_CODES = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


@dataclass(frozen=True)
class Trouble:
    """Why TLS with a server fails. ``certain``: trying again cannot help."""

    reason: str
    certain: bool = True


def tls_trouble(target: str, credentials: Credentials, timeout_s: float = 5.0) -> Trouble | None:
    """Why TLS with a server fails; None where it works, or where there is no server.

    Args:
        target: ``host:port``.
        credentials: of this end.
        timeout_s: patience with the network.
    """
    host, _, port = target.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=credentials.ca.decode())
    context.set_alpn_protocols(["h2"])
    _show(context, credentials)
    try:
        plain = socket.create_connection((host, int(port)), timeout_s)
    except OSError:
        return None
    # A server that lets us in speaks first (HTTP/2 settings); one that does not hangs up instead.
    away = Trouble(
        "the server turns this client's certificate away" + near_the_end(credentials), certain=False
    )
    try:
        with plain, context.wrap_socket(plain, server_hostname=host) as tls:
            return None if tls.recv(1) else away
    except ssl.SSLCertVerificationError as error:
        late = error.verify_code in _TIME_CODES
        when = _time_of(host, int(port), timeout_s) if late else None
        return Trouble(f"the server's certificate: {when or error.verify_message}")
    except TimeoutError:
        return None
    except OSError:
        return away


def near_the_end(credentials: Credentials, now: datetime | None = None) -> str:
    """What clocks may have to do with a certificate that is turned away; empty where nothing.

    A server does not say why it hangs up. This end only sees that its certificate has just begun,
    or will soon end, so that a clock that differs by a little would find it invalid.
    """
    own = load_certificate(credentials.certificate, "a certificate in use")
    now = now or datetime.now(UTC)
    since, left = now - own.not_valid_before_utc, own.not_valid_after_utc - now
    if timedelta() <= left < _NEAR:
        return (
            f"; it expires in {span(left)} by this machine's clock, {now:%Y-%m-%d %H:%M:%S} UTC, "
            "and a server whose clock is ahead by more sees it expired"
        )
    if timedelta() <= since < _NEAR:
        return (
            f"; it became valid {span(since)} ago by this machine's clock, "
            f"{now:%Y-%m-%d %H:%M:%S} UTC, and a server whose clock is behind by more does not "
            "see it valid yet"
        )
    return ""


def _show(context: ssl.SSLContext, credentials: Credentials) -> None:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.pem"
        own.touch(mode=0o600)
        own.write_bytes(credentials.certificate + credentials.key)
        context.load_cert_chain(own)


def _time_of(host: str, port: int, timeout_s: float) -> str | None:
    """What is wrong with the time of a server's certificate. Nothing of this end is shown to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only to read the dates of what was refused already
    context.set_alpn_protocols(["h2"])
    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection((host, port), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
        if shown is not None:
            return time_trouble(x509.load_der_x509_certificate(shown))
    return None
