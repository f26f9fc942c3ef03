"""The certificate authority of a run, and what its certificates look like.

By default the server is its own authority, :class:`Authority`, and signs by itself. It can also
live on another machine, see :mod:`fedft.server.elsewhere`; the server then holds no key that signs.
"""

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedft.core import system
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.files import disk
from fedft.core.link.secrets import (
    Credentials,
    Kit,
    certificate_pem,
    check_time,
    is_loopback,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    read_private,
    write_private,
)

KIT_DAYS = 7.0
SITE_DAYS = 365.0
SERVER_DAYS = 365.0
_CA_DAYS = 3650.0
_SKEW = timedelta(minutes=10)
"""Certificates are valid from a little earlier, for machines whose clocks are behind."""
_LARGEST_REQUEST = 8192  # bytes

SERVER_NAME = "fedft server"
"""Whom a server's certificate is made out to; no client can be called so."""


class Issuer(Protocol):
    """What certifies the server and its clients."""

    pem: bytes
    """Certificate of the authority."""

    def server(self, address: "Address") -> Credentials:
        """Credentials of the server at an address."""
        ...

    def certify(self, name: str, csr_pem: bytes, shown: str) -> x509.Certificate:
        """The certificate that answers a client's request.

        Args:
            name: of the client.
            csr_pem: sound, and of the key that the client is registered with.
            shown: serial number of the certificate that it came with.

        Raises:
            SecurityRefusal: there is none for it.
        """
        ...


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how sites reach it.

    Attributes:
        host: address to bind.
        port: to bind; 0 lets the system choose.
        public: name or address under which sites know the server; None is ``host``.
        insecure: without TLS; on loopback only.
    """

    host: str = "127.0.0.1"
    port: int = 0
    public: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        check_port("--port", self.port)
        if self.insecure and not is_loopback(self.host):
            raise SecurityRefusal(
                f"a server without TLS on {self.host} would send models and updates in the clear "
                "to anybody",
                fix="Leave --insecure away, or listen on 127.0.0.1.",
            )
        if self.public is None and self.host in ("0.0.0.0", "::", "[::]", ""):
            raise ConfigError(
                f"--host {self.host} listens everywhere, which is no address to send to clients",
                fix="Add --public NAME, the name or address under which clients reach this machine.",
            )

    @property
    def name(self) -> str:
        """The host that stands in kits."""
        return self.public or self.host

    @property
    def target(self) -> str:
        """``host:port`` for clients."""
        return _joined(self.name, self.port)

    @property
    def names(self) -> frozenset[str]:
        """Names and addresses that the server's certificate is made out to."""
        names = {self.name.strip("[]"), self.host.strip("[]"), "localhost", "127.0.0.1"}
        return frozenset(_normal(name) for name in names - {""})

    @property
    def binding(self) -> str:
        """``host:port`` to bind."""
        return _joined(self.host, self.port)


