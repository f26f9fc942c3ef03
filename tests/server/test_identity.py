"""Who may take part: certificates, kits and the register, and what is refused with which reason."""

import asyncio
import contextlib
import json
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from fedft.clients.enrolment import Renewal
from fedft.clients.join import enrolled, join
from fedft.clients.session import Session
from fedft.clients.work import Connection, Offer, Timing
from fedft.clients.worker import Site as Workstation
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    IntegrityError,
    Interrupted,
    SecurityRefusal,
)
from fedft.core.link import link_pb2 as pb
from fedft.core.link import link_pb2_grpc
from fedft.core.link.secrets import (
    Credentials,
    Kit,
    key_pem,
    load_certificate,
    new_key,
    read_private,
    write_private,
)
from fedft.core.link.trust import near_the_end, tls_trouble
from fedft.core.types import Site
from fedft.server import authority
from fedft.server.grids.grpc import GrpcGrid
from fedft.server.grids.stream import Terms
from fedft.server.identity import (
    Address,
    Audit,
    Authority,
    Registry,
    invite,
    load_address,
    save_address,
    serial_of,
)

HASHES = {"base_model": "m", "tokenizer": "t", "data_schema": "d"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def request(key: Any, name: str = "ann") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "identity"


class TestAuthority:
    def test_it_is_made_once_and_for_its_owner_only(self, folder: Path) -> None:
        first = Authority(folder)
        assert Authority(folder).pem == first.pem
        first.server(Address())
        assert mode(folder) == 0o700
        for name in ("ca.key", "ca.pem", "server.key", "server.pem"):
            assert mode(folder / name) == 0o600

    def test_a_key_that_others_can_read_is_refused(self, folder: Path) -> None:
        """Row 61."""
        Authority(folder)
        (folder / "ca.key").chmod(0o644)
        with pytest.raises(SecurityRefusal, match="read or changed by other users") as refused:
            Authority(folder)
        assert refused.value.exit_code == 7
        (folder / "ca.key").chmod(0o600)
        Authority(folder)  # positive control

    def test_a_server_is_known_by_its_names(self, folder: Path) -> None:
        own = Authority(folder).server(Address("0.0.0.0", 1, "fl.example.org"))
        certificate = x509.load_pem_x509_certificate(own.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert "fl.example.org" in names.get_values_for_type(x509.DNSName)


class TestAddress:
    @pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
    def test_no_tls_beyond_loopback(self, host: str) -> None:
        """Row 57."""
        with pytest.raises(SecurityRefusal) as refused:
            Address(host, public="x", insecure=True)
        assert refused.value.exit_code == 7
        Address(host, public="x")

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
    def test_on_loopback_it_can_be_asked_for(self, host: str) -> None:
        assert Address(host, insecure=True).insecure

    def test_everywhere_is_no_address_for_a_kit(self) -> None:
        with pytest.raises(ConfigError, match="--public"):
            Address("0.0.0.0")
        assert Address("::", 5, "a.example").target == "a.example:5"
        assert Address("::1", 5).target == "[::1]:5"

    def test_it_is_remembered(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="no server was started"):
            load_address(folder)
        folder.mkdir()
        save_address(folder, Address("127.0.0.1", 4711))
        assert load_address(folder).port == 4711


class TestKit:
    @pytest.fixture
    def kit(self, folder: Path, tmp_path: Path) -> Path:
        Registry(folder).invite("ann", Authority(folder), Address(port=1)).write(tmp_path / "kit")
        return tmp_path / "kit"

    def test_it_is_one_private_file(self, kit: Path) -> None:
        assert mode(kit) == 0o600
        assert Kit.read(kit).name == "ann"

    def test_it_is_refused_where_others_can_read_it(self, kit: Path) -> None:
        """Row 61."""
        kit.chmod(0o640)
        with pytest.raises(SecurityRefusal, match="0640"):
            Kit.read(kit)

    def test_a_link_is_not_followed(self, kit: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(kit)
        with pytest.raises(SecurityRefusal):
            Kit.read(tmp_path / "link")

    @pytest.mark.parametrize("field", ["name", "ca", "certificate", "key"])
    def test_it_is_refused_once_tampered_with(self, kit: Path, tmp_path: Path, field: str) -> None:
        """Row 61."""
        other = tmp_path / "other"
        Registry(other).invite("eve", Authority(other), Address(port=1)).write(tmp_path / "kit2")
        mine, theirs = (json.loads(p.read_text()) for p in (kit, tmp_path / "kit2"))
        mine[field] = theirs[field]
        write_private(kit, json.dumps(mine).encode())
        with pytest.raises(SecurityRefusal):
            Kit.read(kit)

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"{}", b"[1]", b"\xff\xfe", b"[" * 10_000, b"x" * 70_000),
            b'{"format": "fedft-kit/1", "name": "ann", "server": "127.0.0.1:1", "ca": "\\ud800",'
            b' "certificate": "", "key": "", "expires": ""}',
        ],
    )
    def test_what_is_no_kit_is_said_to_be_none(self, tmp_path: Path, text: bytes) -> None:
        write_private(tmp_path / "kit", text)
        with pytest.raises(ConfigError, match="not a join kit"):
            Kit.read(tmp_path / "kit")

    def test_it_expires(self, folder: Path, tmp_path: Path) -> None:
        """Row 58."""
        kit = Registry(folder).invite("ann", Authority(folder), Address(port=1), days=-0.001)
        kit.write(tmp_path / "kit")
        with pytest.raises(SecurityRefusal, match="expired on"):
            enrolled(Kit.read(tmp_path / "kit"), tmp_path)
        assert not (tmp_path / "site.key").exists()

    def test_without_tls_it_leads_to_this_machine_only(self, tmp_path: Path) -> None:
        """Row 57, at the client."""
        Kit("ann", "example.org:1", "", "", "", "").write(tmp_path / "kit")
        with pytest.raises(SecurityRefusal, match="without TLS"):
            join(tmp_path / "kit", Workstation(tmp_path), folder=tmp_path / "site")


