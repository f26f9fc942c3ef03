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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.files import Files, disk, place

KIT_FORMAT = "fedft-kit/1"
_LARGEST_KIT = 65_536  # bytes


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
        return os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )


def write_private(path: Path, data: bytes) -> None:
    """Write a file whole, for its owner only (mode 0600).

    Raises:
        EnvironmentFailure: the disk refused.
    """
    files = PrivateFiles()
    with disk(f"write {path}"):
        files.unlink(path.with_name(f".{path.name}.tmp"))
    place(files, path, data)
    with disk(f"write {path}"):
        files.sync_folder(path.parent)


def read_private(path: Path) -> bytes:
    """Read a file that must not be readable for others.

    Raises:
        SecurityRefusal: it is; or it belongs to somebody else, or is a symbolic link.
        ConfigError: there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="Check the path.") from None
    except OSError as error:
        raise SecurityRefusal(
            f"{path} cannot be opened as a private file: {error.strerror}",
            fix="Name the file itself, not a link or a folder, and check its permissions.",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SecurityRefusal(
                f"{path} can be read or changed by other users (mode {about.st_mode & 0o777:04o})",
                fix=f"If nobody read it: chmod 600 {path}. Otherwise revoke it and invite anew.",
            )
        if about.st_uid != os.geteuid():
            raise SecurityRefusal(f"{path} belongs to another user", fix="Copy it as yourself.")
        return file.read()


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


def common_name(certificate: x509.Certificate) -> str:
    """The name a certificate is made out to; empty where it has none."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


@dataclass(frozen=True)
class Credentials:
    """What TLS needs to know of one end. PEM, all three."""

    ca: bytes
    certificate: bytes
    key: bytes

    def checked(self, where: str) -> "Credentials":
        """These, after a look at whether they belong together and have not expired.

        Raises:
            SecurityRefusal: they do not, or have.
        """
        self.matching(where)
        ends = load_certificate(self.certificate, where).not_valid_after_utc
        if ends <= datetime.now(UTC):
            raise SecurityRefusal(
                f"the certificate in {where} expired on {ends:%Y-%m-%d %H:%M} UTC",
                fix="Ask whoever runs the server: fedft revoke NAME, then fedft invite NAME.",
            )
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
        try:
            own.verify_directly_issued_by(ca)
        except Exception as error:  # cryptography raises three unrelated types here
            raise SecurityRefusal(
                f"the certificate in {where} was not issued by the authority beside it",
                fix="The file was changed on its way; ask for a new kit.",
            ) from error
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
        ca, certificate, key: PEM; empty for a server without TLS, on loopback.
        expires: ISO 8601, UTC.
    """

    name: str
    server: str
    ca: str
    certificate: str
    key: str
    expires: str

    @property
    def insecure(self) -> bool:
        """Whether it is for a server without TLS."""
        return not self.ca

    @property
    def credentials(self) -> Credentials:
        """For the one call that enrols the site."""
        return Credentials(self.ca.encode(), self.certificate.encode(), self.key.encode())

    def write(self, path: Path) -> None:
        """Store it, for its owner only."""
        text = json.dumps({"format": KIT_FORMAT, **asdict(self)}, indent=1)
        write_private(path, text.encode() + b"\n")

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
        kit.credentials.matching(str(path))
        own = common_name(load_certificate(kit.certificate.encode(), str(path)))
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
                fix="Use the file that `fedft invite NAME -o KIT` wrote, as it is.",
            ) from error
