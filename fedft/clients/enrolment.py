"""How a site proves who it is: its own certificate, in exchange for a kit or out of one, renewed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from fedft.clients.proxies import channel_options, proxy_note
from fedft.clients.request import adopt, prepare, signed_again
from fedft.core.errors import EnvironmentFailure, SecurityRefusal
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.roster import Roster
from fedft.core.link.secrets import (
    Credentials,
    Kit,
    certificate_pem,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    read_private,
    request_pem,
    write_private,
)
from fedft.core.link.trust import tls_trouble

_ENROL_S = 30.0
_AGAIN_S = 3600.0
"""Between two attempts to renew a certificate, while a site runs."""


def enrolled(
    kit: Kit, folder: Path, tell: Callable[[str], None] = lambda text: None
) -> Credentials:
    """The site's own credentials; the first time, in exchange for the kit or out of it.

    A certificate of which less than a third of its time is left is renewed. Where the server is
    away or will not, the site goes on with the one it has.

    Raises:
        SecurityRefusal: the server refuses the kit, or is not the one that made it.
        EnvironmentFailure: the server cannot be reached.
    """
    if not kit.key:
        adopt(kit, folder)
    elif not (folder / "certificate.pem").exists():
        _exchange(kit, folder)
    own = Credentials(
        read_private(folder / "ca.pem"),
        read_private(folder / "certificate.pem"),
        read_private(folder / "site.key"),
    )
    if own.ca != kit.ca.encode():
        raise SecurityRefusal(
            f"{folder} belongs to a client of another server", fix="Name another --site-dir."
        )
    if kit.key:
        own.checked(str(folder))
    else:
        own.checked(str(folder), fix=signed_again(kit, prepare(kit, folder)))
    return _renewed(kit, folder, own, tell) if own.due else own


@dataclass
class Renewal:
    """Credentials of a site that runs for longer than a certificate lasts.

    Args:
        kit: as for :func:`enrolled`.
        folder: likewise.
        tell: likewise.
        clock: in seconds.
    """

    kit: Kit
    folder: Path
    tell: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.monotonic
    _tried: float = field(default=float("-inf"), init=False)
    _last: Credentials | None = field(default=None, init=False)

    def __call__(self) -> Credentials:
        """The credentials to use now; those of before, where an attempt was made just now."""
        if self._last is None or self.clock() - self._tried >= _AGAIN_S:
            self._tried = self.clock()
            self._last = enrolled(self.kit, self.folder, self.tell)
        return self._last


def pinned(kit: Kit, credentials: Credentials | None) -> Roster | None:
    """The public keys that a kit pins, one of which must be this site's own; None without any.

    Raises:
        SecurityRefusal: the roster was not signed by the kit's authority, or does not know this key.
        ConfigError: it is no roster.
    """
    if not kit.roster or credentials is None:
        return None
    roster = Roster.verified(kit.roster, kit.ca.encode())
    roster.check(kit.name, load_key(credentials.key, "the folder of this client"))
    return roster


def _exchange(kit: Kit, folder: Path) -> None:
    """Have a key of this machine's own certified; it is stored before the kit is spent."""
    show = kit.credentials.checked("the kit")
    path = folder / "site.key"
    if not path.exists():
        write_private(path, key_pem(new_key()))
    own = _certified(kit, show, read_private(path))
    write_private(folder / "ca.pem", own.ca)
    write_private(folder / "certificate.pem", own.certificate)


def _renewed(kit: Kit, folder: Path, own: Credentials, tell: Callable[[str], None]) -> Credentials:
    """The key that the site has, certified anew; both certificates work until the new one did."""
    try:
        new = _certified(kit, own, own.key)
    except (SecurityRefusal, EnvironmentFailure) as error:
        tell(f"the certificate of this client was not renewed: {error.what}")
        if not kit.key:
            tell(signed_again(kit, folder / f"{kit.name}.csr"))
        return own
    write_private(folder / "certificate.pem", new.certificate)
    tell("the certificate of this client was renewed")
    return new


def _certified(kit: Kit, show: Credentials, key_file: bytes) -> Credentials:
    """Have a key certified.

    Args:
        kit: says where, and for whom.
        show: credentials of the call: the kit's, or the site's present ones.
        key_file: the private key, PEM.

    Raises:
        SecurityRefusal: the server refused, or is not the one that made the kit.
        EnvironmentFailure: the server cannot be reached.
    """
    key = load_key(key_file, "the folder of this client")
    reply = _call_enrol(kit, show, pb.EnrolRequest(csr=request_pem(kit.name, key)))
    if reply.refusal:
        raise SecurityRefusal(
            f"the server refused {_shown(kit, show)}: {reply.refusal[:1000]}",
            fix="Ask whoever runs the server for a new kit.",
        )
    certificate = certificate_pem(load_certificate(reply.certificate, "the server's answer"))
    return Credentials(show.ca, certificate, key_file).checked("the server's answer")


def _shown(kit: Kit, show: Credentials) -> str:
    return "the kit" if show.certificate == kit.certificate.encode() else "the request"


def _call_enrol(kit: Kit, show: Credentials, request: pb.EnrolRequest) -> pb.EnrolReply:
    tls = grpc.ssl_channel_credentials(show.ca, show.key, show.certificate)
    with grpc.secure_channel(kit.server, tls, options=channel_options(kit.server)) as channel:
        try:
            return link_pb2_grpc.FederationStub(channel).Enrol(request, timeout=_ENROL_S)
        except grpc.RpcError as error:
            trouble = tls_trouble(kit.server, show)
            if trouble is not None:
                raise SecurityRefusal(
                    f"{kit.server} and this kit do not trust each other: {trouble.reason}",
                    fix="Check the clocks of both machines, and that the kit is of this server.",
                ) from error
            call = cast(grpc.Call, error)
            note = proxy_note(kit.server)
            raise EnvironmentFailure(
                f"{kit.server} cannot be reached: {(call.details() or '')[:300]}"
                + (f" ({note})" if note else ""),
                fix="Check that the server runs, and the network between here and there.",
            ) from error