def check_port(option: str, port: int) -> None:
    """Refuse what is no port.

    Raises:
        ConfigError: it is not from 0 to 65535.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(
            f"{option} {port} is no port: ports are from 0 to 65535",
            fix="Choose one above 1023, or 0 for a free one.",
        )


def check_days(option: str, days: float) -> None:
    """Refuse what is no time that a certificate can last.

    Raises:
        ConfigError: it is not above 0 and at most ten years.
    """
    if not 0 < days <= _CA_DAYS:  # nan is none either
        raise ConfigError(
            f"{option} {days:g} is no time in days: it is above 0 and at most {_CA_DAYS:g}",
            fix=f"Leave it away for {KIT_DAYS:g} days of a kit, {SITE_DAYS:g} of a certificate.",
        )


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


# ── certificates ──────────────────────────────────────────────────────────────────────────────


class Authority:
    """A certificate authority whose key is in a folder of this machine.

    Args:
        folder: of the identity; made with the authority where there is none yet.

    Raises:
        SecurityRefusal: other users can read its key, it is damaged, or not valid now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "ca.pem").exists():
            self._create()
        self._key = load_key(read_private(folder / "ca.key"), "ca.key")
        self.pem = read_private(folder / "ca.pem")
        self._certificate = load_certificate(self.pem, "ca.pem")
        check_time(self._certificate, str(folder / "ca.pem"), fix="Start with a new authority.")

    def _create(self) -> None:
        make_private_folder(self.folder)
        key = new_key()
        name = _name("fedft " + os.urandom(4).hex())
        usage = x509.KeyUsage(
            digital_signature=True,  # of rosters
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(name, name, key.public_key(), timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        # The key first: a certificate without its key would look like a complete authority.
        write_private(self.folder / "ca.key", key_pem(key))
        write_private(self.folder / "ca.pem", certificate_pem(certificate))

    def server(self, address: Address) -> Credentials:
        """Credentials of the server, made out to its names and addresses."""
        key = new_key()
        certificate = self.server_certificate(
            key.public_key(), alternatives(address.names), SERVER_DAYS
        )
        credentials = Credentials(self.pem, certificate_pem(certificate), key_pem(key))
        write_private(self.folder / "server.key", credentials.key)
        write_private(self.folder / "server.pem", credentials.certificate)
        return credentials

    def kit(self, name: str, address: Address, days: float) -> tuple[Kit, str]:
        """A join kit, and the serial number of its certificate."""
        key = new_key()
        certificate = self.client(name, key.public_key(), days)
        kit = Kit(
            name=name,
            server=address.target,
            ca=self.pem.decode(),
            certificate=certificate_pem(certificate).decode(),
            key=key_pem(key).decode(),
            expires=iso(certificate.not_valid_after_utc),
        )
        return kit, serial_of(certificate)

    def server_certificate(
        self, key: ec.EllipticCurvePublicKey, names: x509.SubjectAlternativeName, days: float
    ) -> x509.Certificate:
        """A certificate by which a server proves its names and addresses."""
        return self._issue(SERVER_NAME, key, days, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def certify(self, name: str, csr_pem: bytes, shown: str) -> x509.Certificate:
        """See :class:`Issuer`."""
        return self.client(name, requested_key(csr_pem), SITE_DAYS)

    def sign(self, data: bytes) -> bytes:
        """A signature by the authority itself, ECDSA over SHA-256."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    def client(self, name: str, key: ec.EllipticCurvePublicKey, days: float) -> x509.Certificate:
        """A certificate by which a site proves its name."""
        return self._issue(name, key, days, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        days: float,
        usage: x509.ObjectIdentifier,
        alternatives: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        builder = (
            _builder(_name(name), self._certificate.subject, key, timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _normal(name: str) -> str:
    """An address as its shortest spelling; a name as it is."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - _SKEW, now + valid - timedelta(seconds=1)))
        .not_valid_after(now + valid)
    )


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number, in hex."""
    return f"{certificate.serial_number:x}"


def alternatives(names: Iterable[str]) -> x509.SubjectAlternativeName:
    """Names and addresses, for a certificate or a request for one."""
    return x509.SubjectAlternativeName([_general(name) for name in sorted(names)])


def requested(csr_pem: bytes) -> x509.CertificateSigningRequest:
    """A request for a certificate, signed by the key that it is for.

    Raises:
        SecurityRefusal: it is damaged, too long, not signed, or of another kind of key.
    """
    if len(csr_pem) > _LARGEST_REQUEST:
        raise SecurityRefusal(
            f"the certificate request has {len(csr_pem)} bytes; {_LARGEST_REQUEST} are allowed"
        )
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        sound = csr.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise SecurityRefusal("the certificate request is damaged") from error
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey):
        raise SecurityRefusal("the certificate request is not signed by its own P-256 key")
    return csr


def requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request is for; raises as :func:`requested`."""
    key = requested(csr_pem).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # requested() saw to it
    return key


def make_private_folder(path: Path) -> None:
    """A folder that only its owner can enter."""
    with disk(f"create {path}"):
        system.private_folder(path)


def iso(moment: datetime) -> str:
    """A moment as it stands in files."""
    return moment.isoformat(timespec="seconds")