class TestRegistry:
    def test_names_are_plain(self, folder: Path) -> None:
        """Row 54."""
        for name in ("../x", "/abs", "a b", "", "x" * 200, "-rf"):
            with pytest.raises(SecurityRefusal):
                Registry(folder).invite(name, Authority(folder), Address())

    def test_a_kit_enrols_one_key(self, folder: Path) -> None:
        """Row 61: used twice."""
        authority, registry = Authority(folder), Registry(folder)
        kit = registry.invite("ann", authority, Address())
        serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
        key = new_key()
        first = registry.enrol(serial, request(key), authority)
        again = registry.enrol(serial, request(key), authority)  # the first answer was lost
        assert x509.load_pem_x509_certificate(first).subject == (
            x509.load_pem_x509_certificate(again).subject
        )
        with pytest.raises(SecurityRefusal, match="used before"):
            registry.enrol(serial, request(new_key()), authority)
        assert registry.client("ann").state == "enrolled"

    def test_the_name_is_that_of_the_kit_whatever_is_asked_for(self, folder: Path) -> None:
        authority, registry = Authority(folder), Registry(folder)
        kit = registry.invite("ann", authority, Address())
        serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
        pem = registry.enrol(serial, request(new_key(), "root"), authority)
        name = x509.load_pem_x509_certificate(pem).subject
        assert name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "ann"

    @pytest.mark.parametrize("csr", [b"", b"x", b"-----BEGIN CERTIFICATE REQUEST-----\n"])
    def test_a_request_that_is_none_is_refused(self, folder: Path, csr: bytes) -> None:
        with pytest.raises(SecurityRefusal):
            Registry(folder).enrol("0", csr, Authority(folder))

    def test_the_revoked_stay_out_until_they_are_invited_anew(self, folder: Path) -> None:
        authority, registry = Authority(folder), Registry(folder)
        kit = registry.invite("ann", authority, Address())
        serial = serial_of(x509.load_pem_x509_certificate(kit.certificate.encode()))
        registry.enrol(serial, request(new_key()), authority)
        with pytest.raises(ConfigError, match="fedft revoke ann"):
            registry.invite("ann", authority, Address())
        registry.revoke("ann", "lost")
        assert registry.client("ann").state == "revoked"
        with pytest.raises(SecurityRefusal, match="lost"):
            registry.enrol(serial, request(new_key()), authority)
        node = registry.client("ann").node
        registry.invite("ann", authority, Address())
        assert (registry.client("ann").state, registry.client("ann").node) == ("invited", node)

    def test_writers_do_not_undo_each_other(self, folder: Path) -> None:
        authority = Authority(folder)
        names = [f"site-{i}" for i in range(24)]

        def some(mine: list[str]) -> None:
            for name in mine:
                Registry(folder).invite(name, authority, Address())
                Registry(folder).joined(Site(name, 3, 4, 5.0), "")

        threads = [threading.Thread(target=some, args=(names[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clients = Registry(folder).clients()
        assert sorted(clients) == sorted(names)
        assert sorted(c.node for c in clients.values()) == list(range(1, 25))
        assert {c.state for c in clients.values()} == {"joined"}
        assert clients["site-7"].site == Site("site-7", 3, 4, 5.0)

    def test_damage_is_said(self, folder: Path) -> None:
        Authority(folder)
        write_private(folder / "clients.json", b"{")
        with pytest.raises(IntegrityError, match="damaged"):
            Registry(folder).clients()

    def test_private_reading_is_of_own_files(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError):
            read_private(tmp_path / "none")


class TestAudit:
    def test_a_hammering_client_does_not_fill_the_disk(self, tmp_path: Path) -> None:
        audit = Audit(tmp_path)
        for _ in range(1000):
            audit("refused", "eve", "no \x1b[31mway")
        audit("refused", "ann", "no way")
        text = (tmp_path / "audit.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["who"] for line in lines] == ["eve", "ann"]
        assert "\x1b" not in text  # row 46: escapes stay escaped


# ── over TLS ──────────────────────────────────────────────────────────────────────────────────


class Idle:
    """A worker that never gets work."""

    def load(self, run: str, task: str, hashes: Any) -> Offer:
        return Offer(5, None, None, hashes)

    def expected(self, plan: str, header: pb.Content) -> Any:
        return {}

    def work(self, ticket: Any, plan: str, content: Any) -> Any:
        raise AssertionError

    def judged(self, ticket: Any, *, counted: bool) -> None: ...


class Server:
    """A grid with TLS, its authority and its register."""

    def __init__(self, folder: Path, address: Address | None = None) -> None:
        self.folder = folder
        self.authority, self.registry = Authority(folder), Registry(folder)
        terms = Terms("run", "{}", HASHES, lambda message: {})
        address, audit = address or Address(), Audit(folder)
        self.grid = GrpcGrid(terms, address, self.registry, self.authority, audit)
        self.address = replace(address, port=self.grid.port)

    def kit(self, name: str, path: Path) -> Path:
        self.registry.invite(name, self.authority, self.address).write(path)
        return path

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.folder / "audit.jsonl").read_text().splitlines()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(name: str = "identity", address: Address | None = None) -> Server:
        made.append(Server(tmp_path / name, address))
        return made[-1]

    yield make
    for one in made:
        one.grid.close()


def attend(target: str, credentials: Credentials | None, **options: Any) -> str:
    timing = Timing(first_delay=0.05, longest_delay=0.1, give_up=3.0)
    return Session(Connection(target, "ann", credentials), Idle(), timing=timing, **options).run()


@pytest.mark.grpc
class TestOverTls:
    @pytest.fixture
    def site(self, tmp_path: Path) -> Path:
        (tmp_path / "site").mkdir()
        return tmp_path / "site"

    def test_a_kit_becomes_an_identity_of_the_sites_own(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        here = server()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        own = enrolled(kit, site)
        assert own.key != kit.key.encode() and mode(site / "site.key") == 0o600
        assert enrolled(kit, site) == own  # later joins do not need the kit's certificate
        asked = iter([False] * 10)
        with pytest.raises(Exception, match="stopped"):
            attend(here.address.target, own, stop=lambda: next(asked, True))
        events = [line["event"] for line in here.audit()]
        assert events[:2] == ["enrolled", "joined"]

    def test_the_kits_own_certificate_opens_no_session(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        here = server()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        enrolled(kit, site)
        with pytest.raises(SecurityRefusal, match="another certificate"):
            attend(here.address.target, kit.credentials)

    def test_a_kit_that_was_used_in_time_serves_for_ever(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """The kit lasts days and the site's own certificate a year: it may join again with both."""
        here = server()
        own = enrolled(Kit.read(here.kit("ann", tmp_path / "kit")), site)
        expired, _ = here.authority.kit("ann", here.address, days=-0.001)
        (tmp_path / "kit").unlink()
        expired.write(tmp_path / "kit")
        assert enrolled(Kit.read(tmp_path / "kit"), site) == own

    def test_a_certificate_is_renewed_in_time_and_the_old_one_is_void(
        self,
        server: Callable[..., Server],
        tmp_path: Path,
        site: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        here, told = server(), list[str]()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        monkeypatch.setattr(authority, "SITE_DAYS", 4 / 1440)  # of 14 minutes, 10 are in the past
        old = enrolled(kit, site, told.append)
        new = enrolled(kit, site, told.append)
        assert told == ["the certificate of this client was renewed"] * 2  # the first one at once
        assert new.key == old.key and new.certificate != old.certificate
        for own in (old, new, new):  # the answer could have been lost: both work, until the new did
            asked = iter([False] * 5)
            with pytest.raises(Interrupted):
                attend(here.address.target, own, stop=lambda asked=asked: next(asked, True))
        with pytest.raises(SecurityRefusal, match="another certificate"):
            attend(here.address.target, old)
        here.grid.close()
        assert enrolled(kit, site, told.append) == new  # a server that is away is no reason to stop
        assert "not renewed" in told[-1]

    def test_a_site_that_runs_for_long_comes_back_with_a_new_certificate(
        self,
        server: Callable[..., Server],
        tmp_path: Path,
        site: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Without being started again: the present one is due when its connection breaks."""
        here, told = server(), list[str]()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        with monkeypatch.context() as short:
            short.setattr(authority, "SITE_DAYS", 4 / 1440)
            own = enrolled(kit, site)
        now = [0.0]
        renewal = Renewal(kit, site, told.append, clock=lambda: now[0])
        session = Session(Connection("127.0.0.1:1", "ann", own), Idle(), renewal=renewal)
        asyncio.run(session._renew())
        new = session.connection.credentials
        assert new is not None and new.key == own.key and not new.due
        assert told == ["the certificate of this client was renewed"]
        asked = iter([False] * 5)
        with pytest.raises(Interrupted):
            attend(here.address.target, new, stop=lambda: next(asked, True))
        # One that stays due, as where an authority elsewhere signs, is not asked for all the time.
        calls: list[float] = []
        monkeypatch.setattr(
            "fedft.clients.enrolment.enrolled", lambda *_: calls.append(now[0]) or own
        )
        for now[0] in (3599.0, 3600.0, 3700.0, 7199.0, 7200.0):
            renewal()
        assert calls == [3600.0, 7200.0]

    def test_only_the_key_that_a_site_has_is_certified_anew(
        self, folder: Path, tmp_path: Path
    ) -> None:
        authority, registry = Authority(folder), Registry(folder)
        kit = registry.invite("ann", authority, Address(port=1))
        shown = load_certificate(kit.certificate.encode(), "")
        key = new_key()
        first = registry.enrol(serial_of(shown), request(key), authority)
        present = serial_of(load_certificate(first, ""))
        again = registry.enrol(present, request(key), authority)
        assert registry.client("ann").renewed == serial_of(load_certificate(again, ""))
        with pytest.raises(SecurityRefusal, match="used before"):
            registry.enrol(present, request(new_key()), authority)
        with pytest.raises(SecurityRefusal, match="not known"):
            registry.enrol("", request(key), authority)

    def test_a_second_machine_with_the_kit_is_refused_and_audited(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """Row 61."""
        here = server()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        enrolled(kit, site)
        (tmp_path / "thief").mkdir()
        with pytest.raises(SecurityRefusal, match="used before"):
            enrolled(kit, tmp_path / "thief")
        assert here.audit()[-1]["event"] == "refused"

    def test_a_revoked_site_is_refused_with_the_reason(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """Row 59."""
        here = server()
        own = enrolled(Kit.read(here.kit("ann", tmp_path / "kit")), site)
        here.registry.revoke("ann", "left the project")
        with pytest.raises(SecurityRefusal, match="left the project") as refused:
            attend(here.address.target, own)
        assert refused.value.exit_code == 7

    def test_a_server_of_another_authority_is_not_trusted(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """Row 58, unknown CA, seen from the client and, below, from the server."""
        here, other = server(), server("other")
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        with pytest.raises(SecurityRefusal, match="certificate"):
            enrolled(replace(kit, server=other.address.target), site)
        own = enrolled(kit, site)
        with pytest.raises(SecurityRefusal, match="certificate"):
            attend(other.address.target, own)
        stranger = Credentials(other.authority.pem, own.certificate, own.key)
        with pytest.raises(SecurityRefusal, match="turns this client's certificate away"):
            attend(other.address.target, stranger)
        assert tls_trouble(here.address.target, own) is None  # positive control

    def test_another_host_is_not_the_server(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """Row 58, wrong host: 127.0.0.2 reaches a server that is made out to 127.0.0.1."""
        here = server(address=Address("0.0.0.0", 0, "127.0.0.1"))
        own = enrolled(Kit.read(here.kit("ann", tmp_path / "kit")), site)
        with pytest.raises(SecurityRefusal, match=r"IP address mismatch"):
            attend(f"127.0.0.2:{here.grid.port}", own)

    def test_a_site_cannot_pose_as_the_server(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        here = server()
        own = enrolled(Kit.read(here.kit("ann", tmp_path / "kit")), site)
        import socket
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = tmp_path / "pair.pem"
        write_private(pair, own.certificate + own.key)
        context.load_cert_chain(pair)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            def pose() -> None:
                plain, _ = listener.accept()
                with plain, pytest.raises(ssl.SSLError):
                    context.wrap_socket(plain, server_side=True)

            thread = threading.Thread(target=pose)
            thread.start()
            trouble = tls_trouble(f"127.0.0.1:{port}", own)
            assert trouble is not None and trouble.certain and "purpose" in trouble.reason
            thread.join()

    @pytest.mark.parametrize(
        ("offset", "said"),
        [
            (timedelta(minutes=30), "is not valid before"),
            (-timedelta(minutes=45), "expired on"),
            (timedelta(), ""),
        ],
    )
    def test_a_server_whose_clock_differs_is_told_with_the_difference(
        self, offset: timedelta, said: str, folder: Path, tmp_path: Path
    ) -> None:
        """Its certificate begins or ended by another clock; the client says by how much."""
        import socket
        import ssl

        made = Authority(folder)
        own = made.server(Address())
        now, key = datetime.now(UTC) + offset, new_key()
        certificate = (
            x509.CertificateBuilder(
                made._certificate.subject, authority._name("x"), key.public_key(), 7
            )
            .not_valid_before(now - timedelta(seconds=10))
            .not_valid_after(now + timedelta(minutes=20))
            .add_extension(authority.alternatives(["127.0.0.1"]), critical=False)
            .sign(made._key, hashes.SHA256())
        )
        pair = tmp_path / "pair.pem"
        write_private(pair, certificate.public_bytes(serialization.Encoding.PEM) + key_pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        context.load_verify_locations(cadata=own.ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        client = new_key()
        shown = made.client("ann", client.public_key(), 1)
        credentials = Credentials(
            own.ca, shown.public_bytes(serialization.Encoding.PEM), key_pem(client)
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                for _ in range(2 if said else 1):
                    plain, _ = listener.accept()
                    with (
                        plain,
                        contextlib.suppress(OSError),
                        context.wrap_socket(plain, server_side=True) as tls,
                    ):
                        tls.sendall(b"h")

            thread = threading.Thread(target=answer)
            thread.start()
            trouble = tls_trouble(f"127.0.0.1:{listener.getsockname()[1]}", credentials)
            thread.join(20)
        if not said:
            assert trouble is None  # positive control
            return
        assert trouble is not None and trouble.certain and said in trouble.reason
        assert re.search(r"(29|24|25) min (by|ago by) this machine's clock", trouble.reason)

    def test_a_certificate_near_its_end_is_named_where_it_is_turned_away(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """A server does not say why; a clock that is ahead by minutes would be why."""
        here = server()
        enrolled(Kit.read(here.kit("ann", tmp_path / "kit")), site)
        key = new_key()
        for days, word in ((0.005, "; it expires in 7 min by this machine's clock"), (200, "")):
            pem = here.authority.client("ann", key.public_key(), days).public_bytes(
                serialization.Encoding.PEM
            )
            own = Credentials(here.authority.pem, pem, key_pem(key))
            later = datetime.now(UTC) + timedelta(hours=2 if days > 1 else 0)
            found = near_the_end(own, later)
            assert found.startswith(word) and bool(found) == bool(word)
        begun = near_the_end(own, datetime.now(UTC))
        assert begun.startswith("; it became valid 10 min ago by this machine's clock")

    def test_an_expired_site_certificate_is_refused(
        self, server: Callable[..., Server], tmp_path: Path, site: Path
    ) -> None:
        """Row 58: by the site itself before it calls, and by the server if it calls all the same."""
        here = server()
        kit = Kit.read(here.kit("ann", tmp_path / "kit"))
        enrolled(kit, site)
        key = new_key()
        old = here.authority.client("ann", key.public_key(), days=-0.001)
        pem = old.public_bytes(serialization.Encoding.PEM)
        write_private(site / "certificate.pem", pem)
        write_private(site / "site.key", key_pem(key))
        with pytest.raises(SecurityRefusal, match="expired on"):
            enrolled(kit, site)
        credentials = Credentials(kit.ca.encode(), pem, key_pem(key))
        with pytest.raises(SecurityRefusal, match="turns this client's certificate away"):
            attend(here.address.target, credentials)

    def test_plaintext_and_no_certificate_get_nowhere(
        self, server: Callable[..., Server], tmp_path: Path
    ) -> None:
        """Row 60."""
        here = server()
        with pytest.raises(EnvironmentFailure):
            attend(here.address.target, None)
        tls = grpc.ssl_channel_credentials(here.authority.pem)
        with grpc.secure_channel(here.address.target, tls) as channel:
            stub = link_pb2_grpc.FederationStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.Enrol(pb.EnrolRequest(csr=request(new_key())), timeout=5)


def test_the_commands_of_an_operator_load_no_torch(tmp_path: Path) -> None:
    from fedft.core.record.rundir import RunDir

    with RunDir.create(tmp_path / "run") as run:
        run.write_config("")
    Authority(tmp_path / "run" / "identity")
    save_address(tmp_path / "run" / "identity", Address(port=1))
    script = """
import sys
from fedft.cli import cli
for line in ("invite ann -o kit", "clients", "revoke ann"):
    cli([*line.split(), "--run-dir", "run"], standalone_mode=False)
print(sorted({"torch", "transformers", "grpc", "flwr", "ray", "datasets"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_invite_writes_no_kit_over_another_file(tmp_path: Path) -> None:
    from fedft.core.record.rundir import RunDir

    with RunDir.create(tmp_path / "run") as run:
        run.write_config("")
    Authority(tmp_path / "run" / "identity")
    save_address(tmp_path / "run" / "identity", Address(port=1))
    invite(tmp_path / "run", "ann", tmp_path / "kit")
    with pytest.raises(ConfigError, match="exists already"):
        invite(tmp_path / "run", "bob", tmp_path / "kit")
