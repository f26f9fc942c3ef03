"""A workstation's part: ``fedft join KIT --data FILE``.

The site has a folder of its own, which holds its key, its certificate and the parts of its adapter
that never leave it. What the server sends are numbers and a description of the task; the code that
runs is what is installed here, and the data are the file that was named here.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedft.clients.agreed import Agreement
from fedft.clients.checking import Looked
from fedft.clients.enrolment import Renewal, enrolled, pinned
from fedft.clients.kept import KeptParts
from fedft.clients.ledger import default_folder as default_ledgers
from fedft.clients.ledger import usable
from fedft.clients.request import folder_of_key
from fedft.clients.session import Session
from fedft.clients.work import Connection, Timing
from fedft.clients.worker import AGREED, Resident, Site
from fedft.core import system
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    SecurityRefusal,
)
from fedft.core.files import disk
from fedft.core.link.secrets import (
    Kit,
    is_loopback,
    key_digest,
    load_certificate,
)
from fedft.core.record.rundir import child

logger = logging.getLogger(__name__)


def join(
    kit_path: Path,
    site: Site,
    *,
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    timing: Timing | None = None,
    check: bool = False,
) -> str:
    """Take part in a run until it is over.

    Args:
        kit_path: as the server's owner sent it.
        site: what this machine brings.
        folder: of the site; None takes one under the user's data folder.
        tell: takes lines for whoever watches.
        stop: says whether to leave.
        timing: patience.
        check: tell what would be trained, and join nothing. The server is asked for the task only
            where this site has not joined before.

    Returns:
        The server's last word.

    Raises:
        SecurityRefusal: kit or key are not private, expired, used elsewhere or not of this server.
        MismatchError: version, model or data are not the run's.
    """
    if not site.data.exists():
        raise ConfigError(f"there are no data at {site.data}", fix="Check --data.")
    kit = Kit.read(kit_path)
    if kit.insecure and not is_loopback(kit.server.rpartition(":")[0]):
        raise SecurityRefusal(
            f"{kit_path} is for a server without TLS on another machine, {kit.server}",
            fix="Ask for a kit of a server with TLS.",
        )
    usable(site.ledger or default_ledgers())
    folder = folder or default_folder(kit)
    with _occupied(folder):
        agreed = Agreement(None if kit.insecure else folder / AGREED)
        worker = Resident(kit.name, site, KeptParts(folder / "kept"), tell, agreed, check)
        if check and (known := agreed.task()) is not None:
            return worker.looked(*known)
        credentials = None if kit.insecure else enrolled(kit, folder, tell)
        if (roster := pinned(kit, credentials)) is not None:
            tell(f"the kit pins the keys of {len(roster.keys)} clients")
        session = Session(
            Connection(kit.server, kit.name, credentials),
            worker,
            tell=tell,
            stop=stop,
            timing=timing or Timing(),
            renewal=Renewal(kit, folder, tell),
            send_details=site.send_details,
        )
        try:
            return session.run()
        except Looked as end:
            return end.what


def default_folder(kit: Kit) -> Path:
    """Where a site lives: one folder a kit, or a key that was drawn before."""
    if kit.certificate and not kit.key:
        certificate = load_certificate(kit.certificate.encode(), "the kit")
        return folder_of_key(kit.name, key_digest(certificate.public_key()))
    mark = hashlib.sha256((kit.certificate or kit.server).encode()).hexdigest()[:8]
    return child(system.data_home() / "fedft" / "sites", f"{kit.name}-{mark}")


@contextmanager
def _occupied(folder: Path) -> Iterator[None]:
    """Hold a site's folder for this process."""
    with disk(f"create {folder}"):
        system.private_folder(folder)
        lock = system.open_file(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        system.lock(lock, wait=False)
    except BlockingIOError:
        raise EnvironmentFailure(
            f"another `fedft join` is running for this client ({folder})", fix="Stop it first."
        ) from None
    else:
        yield
    finally:
        os.close(lock)


# ── the work ──────────────────────────────────────────────────────────────────────────────────
