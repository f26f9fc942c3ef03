"""A server whose certificate authority lives on another machine.

In ``<run directory>/identity``:

    authority.pem            certificate of the authority; its key is not here
    server.key, server.pem   the server's own; the certificate was signed elsewhere
    server.csr               the request for it, made anew at every start
    requests/                ``NAME.csr``: clients' renewals that wait to be signed
    signed/                  clients' certificates that ``fedft invite --certificate`` took in

Whoever takes over such a server can cut clients off and lie about sums. He cannot make up a client
that others would take for one, nor a server of another name.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedft.core.errors import ConfigError, EnvironmentFailure, SecurityRefusal
from fedft.core.link.secrets import (
    Credentials,
    check_issued,
    check_time,
    common_name,
    key_digest,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    read_private,
    read_public,
    write_private,
)
from fedft.core.record.rundir import child
from fedft.server.authority import (
    SERVER_NAME,
    Address,
    Authority,
    Issuer,
    alternatives,
    make_private_folder,
    requested_key,
    serial_of,
)

_AUTHORITY = "authority.pem"


class AuthorityElsewhere:
    """What a server knows of an authority that it cannot sign for.

    Args:
        folder: of the server's identity, see the module.

    Raises:
        SecurityRefusal: the authority's certificate is damaged or not valid now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pem = read_private(folder / _AUTHORITY)
        check_time(load_certificate(self.pem, _AUTHORITY), str(folder / _AUTHORITY))

    @staticmethod
    def rules(folder: Path) -> bool:
        """Whether the identity in this folder rests on an authority elsewhere."""
        return (folder / _AUTHORITY).exists()

    @classmethod
    def settled(cls, folder: Path, ca: Path) -> "AuthorityElsewhere":
        """That of a folder, which is bound to it here if it is not yet.

        Args:
            folder: of the server's identity.
            ca: certificate of the authority.

        Raises:
            ConfigError: the folder is bound to another authority, or there is no such file.
            SecurityRefusal: the file is not the certificate of an authority.
        """
        pem = read_public(ca)
        certificate = load_certificate(pem, str(ca))
        if not is_authority(certificate):
            raise SecurityRefusal(f"{ca} is not the certificate of an authority")
        if (folder / "ca.key").exists():
            raise ConfigError(
                f"{folder} holds the key of an authority of its own, and --ca names another place",
                fix=f"Move {folder}/ca.key and ca.pem to a folder elsewhere, and give its ca.pem.",
            )
        if not cls.rules(folder):
            make_private_folder(folder)
            write_private(folder / _AUTHORITY, pem)
        own = cls(folder)
        if load_certificate(own.pem, _AUTHORITY) != certificate:
            raise ConfigError(
                f"{folder} is bound to another authority than {ca}",
                fix="Give the certificate that this run was first served with, or start a new run.",
            )
        return own

    # the server's own

    def server(self, address: Address) -> Credentials:
        """Credentials of the server.

        Raises:
            EnvironmentFailure: its certificate was not signed yet, or is for other names or another
                key; the request lies ready.
            SecurityRefusal: it is of another authority, or not valid now.
        """
        key = self._server_key()
        path = self.folder / "server.pem"
        if not path.exists():
            raise self._wanted(address, f"{path} is not there yet")
        credentials = Credentials(self.pem, read_public(path), key)
        certificate = load_certificate(credentials.certificate, str(path))
        if key_digest(certificate.public_key()) != key_digest(load_key(key, "server.key")):
            raise self._wanted(address, f"{path} is for another key than server.key")
        if missing := address.names - names_of(certificate):
            raise self._wanted(address, f"{path} is not made out to {', '.join(sorted(missing))}")
        request = self._request(address)
        how = f"Have {request} signed again (fedft ca sign), and put the certificate there."
        credentials.checked(str(path), fix=how)
        if not usable_for(certificate, ExtendedKeyUsageOID.SERVER_AUTH):
            raise SecurityRefusal(f"{path} is not the certificate of a server", fix=how)
        return credentials

    def word(self, address: Address) -> str:
        """What the operator should know; empty where all is well."""
        if not self.server(address).due:
            return ""
        return (
            "less than a third of the time of this server's certificate is left: have "
            f"{self.folder}/server.csr signed, replace {self.folder}/server.pem, restart"
        )

    def _server_key(self) -> bytes:
        path = self.folder / "server.key"
        if not path.exists():
            write_private(path, key_pem(new_key()))
        return read_private(path)

    def _request(self, address: Address) -> Path:
        key = load_key(self._server_key(), "server.key")
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]))
            .add_extension(alternatives(address.names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(key, hashes.SHA256())
        )
        path = self.folder / "server.csr"
        write_private(path, csr.public_bytes(serialization.Encoding.PEM))
        return path

    def _wanted(self, address: Address, why: str) -> EnvironmentFailure:
        request = self._request(address)
        return EnvironmentFailure(
            f"this server has no certificate to show: {why}",
            fix=f"Where the authority is: fedft ca sign CA {request.name} --server. Put what it "
            f"writes at {self.folder / 'server.pem'}, and start again with the same --run-dir. "
            f"The request is {request}",
        )

    # the clients'

    def accepted(self, name: str, pem: bytes) -> x509.Certificate:
        """A client's certificate, after a look at who signed it for whom and until when.

        Raises:
            SecurityRefusal: it is not this authority's, or for somebody else, or not valid now.
        """
        where = f"the certificate of {name}"
        certificate = load_certificate(pem, where)
        check_issued(certificate, load_certificate(self.pem, _AUTHORITY), where)
        check_time(certificate, where)
        if common_name(certificate) != name:
            raise SecurityRefusal(f"{where} is made out to {common_name(certificate)[:80]!r}")
        if not usable_for(certificate, ExtendedKeyUsageOID.CLIENT_AUTH):
            raise SecurityRefusal(f"{where} is not one of a client")
        return certificate

    def keep(self, name: str, pem: bytes) -> None:
        """Store a client's certificate, for the client to fetch, and drop its request."""
        folder = self.folder / "signed"
        make_private_folder(folder)
        write_private(child(folder, f"{name}.pem"), pem)
        child(self.folder / "requests", f"{name}.csr").unlink(missing_ok=True)

    def certify(self, name: str, csr_pem: bytes, shown: str) -> x509.Certificate:
        """What was signed elsewhere since; else the request is put where it waits."""
        path = child(self.folder / "signed", f"{name}.pem")
        if path.exists():
            certificate = load_certificate(read_private(path), str(path))
            same_key = key_digest(certificate.public_key()) == key_digest(requested_key(csr_pem))
            if same_key and serial_of(certificate) != shown:
                return certificate
        self._waiting(name, csr_pem)
        raise SecurityRefusal(
            f"the authority of this run is elsewhere, and the request of {name} waits there to be "
            "signed",
            fix=f"Where the authority is: fedft ca sign CA {name}.csr. At the server: "
            f"fedft invite {name} --certificate {name}.pem",
        )

    def _waiting(self, name: str, csr_pem: bytes) -> None:
        folder = self.folder / "requests"
        make_private_folder(folder)
        write_private(child(folder, f"{name}.csr"), csr_pem)


def issuer_of(folder: Path, ca: Path | None) -> Issuer:
    """The authority of an identity: elsewhere where ``ca`` or the folder says so, else its own.

    Raises:
        ConfigError: the two disagree.
    """
    if ca is not None:
        return AuthorityElsewhere.settled(folder, ca)
    return AuthorityElsewhere(folder) if AuthorityElsewhere.rules(folder) else Authority(folder)


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may sign others."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return found.value.ca


def usable_for(certificate: x509.Certificate, usage: x509.ObjectIdentifier) -> bool:
    """Whether a certificate is for one side of a connection."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return usage in found.value


def names_of(holder: x509.Certificate | x509.CertificateSigningRequest) -> frozenset[str]:
    """Names and addresses that a server's certificate, or a request for one, is made out to."""
    try:
        found = holder.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    addresses = found.value.get_values_for_type(x509.IPAddress)
    return frozenset([*found.value.get_values_for_type(x509.DNSName), *map(str, addresses)])
