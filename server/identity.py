"""Who may take part: a private certificate authority, join kits, and the register of clients.

Everything lives in ``<run directory>/identity``, for the owner's eyes only:

    ca.pem, ca.key          the authority, made once
    server.pem, server.key  the server's own, made anew at every start
    address.json            where the server listens and how sites reach it
    clients.json            the register

``fedft invite`` and ``fedft revoke`` change the register while a server runs; a lock orders the
writers, and the server looks at the file several times a second.
"""

import fcntl
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedft.core.errors import ConfigError, IntegrityError, SecurityRefusal
from fedft.core.files import disk
from fedft.core.link.secrets import (
    Credentials,
    Kit,
    certificate_pem,
    is_loopback,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    read_private,
    write_private,
)
from fedft.core.rundir import RunDir, child

if TYPE_CHECKING:
    from fedft.core.types import Site

KIT_DAYS = 7.0
SITE_DAYS = 365.0
_SERVER_DAYS = 365.0
_CA_DAYS = 3650.0
_SKEW = timedelta(minutes=10)
"""Certificates are valid from a little earlier, for machines whose clocks are behind."""

Key = ec.EllipticCurvePrivateKey


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
    def binding(self) -> str:
        """``host:port`` to bind."""
        return _joined(self.host, self.port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


# ── certificates ──────────────────────────────────────────────────────────────────────────────


class Authority:
    """The run's own certificate authority.

    Args:
        folder: of the identity; made with the authority where there is none yet.

    Raises:
        SecurityRefusal: other users can read its key, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "ca.pem").exists():
            self._create()
        self._key = load_key(read_private(folder / "ca.key"), "ca.key")
        self.pem = read_private(folder / "ca.pem")
        self._certificate = load_certificate(self.pem, "ca.pem")

    def _create(self) -> None:
        make_private_folder(self.folder)
        key = new_key()
        name = _name("fedft " + os.urandom(4).hex())
        usage = x509.KeyUsage(
            digital_signature=False,
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
        names = {address.name.strip("[]"), address.host.strip("[]"), "localhost", "127.0.0.1"}
        alternatives = x509.SubjectAlternativeName([_general(n) for n in sorted(names - {""})])
        certificate = self._issue(
            "fedft server",
            key.public_key(),
            _SERVER_DAYS,
            ExtendedKeyUsageOID.SERVER_AUTH,
            alternatives,
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
            expires=_iso(certificate.not_valid_after_utc),
        )
        return kit, serial_of(certificate)

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


def _key_digest(key: Any) -> str:
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


# ── the register ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Client:
    """One line of the register.

    Attributes:
        name: of the site.
        node: its number in the grid, from 1, for ever.
        kit: serial number of its kit's certificate.
        serial: of the certificate it works with; empty before it enrolled.
        renewed: of the one that is to take its place, as soon as the site comes with it.
        key: digest of the public key it enrolled with; empty before.
        expires: when its newest certificate does, ISO 8601.
        invited, joined, revoked: ISO 8601; empty where that has not happened.
        dismissed: when it was told that the run is over, ISO 8601.
        why: reason of the revocation.
        examples, rank, memory_mib: as offered at its last join; see :class:`~fedft.core.types.Site`.
    """

    name: str
    node: int
    kit: str
    invited: str
    serial: str = ""
    renewed: str = ""
    key: str = ""
    expires: str = ""
    joined: str = ""
    dismissed: str = ""
    revoked: str = ""
    why: str = ""
    examples: int = 0
    rank: int | None = None
    memory_mib: float | None = None

    @property
    def site(self) -> "Site":
        """As the rules see it."""
        from fedft.core.types import Site  # torch comes with it, and `fedft invite` needs none

        return Site(self.name, self.examples, self.rank, self.memory_mib)

    @property
    def state(self) -> str:
        """One word for a list."""
        if self.revoked:
            return "revoked"
        if self.dismissed:
            return "done"
        return "joined" if self.joined else "enrolled" if self.serial else "invited"


@dataclass
class Registry:
    """The register on disk. Safe for several processes and threads.

    Args:
        folder: of the identity.
    """

    folder: Path
    _seen: tuple[int, int, int] | None = field(default=None, init=False)
    _clients: dict[str, Client] = field(default_factory=dict[str, Client], init=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "clients.json"

    def clients(self) -> Mapping[str, Client]:
        """All clients by name; read again only where the file has changed.

        Raises:
            IntegrityError: the file is damaged.
        """
        try:
            about = self.path.stat()
        except FileNotFoundError:
            return {}
        seen = (about.st_ino, about.st_mtime_ns, about.st_size)
        if seen != self._seen:
            self._clients, self._seen = self._read(), seen
        return self._clients

    def client(self, name: str) -> Client:
        """One client.

        Raises:
            ConfigError: nobody has this name.
        """
        try:
            return self.clients()[name]
        except KeyError:
            raise ConfigError(
                f"no client is called {name[:80]!r}", fix="See `fedft clients`."
            ) from None

    def invite(
        self, name: str, authority: Authority, address: Address, days: float = KIT_DAYS
    ) -> Kit:
        """Register a name and make its kit. A name that was revoked may be invited anew.

        Raises:
            ConfigError: the name is taken.
            SecurityRefusal: it is not a plain name.
        """
        child(self.folder, name)
        with self._changing() as clients:
            old = clients.get(name)
            if old is not None and old.serial and not old.revoked:
                raise ConfigError(
                    f"{name!r} has {old.state} already",
                    fix=f"Choose another name, or first: fedft revoke {name}",
                )
            if address.insecure:
                kit, serial = Kit(name, address.target, "", "", "", ""), "insecure"
            else:
                kit, serial = authority.kit(name, address, days)
            node = old.node if old else 1 + max((c.node for c in clients.values()), default=0)
            clients[name] = Client(name, node, kit=serial, invited=_now())
        return kit

    def revoke(self, name: str, why: str) -> None:
        """Shut a client out for good; a running server cuts its stream within a second.

        Raises:
            ConfigError: nobody has this name.
        """
        self.client(name)
        with self._changing() as clients:
            clients[name] = replace(clients[name], revoked=_now(), why=why)

    def enrol(self, serial: str, csr_pem: bytes, authority: Authority) -> bytes:
        """Certify the key of a site that shows its kit, or the certificate it has.

        The same key may ask again: its first answer may have been lost on the way. For the same
        reason a certificate that is renewed goes on working until the site comes with the new one.

        Args:
            serial: of the certificate the caller showed, which TLS has verified.
            csr_pem: its request, signed by the key to certify.
            authority: signs.

        Returns:
            The certificate, PEM.

        Raises:
            SecurityRefusal: the kit is unknown, used or revoked, or the request is not sound.
        """
        key = _requested_key(csr_pem)
        with self._changing() as clients:
            known = (c for c in clients.values() if serial in (c.kit, c.serial, c.renewed))
            client = next(known, None) if serial else None
            if client is None:
                raise SecurityRefusal("this kit is not known here, or was replaced by a newer one")
            if client.revoked:
                raise SecurityRefusal(
                    f"{client.name} was revoked on {client.revoked}: {client.why}"
                )
            digest = _key_digest(key)
            if client.key not in ("", digest):
                raise SecurityRefusal(
                    f"the kit of {client.name} was used before, by another machine or folder",
                    fix="A kit works once. Ask for a new one; if nobody of yours used it, say so.",
                )
            certificate = authority.client(client.name, key, SITE_DAYS)
            new = serial_of(certificate)
            expires = _iso(certificate.not_valid_after_utc)
            if serial == client.kit:
                changed = replace(client, key=digest, serial=new, renewed="", expires=expires)
            else:
                changed = replace(client, serial=serial, renewed=new, expires=expires)
            clients[client.name] = changed
        return certificate_pem(certificate)

    def joined(self, site: "Site", serial: str) -> None:
        """Remember what a site offered, and the certificate it came with: older ones are void."""
        with self._changing() as clients:
            client = clients[site.name]
            clients[site.name] = replace(
                client,
                serial=serial or client.serial,
                renewed="" if serial == client.renewed else client.renewed,
                joined=client.joined or _now(),
                examples=site.examples,
                rank=site.rank,
                memory_mib=site.memory_mib,
            )

    def dismissed(self, name: str) -> None:
        """Remember that a site knows that the run is over."""
        with self._changing() as clients:
            clients[name] = replace(clients[name], dismissed=_now())

    def unaware(self) -> list[str]:
        """The sites that have joined and may not know yet that the run is over."""
        clients = self.clients().values()
        return sorted(c.name for c in clients if c.joined and not (c.revoked or c.dismissed))

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Client]]:
        """The clients, to be changed; written back when the block ends without an error."""
        make_private_folder(self.folder)
        with disk(f"lock {self.folder}"):
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            clients = self._read() if self.path.exists() else {}
            yield clients
            table = {"schema": 1, "clients": [asdict(c) for c in clients.values()]}
            write_private(self.path, json.dumps(table, indent=1).encode() + b"\n")
        finally:
            os.close(lock)

    def _read(self) -> dict[str, Client]:
        try:
            table = json.loads(read_private(self.path))
            clients = [Client(**line) for line in table["clients"]]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"the register {self.path} is damaged", fix="Restore it from a copy."
            ) from error
        return {client.name: client for client in clients}


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        sound = csr.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise SecurityRefusal("the certificate request is damaged") from error
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey):
        raise SecurityRefusal("the certificate request is not signed by its own P-256 key")
    return key


# ── the folder ────────────────────────────────────────────────────────────────────────────────


def folder_of(run_dir: Path) -> Path:
    """Where a run keeps its identity."""
    return run_dir / "identity"


def make_private_folder(path: Path) -> None:
    """A folder that only its owner can enter."""
    with disk(f"create {path}"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def save_address(folder: Path, address: Address) -> None:
    """Remember how sites reach the server, for kits and for a restart."""
    make_private_folder(folder)  # without TLS nobody made it yet
    write_private(folder / "address.json", json.dumps(asdict(address)).encode() + b"\n")


def load_address(folder: Path) -> Address:
    """As :func:`save_address` left it.

    Raises:
        ConfigError: no server was started on this run directory yet.
    """
    try:
        return Address(**json.loads(read_private(folder / "address.json")))
    except ConfigError:
        raise ConfigError(
            f"no server was started in {folder.parent} yet, so that its address is not known",
            fix="First: fedft serve CONFIG --run-dir DIR. It waits for clients.",
        ) from None


@dataclass
class Audit:
    """``audit.jsonl`` of a run: who was let in or turned away, when and why.

    A line that repeats within ten seconds is not written again, so that a client that hammers at
    the door cannot fill the disk.
    """

    run_dir: Path
    _recent: dict[tuple[str, str, str], datetime] = field(
        default_factory=dict[tuple[str, str, str], datetime], init=False
    )

    def __call__(self, event: str, who: str, why: str = "", **facts: str | int | float) -> None:
        """Add a line."""
        now = datetime.now(UTC)
        before = self._recent.get((event, who, why))
        if before is not None and now - before < timedelta(seconds=10):
            return
        if len(self._recent) > 10_000:
            self._recent.clear()
        self._recent[event, who, why] = now
        line = json.dumps(
            {"when": _iso(now), "event": event, "who": who[:200], "why": why[:500], **facts}
        )
        path = self.run_dir / "audit.jsonl"
        with disk(f"write {path}"), path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")


def invite(run_dir: Path, name: str, output: Path, days: float = KIT_DAYS) -> Kit:
    """Write a join kit for a new client of a run.

    Raises:
        ConfigError: no server was started there yet, the name is taken, or the file exists.
    """
    folder = folder_of(RunDir.open(run_dir).path)
    if output.exists():
        raise ConfigError(f"{output} exists already", fix="Choose another file for the kit.")
    address = load_address(folder)
    kit = Registry(folder).invite(name, Authority(folder), address, days)
    kit.write(output)
    Audit(run_dir)("invited", name, f"until {kit.expires}")
    return kit


def revoke(run_dir: Path, name: str, why: str) -> None:
    """Shut a client of a run out for good."""
    Registry(folder_of(RunDir.open(run_dir).path)).revoke(name, why)
    Audit(run_dir)("revoked", name, why)


def _now() -> str:
    return _iso(datetime.now(UTC))


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
