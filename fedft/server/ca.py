"""The authority's own machine: ``fedft ca init``, ``sign``, ``roster`` and ``kit``.

Its folder, for the owner's eyes only:

    ca.pem, ca.key   the authority
    clients/         ``NAME.pem``, the newest certificate of each client
    servers/         ``HOST.pem``, the same of servers

Nothing else that it writes is secret: requests, certificates, rosters and kits without a key may go
by any way that does not change them. Fingerprints are compared by another way, such as by telephone.
"""

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.files import disk, write_file
from fedft.core.link.roster import Roster
from fedft.core.link.secrets import (
    Kit,
    certificate_pem,
    common_name,
    key_digest,
    load_certificate,
    read_public,
)
from fedft.core.record.rundir import child
from fedft.server.authority import (
    SERVER_DAYS,
    SERVER_NAME,
    SITE_DAYS,
    Authority,
    alternatives,
    check_days,
    iso,
    make_private_folder,
    requested,
)
from fedft.server.elsewhere import names_of

_TARGET = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")


@dataclass(frozen=True)
class Signed:
    """A certificate that was made.

    Attributes:
        path: where it is.
        who: a client's name, or the server's names.
        fingerprint: of the key, see :func:`~fedft.core.link.secrets.key_digest`.
        until: ISO 8601, UTC.
    """

    path: Path
    who: str
    fingerprint: str
    until: str


