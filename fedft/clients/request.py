"""A workstation's own key, and the request to certify it: ``fedft ca request NAME``.

The key is drawn here and never leaves. The request is public; so is the certificate that answers
it, which comes back inside a kit.
"""

from dataclasses import dataclass
from pathlib import Path

from fedft.core import system
from fedft.core.errors import ConfigError
from fedft.core.files import disk, write_file
from fedft.core.link.secrets import (
    Credentials,
    Kit,
    key_digest,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    read_private,
    request_pem,
    write_private,
)
from fedft.core.record.rundir import child


@dataclass(frozen=True)
class Request:
    """A request that was written.

    Attributes:
        path: of the file to send.
        folder: of the site, with the key.
        fingerprint: of the key; to be told by another way than the file goes.
    """

    path: Path
    folder: Path
    fingerprint: str


def request(name: str, output: Path, folder: Path | None = None) -> Request:
    """Draw a key, if there is none yet, and write the request to certify it.

    Args:
        name: of the client.
        output: file to write.
        folder: of the site; None takes one under the user's data folder.

    Raises:
        SecurityRefusal: the name is not plain.
        ConfigError: the file exists.
    """
    child(Path(), name)
    if output.exists():
        raise ConfigError(f"{output} exists already", fix="Choose another file for the request.")
    key = new_key()
    folder = folder or folder_of_key(name, key_digest(key))
    with disk(f"create {folder}"):
        system.private_folder(folder)
    path = folder / "site.key"
    if path.exists():
        key = load_key(read_private(path), str(path))
    else:
        write_private(path, key_pem(key))
    write_file(output, request_pem(name, key))
    return Request(output, folder, key_digest(key))


def folder_of_key(name: str, digest: str) -> Path:
    """Where a site lives that drew its key before it had a kit."""
    return child(system.data_home() / "fedft" / "sites", f"{name}-{digest[:8]}")


def adopt(kit: Kit, folder: Path) -> None:
    """Take the certificate of this site's own key from its kit, if it is newer than what is here.

    Raises:
        ConfigError: the key is not in this folder.
        SecurityRefusal: the certificate is of another key.
    """
    path = folder / "site.key"
    if not path.exists():
        raise ConfigError(
            f"the kit of {kit.name} is for a key that was drawn before, and it is not in {folder}",
            fix="Name the folder that `fedft ca request` printed: --site-dir.",
        )
    if (folder / "ca.pem").exists() and read_private(folder / "ca.pem") != kit.ca.encode():
        return  # which is said where the two are compared
    brought = Credentials(kit.ca.encode(), kit.certificate.encode(), read_private(path))
    brought.matching(f"the kit and the key in {folder}")
    present = folder / "certificate.pem"
    if present.exists() and _ends(read_private(present)) >= _ends(brought.certificate):
        return
    write_private(folder / "ca.pem", brought.ca)
    write_private(present, brought.certificate)


def _ends(pem: bytes) -> float:
    return load_certificate(pem, "a certificate of this client").not_valid_after_utc.timestamp()


def prepare(kit: Kit, folder: Path) -> Path:
    """Write the request for a certificate that lasts longer; the key stays the same."""
    path = folder / f"{kit.name}.csr"
    key = load_key(read_private(folder / "site.key"), str(folder))
    write_file(path, request_pem(kit.name, key))
    return path


def signed_again(kit: Kit, path: Path) -> str:
    """What to do about a certificate that an authority elsewhere signed and that ends."""
    return (
        f"Send {path} to whoever keeps the authority (fedft ca sign, fedft ca kit), and join with "
        f"the new kit of {kit.name}."
    )
