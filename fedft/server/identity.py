"""Who may take part: a private certificate authority, join kits, and the register of clients.

Everything lives in ``<run directory>/identity``, for the owner's eyes only:

    ca.pem, ca.key          the authority, made once
    server.pem, server.key  the server's own, made anew at every start
    address.json            where the server listens and how sites reach it
    clients.json            the register

``fedft invite`` and ``fedft revoke`` change the register while a server runs; a lock orders the
writers, and the server looks at the file several times a second.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedft.core import system
from fedft.core.errors import ConfigError, IntegrityError, SecurityRefusal
from fedft.core.files import disk
from fedft.core.link.secrets import (
    Kit,
    certificate_pem,
    key_digest,
    read_private,
    read_public,
    write_private,
)
from fedft.core.record.rundir import RunDir, child
from fedft.server.audit import Audit
from fedft.server.authority import (
    KIT_DAYS,
    Address,
    Authority,
    Issuer,
    check_days,
    iso,
    make_private_folder,
    requested_key,
    serial_of,
)
from fedft.server.elsewhere import AuthorityElsewhere

if TYPE_CHECKING:
    from fedft.core.types import Site

# ── the register ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Client:
    """One line of the register.

    Attributes:
        name: of the site.
        node: its number in the grid, from 1, for ever.
        kit: serial number of its kit's certificate; empty where that came from elsewhere.
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

    def take_in(self, name: str, pem: bytes, authority: AuthorityElsewhere) -> Client:
        """Register a client by a certificate that was signed elsewhere, or the renewal of one.

        Args:
            name: of the client.
            pem: its certificate.
            authority: that must have signed it.

        Raises:
            SecurityRefusal: it is not one of this authority for this client, or its key was revoked.
            ConfigError: the client has another key already.
        """
        child(self.folder, name)
        certificate = authority.accepted(name, pem)
        serial, digest = serial_of(certificate), key_digest(certificate.public_key())
        with self._changing() as clients:
            old = clients.get(name)
            if old is not None and old.revoked and old.key == digest:
                raise SecurityRefusal(
                    f"the key of {name!r} was revoked on {old.revoked}: {old.why}",
                    fix="Have its owner draw a new key: fedft ca request, with another --site-dir.",
                )
            if old is not None and not old.revoked and old.key not in ("", digest):
                raise ConfigError(
                    f"{name!r} is registered with another key than this certificate's",
                    fix=f"Choose another name, or first: fedft revoke {name}",
                )
            expires = iso(certificate.not_valid_after_utc)
            if old is None or old.revoked or not old.key:
                node = old.node if old else 1 + max((c.node for c in clients.values()), default=0)
                kit = old.kit if old and not old.revoked else ""  # from before the key was moved
                new = Client(name, node, kit, _now(), serial=serial, key=digest, expires=expires)
            elif serial in (old.serial, old.renewed):
                new = old
            else:
                new = replace(old, renewed=serial, expires=expires)
            clients[name] = new
            authority.keep(name, pem)
        return new

    def revoke(self, name: str, why: str) -> None:
        """Shut a client out for good; a running server cuts its stream within a second.

        Raises:
            ConfigError: nobody has this name.
        """
        self.client(name)
        with self._changing() as clients:
            clients[name] = replace(clients[name], revoked=_now(), why=why)

    def enrol(self, serial: str, csr_pem: bytes, authority: Issuer) -> bytes:
        """Certify the key of a site that shows its kit, or the certificate it has.

        The same key may ask again: its first answer may have been lost on the way. For the same
        reason a certificate that is renewed goes on working until the site comes with the new one.

        Args:
            serial: of the certificate the caller showed, which TLS has verified.
            csr_pem: its request, signed by the key to certify.
            authority: signs, or has what was signed elsewhere.

        Returns:
            The certificate, PEM.

        Raises:
            SecurityRefusal: the kit is unknown, used or revoked, or the request is not sound.
        """
        digest = key_digest(requested_key(csr_pem))
        with self._changing() as clients:
            known = (c for c in clients.values() if serial in (c.kit, c.serial, c.renewed))
            client = next(known, None) if serial else None
            if client is None:
                raise SecurityRefusal("this kit is not known here, or was replaced by a newer one")
            if client.revoked:
                raise SecurityRefusal(
                    f"{client.name} was revoked on {client.revoked}: {client.why}"
                )
            if client.key not in ("", digest):
                raise SecurityRefusal(
                    f"the kit of {client.name} was used before, by another machine or folder",
                    fix="A kit works once. Ask for a new one; if nobody of yours used it, say so.",
                )
            certificate = authority.certify(client.name, csr_pem, serial)
            new = serial_of(certificate)
            expires = iso(certificate.not_valid_after_utc)
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
            lock = system.open_file(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            system.lock(lock, wait=True)
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


# ── the folder ────────────────────────────────────────────────────────────────────────────────


def folder_of(run_dir: Path) -> Path:
    """Where a run keeps its identity."""
    return run_dir / "identity"


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


def invite(run_dir: Path, name: str, output: Path, days: float = KIT_DAYS) -> Kit:
    """Write a join kit for a new client of a run.

    Raises:
        ConfigError: no server was started there yet, the name is taken, the file exists, ``days``
            is no time, or the run's authority is elsewhere.
    """
    check_days("--days", days)
    folder = folder_of(RunDir.open(run_dir).path)
    if output.exists():
        raise ConfigError(f"{output} exists already", fix="Choose another file for the kit.")
    address = load_address(folder)
    if AuthorityElsewhere.rules(folder):
        raise ConfigError(
            f"the authority of this run is elsewhere, and signs the certificate of {name[:80]!r}",
            fix="There: fedft ca sign, then fedft ca kit. Here: fedft invite with --certificate.",
        )
    kit = Registry(folder).invite(name, Authority(folder), address, days)
    kit.write(output)
    Audit(run_dir)("invited", name, f"until {kit.expires}")
    return kit


def take_in(run_dir: Path, name: str, certificate: Path) -> Client:
    """Register a client of a run whose authority is elsewhere, by its certificate.

    Raises:
        ConfigError: the run's authority is its own, or there is no such file.
        SecurityRefusal: the certificate is not one of that authority for this client.
    """
    folder = folder_of(RunDir.open(run_dir).path)
    if not AuthorityElsewhere.rules(folder):
        raise ConfigError(
            "this run is its own authority, and takes no certificates",
            fix="Leave --certificate away; or serve with --ca from the start.",
        )
    authority = AuthorityElsewhere(folder)
    client = Registry(folder).take_in(name, read_public(certificate), authority)
    Audit(run_dir)("taken in", name, f"until {client.expires}")
    return client


def revoke(run_dir: Path, name: str, why: str) -> None:
    """Shut a client of a run out for good."""
    Registry(folder_of(RunDir.open(run_dir).path)).revoke(name, why)
    Audit(run_dir)("revoked", name, why)


def _now() -> str:
    return iso(datetime.now(UTC))