def init(folder: Path) -> Path:
    """Make an authority.

    Returns:
        Its certificate, which servers are given.

    Raises:
        ConfigError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", fix="Choose a new folder for the authority.")
    Authority(folder)
    return folder / "ca.pem"


def sign(
    folder: Path,
    request: Path,
    *,
    server: bool = False,
    days: float | None = None,
    fingerprint: str | None = None,
    replace: bool = False,
) -> Signed:
    """Sign a request.

    Args:
        folder: of the authority.
        request: the file.
        server: it may be a server's. A client's request must never pass for one.
        days: that the certificate lasts; None is a year.
        fingerprint: of the key, as its owner says it; None does not compare.
        replace: a client that has a certificate may have one for another key.

    Raises:
        ConfigError: there is no authority or request there, or the client has another key.
        SecurityRefusal: the request is damaged, of the wrong kind, or of another key than said.
    """
    days = (SERVER_DAYS if server else SITE_DAYS) if days is None else days
    check_days("--days", days)
    authority, csr = _authority(folder), requested(read_public(request))
    key = csr.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # requested() saw to it
    _check_fingerprint(request, key_digest(key), fingerprint)
    if server:
        names = _server_names(request, csr)
        certificate = authority.server_certificate(key, alternatives(names), days)
        who = ", ".join(sorted(names))
        path = _place(folder / "servers", _host(names))
    else:
        who = _client_name(folder, request, csr)
        certificate = authority.client(who, key, days)
        path = _place(folder / "clients", who)
        _check_same_key(path, who, key, replace=replace)
    write_file(path, certificate_pem(certificate))
    return Signed(path, who, key_digest(key), iso(certificate.not_valid_after_utc))


def roster(folder: Path, names: list[str], output: Path) -> Roster:
    """Sign the public keys of the clients of a federation.

    Args:
        folder: of the authority.
        names: of clients that have certificates of it; none takes all of them.
        output: file to write.

    Raises:
        ConfigError: one has none, or the file exists.
    """
    authority = _authority(folder)
    _check_new(output)
    names = names or sorted(path.stem for path in (folder / "clients").glob("*.pem"))
    if not names:
        raise ConfigError(f"{folder} has signed no client yet", fix="First: fedft ca sign.")
    keys = {name: key_digest(_certificate(folder, name).public_key()) for name in names}
    made = Roster(keys, iso(datetime.now(UTC)))
    write_file(output, made.signed(authority.sign).encode())
    return made


def kit(folder: Path, name: str, target: str, output: Path, roster: Path | None = None) -> Kit:
    """Write a join kit for a client whose key was drawn at the client.

    Args:
        folder: of the authority.
        name: of the client.
        target: ``host:port`` of the server.
        output: file to write.
        roster: of the federation; its keys are pinned by the kit.

    Raises:
        ConfigError: there is no such client, the address is none, or the file exists.
        SecurityRefusal: the roster is not this authority's, or has another key of the client.
    """
    found = _TARGET.fullmatch(target)
    if found is None or not 1 <= int(found[2]) <= 65_535:
        raise ConfigError(
            f"{target[:200]!r} is no address of a server",
            fix="Give --server HOST:PORT, as the server prints it.",
        )
    _check_new(output)
    authority, certificate = _authority(folder), _certificate(folder, name)
    text = ""
    if roster is not None:
        text = read_public(roster).decode(errors="replace")
        Roster.verified(text, authority.pem).check(name, certificate.public_key())
    made = Kit(
        name=name,
        server=target,
        ca=authority.pem.decode(),
        certificate=certificate_pem(certificate).decode(),
        key="",
        expires=iso(certificate.not_valid_after_utc),
        roster=text,
    )
    made.write(output)
    return made


def _authority(folder: Path) -> Authority:
    if not (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder} is not the folder of an authority: it has no ca.key",
            fix="Name the folder that `fedft ca init` made.",
        )
    return Authority(folder)


def _check_new(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"{output} exists already", fix="Choose another file.")


def _check_fingerprint(request: Path, found: str, said: str | None) -> None:
    if said is None:
        return
    plain = re.sub(r"[\s:]", "", said.lower().removeprefix("sha256:"))
    if len(plain) < 16 or not found.startswith(plain):
        raise SecurityRefusal(
            f"{request} is for the key {found}, and not for {said[:100]!r}",
            fix="Somebody may have put another request in its place: ask for the file again. "
            "At least 16 digits are compared.",
        )


def _client_name(folder: Path, request: Path, csr: x509.CertificateSigningRequest) -> str:
    name = common_name(csr)
    if name == SERVER_NAME or names_of(csr):
        raise SecurityRefusal(
            f"{request} asks for the certificate of a server, {', '.join(sorted(names_of(csr)))}",
            fix="If it is a server's, and the names are right: fedft ca sign … --server",
        )
    child(folder / "clients", name)
    return name


def _server_names(request: Path, csr: x509.CertificateSigningRequest) -> frozenset[str]:
    names = names_of(csr)
    if common_name(csr) != SERVER_NAME or not names:
        raise SecurityRefusal(
            f"{request} is not the request of a server", fix="Leave --server away."
        )
    for name in names:
        if not _HOST.fullmatch(name) and not _is_address(name):
            raise SecurityRefusal(f"{request} asks for {name[:80]!r}, which is no name of a host")
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host(names: frozenset[str]) -> str:
    """The name that tells a server from others: what everybody has comes last."""
    common = {"localhost", "127.0.0.1", "0.0.0.0", "::"}
    return min(names, key=lambda name: (name in common, _is_address(name), name))


def _place(folder: Path, name: str) -> Path:
    make_private_folder(folder)
    return child(folder, f"{name.replace(':', '-')}.pem")


def _check_same_key(path: Path, who: str, key: ec.EllipticCurvePublicKey, *, replace: bool) -> None:
    if not path.exists() or replace:
        return
    old = key_digest(load_certificate(read_public(path), str(path)).public_key())
    if old != key_digest(key):
        raise ConfigError(
            f"{who} has a certificate already, for the key {old[:16]}…, and asks for another, "
            f"{key_digest(key)[:16]}…",
            fix="If its owner says so, because the old one is lost: --replace.",
        )


def _certificate(folder: Path, name: str) -> x509.Certificate:
    path = child(folder / "clients", f"{name}.pem")
    with disk(f"read {path}"):
        if not path.exists():
            raise ConfigError(
                f"{folder} has signed no client called {name[:80]!r}", fix="First: fedft ca sign."
            )
    return load_certificate(read_public(path), str(path))
