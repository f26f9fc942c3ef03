"""Private files, keys and join kits: what proves who a site is.

A kit is one JSON file with everything a workstation needs to reach its server once: the address,
the server's certificate authority, and a certificate of its own with the key. At the first join
the site draws a key that never leaves it and has it certified; from then on the kit is worthless.
"""

import ipaddress
import json
import os
import stat
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedft.core import system
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.files import LARGEST_TEXT, Files, disk, place

KIT_FORMAT = "fedft-kit/1"
_LARGEST_KIT = 262_144  # bytes: a roster of 2,000 clients
_LARGEST_PUBLIC = 1 << 20  # bytes


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class PrivateFiles(Files):
    """Durable writing of files that only their owner may read."""

    def create(self, path: Path) -> int:
        descriptor = system.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        system.protection().protect(path)
        return descriptor


def write_private(path: Path, data: bytes) -> None:
    """Write a file whole, for its owner only: mode 0600, or an access list on Windows.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    files = PrivateFiles()
    with disk(f"write {path}"):
        files.unlink(path.with_name(f".{path.name}.tmp"))
    place(files, path, data)
    with disk(f"write {path}"):
        files.sync_folder(path.parent)


def read_private(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Read a file that must not be readable for others.

    Args:
        path: of the file.
        largest: bytes that it may have.

    Raises:
        SecurityRefusal: it is; or it belongs to somebody else, is a symbolic link or a pipe, or has
            more bytes.
        ConfigError: there is no such file.
    """
    try:
        # At once, also for a pipe: whether it is one is looked at below.
        descriptor = system.open_file(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="Check the path.") from None
    except OSError as error:
        raise SecurityRefusal(
            f"{path} cannot be opened as a private file: {error.strerror}",
            fix="Name the file itself, not a link or a folder, and check its permissions.",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > largest:
            raise SecurityRefusal(
                f"{path} is no file of the kind that is meant: it is a pipe or a device, or has "
                f"more than {largest:,} bytes",
                fix="Name the file itself, as fedft wrote it.",
            )
        if (exposed := system.protection().exposed(path, file.fileno())) is not None:
            why, fix = exposed
            raise SecurityRefusal(f"{path} {why}", fix=fix)
        return file.read()


def read_public(path: Path) -> bytes:
    """Read a certificate, a request or a roster that somebody sent: nothing in it is secret.

    Raises:
        ConfigError: there is no such file, it is no plain file, or it is far too long.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}", fix="Check the path.")
        with path.open("rb") as file:
            data = file.read(_LARGEST_PUBLIC + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_PUBLIC:
        raise ConfigError(f"{path} has more than {_LARGEST_PUBLIC} bytes; it is not what is meant")
    return data


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM (PKCS #8, not encrypted: the file's mode protects it)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        SecurityRefusal: it is damaged or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SecurityRefusal(
            f"the private key in {where} is damaged",
            fix="Ask for a new kit, and join with another --site-dir.",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SecurityRefusal(
            f"the private key in {where} is not of the kind that fedft makes",
            fix="Ask for a new kit, and join with another --site-dir.",
        )
    return key


def load_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Read a certificate.

    Raises:
        SecurityRefusal: it is damaged.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise SecurityRefusal(
            f"the certificate in {where} is damaged",
            fix="Ask for a new kit, and join with another --site-dir.",
        ) from error


def common_name(holder: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The name a certificate, or a request for one, is made out to; empty where it has none."""
    found = holder.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def key_digest(key: Any) -> str:
    """SHA-256 of a public or private key's public half (DER, SubjectPublicKeyInfo), in hex."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def request_pem(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request to certify a client's key, PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)


def span(time: timedelta) -> str:
    """A stretch of time for a sentence: ``40 s``, ``12 min``, ``5 h``, ``3 days``."""
    seconds = round(abs(time.total_seconds()))
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def time_trouble(certificate: x509.Certificate, now: datetime | None = None) -> str | None:
    """What is wrong with when a certificate is valid, and by how much; None where nothing is.

    A clock that is wrong looks the same as a certificate that is: the sentence names both.
    """
    now = now or datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"by this machine's clock, {now:%Y-%m-%d %H:%M:%S} UTC"
    if now < begins:
        return (
            f"is not valid before {begins:%Y-%m-%d %H:%M:%S} UTC, in {span(begins - now)} {clock}"
        )
    if now >= ends:
        return f"expired on {ends:%Y-%m-%d %H:%M:%S} UTC, {span(now - ends)} ago {clock}"
    return None


_NEW_KIT = "Ask whoever runs the server: fedft revoke NAME, then fedft invite NAME."


def check_time(
    certificate: x509.Certificate, where: str, now: datetime | None = None, fix: str = _NEW_KIT
) -> None:
    """Refuse a certificate that is not valid now.

    Args:
        certificate: to look at.
        where: it is, for the sentence.
        now: None asks the clock.
        fix: what to do about one that has expired.

    Raises:
        SecurityRefusal: it is not valid yet, or has expired; the message says by how much.
    """
    trouble = time_trouble(certificate, now)
    if trouble is None:
        return
    clock = "Check the clock of this machine and of the one that signed"
    early = trouble.startswith("is not")
    raise SecurityRefusal(
        f"the certificate in {where} {trouble}",
        fix=f"{clock}: one of them is wrong, or wait." if early else f"{fix} {clock}, too.",
    )


def check_issued(certificate: x509.Certificate, ca: x509.Certificate, where: str) -> None:
    """Refuse a certificate that an authority did not sign.

    Raises:
        SecurityRefusal: it did not.
    """
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception as error:  # cryptography raises three unrelated types here
        raise SecurityRefusal(
            f"the certificate in {where} was not issued by the authority beside it",
            fix="The file was changed on its way, or is of another authority; ask for a new one.",
        ) from error


@dataclass(frozen=True)
class Credentials:
    """What TLS needs to know of one end. PEM, all three."""

    ca: bytes
    certificate: bytes
    key: bytes

    def checked(self, where: str, fix: str = _NEW_KIT) -> "Credentials":
        """These, after a look at whether they belong together and are valid now.

        Raises:
            SecurityRefusal: they do not, or are not; see :func:`check_time`.
        """
        self.matching(where)
        check_time(load_certificate(self.certificate, where), where, fix=fix)
        return self

    @property
    def due(self) -> bool:
        """Whether less than a third of the certificate's time is left: time to renew it."""
        own = load_certificate(self.certificate, "a certificate in use")
        begins, ends = own.not_valid_before_utc, own.not_valid_after_utc
        return ends - datetime.now(UTC) < (ends - begins) / 3

    def matching(self, where: str) -> "Credentials":
        """These, after a look at whether they belong together; they may have expired.

        Raises:
            SecurityRefusal: they do not.
        """
        ca = load_certificate(self.ca, where)
        own = load_certificate(self.certificate, where)
        key = load_key(self.key, where)
        check_issued(own, ca, where)
        if own.public_key() != key.public_key():
            raise SecurityRefusal(
                f"the key in {where} does not belong to its certificate",
                fix="Ask for a new kit, and join with another --site-dir.",
            )
        return self


@dataclass(frozen=True)
class Kit:
    """A join kit.

    Attributes:
        name: of the site.
        server: ``host:port``.
        ca, certificate, key: PEM; empty for a server without TLS, on loopback. Without a key, the
            certificate is of the key that ``fedft ca request`` drew at the site.
        expires: ISO 8601, UTC.
        roster: of the clients' public keys, see :mod:`fedft.core.link.roster`; empty without one.
    """

    name: str
    server: str
    ca: str
    certificate: str
    key: str
    expires: str
    roster: str = ""

    @property
    def insecure(self) -> bool:
        """Whether it is for a server without TLS."""
        return not self.ca

    @property
    def credentials(self) -> Credentials:
        """For the one call that enrols the site."""
        return Credentials(self.ca.encode(), self.certificate.encode(), self.key.encode())

    def write(self, path: Path) -> None:
        """Store it, for its owner only.

        Raises:
            ConfigError: its roster makes it longer than a kit may be.
        """
        text = json.dumps({"format": KIT_FORMAT, **asdict(self)}, indent=1).encode() + b"\n"
        if len(text) > _LARGEST_KIT:
            raise ConfigError(
                f"the kit of {self.name} would have {len(text)} bytes; {_LARGEST_KIT} are allowed",
                fix="Sign a roster of fewer clients: fedft ca roster CA NAME …",
            )
        write_private(path, text)

    @classmethod
    def read(cls, path: Path) -> "Kit":
        """Load a kit and check all that can be checked without the server.

        It may have expired: a site that has enrolled needs no more of it than the address.

        Raises:
            SecurityRefusal: other users can read it, or it was changed.
            ConfigError: there is no such file, or it is not a kit.
        """
        kit = cls._parsed(read_private(path)[: _LARGEST_KIT + 1], path)
        if kit.insecure:
            return kit
        certificate = load_certificate(kit.certificate.encode(), str(path))
        if kit.key:
            kit.credentials.matching(str(path))
        else:
            check_issued(certificate, load_certificate(kit.ca.encode(), str(path)), str(path))
        own = common_name(certificate)
        if own != kit.name:
            raise SecurityRefusal(
                f"{path} says it is for {kit.name!r}, and its certificate is for {own!r}",
                fix="The file was changed on its way; ask for a new kit.",
            )
        return kit

    @classmethod
    def _parsed(cls, data: bytes, path: Path) -> "Kit":
        try:
            if len(data) > _LARGEST_KIT:
                raise ValueError("too long")
            table: Any = json.loads(data)
            if table.pop("format") != KIT_FORMAT:
                raise ValueError("another format")
            fields = {str(k): str(v) for k, v in cast(dict[str, object], table).items()}
            "".join(fields.values()).encode()  # refuses half a character, which JSON can spell
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a join kit of this version of fedft",
                fix="Use the file that `fedft invite` or `fedft ca kit` wrote, as it is.",
            ) from error
