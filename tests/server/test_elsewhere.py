"""An authority that is not the server: what the server can sign, what it cannot, and who gets in."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.superlink import free_port
from fedft.clients.join import default_folder, enrolled, pinned
from fedft.clients.request import request
from fedft.core.errors import ConfigError, EnvironmentFailure, FedftError, SecurityRefusal
from fedft.core.link.roster import Roster
from fedft.core.link.secrets import (
    Kit,
    certificate_pem,
    check_time,
    key_digest,
    load_certificate,
    new_key,
    read_private,
    request_pem,
    write_private,
)
from fedft.core.record.rundir import RunDir
from fedft.server import ca, identity
from fedft.server.authority import Address, Authority, _builder, _name
from fedft.server.config_file import parse_config
from fedft.server.elsewhere import AuthorityElsewhere, issuer_of

ADDRESS = Address("127.0.0.1", 8470, "lab.example")


@dataclass
class Place:
    """An authority in one folder, a run in another, and a client's in a third."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def identity(self) -> Path:
        return self.run / "identity"

    def begin(self) -> AuthorityElsewhere:
        """A run that a server with a certificate was started on."""
        with RunDir.create(self.run) as run:
            run.write_config("")
        own = AuthorityElsewhere.settled(self.identity, ca.init(self.ca))
        with pytest.raises(EnvironmentFailure):
            own.server(ADDRESS)
        signed = ca.sign(self.ca, self.identity / "server.csr", server=True)
        (self.identity / "server.pem").write_bytes(signed.path.read_bytes())
        identity.save_address(self.identity, ADDRESS)
        return own

    def signed(self, name: str, **options: Any) -> Path:
        """A client's key in a folder of its name, and the certificate of it."""
        csr = self.folder / f"{name}.csr"
        csr.unlink(missing_ok=True)
        request(name, csr, self.folder / name)
        return ca.sign(self.ca, csr, **options).path

    def kit(self, name: str, roster: Path | None = None) -> Kit:
        output = self.folder / f"{name}.kit"
        output.unlink(missing_ok=True)
        ca.kit(self.ca, name, "127.0.0.1:1", output, roster)
        return Kit.read(output)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def keys_in(folder: Path) -> list[ec.EllipticCurvePrivateKey]:
    """Every private key in a folder, in whatever file it is."""
    found: list[ec.EllipticCurvePrivateKey] = []
    for path in folder.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        if b"PRIVATE KEY" in text:
            key = serialization.load_pem_private_key(text[text.index(b"-----BEGIN") :], None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            found.append(key)
    return found


class TestAServerWithoutTheKey:
    def test_it_holds_no_key_of_the_authority(self, place: Place) -> None:
        own = place.begin()
        own.server(ADDRESS)
        identity.take_in(place.run, "ann", place.signed("ann"))
        authority = key_digest(load_certificate(own.pem, "ca").public_key())
        held = {key_digest(key) for key in keys_in(place.run)}
        assert len(held) == 1 and authority not in held
        assert authority in {key_digest(key) for key in keys_in(place.ca)}  # positive control
        assert not (place.identity / "ca.key").exists()

    def test_a_server_with_its_own_authority_does(self, tmp_path: Path) -> None:
        """Positive control."""
        own = Authority(tmp_path / "identity")
        authority = key_digest(load_certificate(own.pem, "ca").public_key())
        assert authority in {key_digest(key) for key in keys_in(tmp_path)}

    def test_what_it_signs_with_its_own_key_is_worth_nothing(self, place: Place) -> None:
        own = place.begin()
        [key] = keys_in(place.run)
        shown = load_certificate((place.identity / "server.pem").read_bytes(), "server.pem")
        for issuer in (shown.subject, load_certificate(own.pem, "ca").subject):
            forged = _builder(_name("mallory"), issuer, new_key().public_key(), timedelta(1))
            pem = certificate_pem(forged.sign(key, hashes.SHA256()))
            with pytest.raises(SecurityRefusal, match="was not issued by"):
                identity.Registry(place.identity).take_in("mallory", pem, own)
        identity.take_in(place.run, "ann", place.signed("ann"))  # positive control

    def test_it_enrols_no_strangers(self, place: Place) -> None:
        own, registry = place.begin(), identity.Registry(place.identity)
        csr = request_pem("mallory", new_key())
        for serial in ("", "1f"):
            with pytest.raises(SecurityRefusal, match="not known here"):
                registry.enrol(serial, csr, own)
        with pytest.raises(ConfigError, match="elsewhere"):
            identity.invite(place.run, "mallory", place.folder / "mallory.kit")
        other = Place(place.folder / "other")
        other.folder.mkdir()
        ca.init(other.ca)
        with pytest.raises(SecurityRefusal, match="was not issued by"):
            identity.take_in(place.run, "mallory", other.signed("mallory"))
        assert registry.clients() == {}

    def test_a_certificate_of_somebody_else_or_of_a_server_is_not_a_clients(
        self, place: Place
    ) -> None:
        place.begin()
        with pytest.raises(SecurityRefusal, match="made out to 'ann'"):
            identity.take_in(place.run, "bob", place.signed("ann"))
        host = place.ca / "servers" / "lab.example.pem"
        with pytest.raises(SecurityRefusal, match="made out to"):
            identity.take_in(place.run, "lab.example", host)
        with pytest.raises(SecurityRefusal):
            identity.take_in(place.run, "fedft server", host)

    def test_a_client_that_passes_for_a_server_is_refused(self, place: Place) -> None:
        place.begin()
        ann = place.signed("ann")
        key = read_private(place.folder / "ann" / "site.key")
        write_private(place.identity / "server.key", key)
        (place.identity / "server.pem").write_bytes(ann.read_bytes())
        with pytest.raises(EnvironmentFailure, match="not made out to"):
            issuer_of(place.identity, None).server(ADDRESS)

    def test_the_request_is_made_again_where_the_names_have_changed(self, place: Place) -> None:
        own = place.begin()
        assert own.word(ADDRESS) == ""
        with pytest.raises(EnvironmentFailure, match=r"not made out to new\.example") as told:
            own.server(replace(ADDRESS, public="new.example"))
        assert "fedft ca sign" in told.value.fix and told.value.exit_code == 3
        signed = ca.sign(place.ca, place.identity / "server.csr", server=True)
        assert "new.example" in signed.who

    def test_a_server_certificate_that_ends_soon_is_told(self, place: Place) -> None:
        own = place.begin()
        signed = ca.sign(place.ca, place.identity / "server.csr", server=True, days=0.002)
        (place.identity / "server.pem").write_bytes(signed.path.read_bytes())
        assert "less than a third" in own.word(ADDRESS)

    def test_an_authority_is_for_good(self, place: Place) -> None:
        place.begin()
        other = ca.init(place.folder / "other")
        with pytest.raises(ConfigError, match="bound to another authority"):
            issuer_of(place.identity, other)
        with pytest.raises(SecurityRefusal, match="not the certificate of an authority"):
            AuthorityElsewhere.settled(place.folder / "new", place.identity / "server.pem")
        issuer_of(place.identity, place.ca / "ca.pem")  # positive control

    def test_the_key_can_be_moved_away_from_a_run_that_had_it(self, place: Place) -> None:
        """Certificates that were signed at the server go on working."""
        with RunDir.create(place.run) as run:
            run.write_config("")
        before = Authority(place.identity)
        credentials = before.server(ADDRESS)
        with pytest.raises(ConfigError, match="holds the key of an authority"):
            issuer_of(place.identity, place.identity / "ca.pem")
        place.ca.mkdir(mode=0o700)
        for name in ("ca.key", "ca.pem"):
            (place.identity / name).rename(place.ca / name)
        own = issuer_of(place.identity, place.ca / "ca.pem")
        assert isinstance(own, AuthorityElsewhere)
        assert own.server(ADDRESS).certificate == credentials.certificate
        identity.take_in(place.run, "ann", place.signed("ann"))

    def test_a_kit_from_before_the_key_was_moved_is_still_exchanged(self, place: Place) -> None:
        """The request waits, as a renewal does."""
        with RunDir.create(place.run) as run:
            run.write_config("")
        registry = identity.Registry(place.identity)
        kit = registry.invite("ann", Authority(place.identity), ADDRESS)
        place.ca.mkdir(mode=0o700)
        for name in ("ca.key", "ca.pem"):
            (place.identity / name).rename(place.ca / name)
        own = issuer_of(place.identity, place.ca / "ca.pem")
        shown = f"{load_certificate(kit.certificate.encode(), 'kit').serial_number:x}"
        csr = request_pem("ann", new_key())
        with pytest.raises(SecurityRefusal, match="waits there to be signed"):
            registry.enrol(shown, csr, own)
        waiting = place.identity / "requests" / "ann.csr"
        identity.take_in(place.run, "ann", ca.sign(place.ca, waiting).path)
        with pytest.raises(SecurityRefusal, match="used before"):
            registry.enrol(shown, request_pem("ann", new_key()), own)
        pem = registry.enrol(shown, csr, own)
        assert registry.client("ann").serial == f"{load_certificate(pem, 'own').serial_number:x}"


class TestRenewal:
    def test_a_request_waits_until_it_is_signed_and_is_then_handed_out(self, place: Place) -> None:
        own, registry = place.begin(), identity.Registry(place.identity)
        client = identity.take_in(place.run, "ann", place.signed("ann", days=0.002))
        key = keys_in(place.folder / "ann")[0]
        csr = request_pem("ann", key)
        for _ in range(2):
            with pytest.raises(SecurityRefusal, match="waits there to be signed"):
                registry.enrol(client.serial, csr, own)
        waiting = place.identity / "requests" / "ann.csr"
        assert waiting.read_bytes() == csr
        identity.take_in(place.run, "ann", ca.sign(place.ca, waiting).path)
        assert not waiting.exists()
        renewed = load_certificate(registry.enrol(client.serial, csr, own), "renewed")
        now = registry.client("ann")
        assert now.serial == client.serial and now.renewed == f"{renewed.serial_number:x}"
        assert renewed.not_valid_after_utc > datetime.now(UTC) + timedelta(days=300)
        # Due again: the one that it has by now is not what it asks for.
        with pytest.raises(SecurityRefusal, match="waits there"):
            registry.enrol(now.renewed, csr, own)

    def test_it_is_the_same_key_or_none(self, place: Place) -> None:
        own, registry = place.begin(), identity.Registry(place.identity)
        client = identity.take_in(place.run, "ann", place.signed("ann"))
        with pytest.raises(SecurityRefusal, match="used before"):
            registry.enrol(client.serial, request_pem("ann", new_key()), own)
        assert not (place.identity / "requests" / "ann.csr").exists()

    def test_a_long_request_is_not_kept(self, place: Place) -> None:
        own, registry = place.begin(), identity.Registry(place.identity)
        client = identity.take_in(place.run, "ann", place.signed("ann"))
        with pytest.raises(SecurityRefusal, match="8192 are allowed"):
            registry.enrol(client.serial, b"x" * 10_000, own)

    def test_the_revoked_come_back_with_a_new_key_only(self, place: Place) -> None:
        place.begin()
        identity.take_in(place.run, "ann", first := place.signed("ann"))
        identity.revoke(place.run, "ann", "laptop lost")
        for pem in (first, place.signed("ann")):  # the same key, certified anew
            with pytest.raises(SecurityRefusal, match="laptop lost"):
                identity.take_in(place.run, "ann", pem)
        key = place.folder / "ann" / "site.key"
        key.rename(key.with_name("stolen.key"))
        with pytest.raises(ConfigError, match="--replace"):
            place.signed("ann")
        again = identity.take_in(place.run, "ann", place.signed("ann", replace=True))
        assert (again.state, again.node) == ("enrolled", 1)

    def test_a_new_kit_brings_a_longer_certificate(self, place: Place) -> None:
        place.begin()
        place.signed("ann", days=100)
        first = enrolled(place.kit("ann"), place.folder / "ann")
        place.signed("ann", days=300)
        second = enrolled(place.kit("ann"), place.folder / "ann")
        assert first.key == second.key and first.certificate != second.certificate

    def test_one_that_has_expired_leaves_a_request(self, place: Place) -> None:
        place.begin()
        place.signed("ann")
        kit, folder = place.kit("ann"), place.folder / "ann"
        enrolled(kit, folder)
        old = Authority(place.ca).client("ann", keys_in(folder)[0].public_key(), days=-0.005)
        pem = certificate_pem(old)
        write_private(folder / "certificate.pem", pem)
        with pytest.raises(SecurityRefusal, match="7 min ago") as told:
            enrolled(replace(kit, certificate=pem.decode()), folder)
        assert str(folder / "ann.csr") in told.value.fix and "clock" in told.value.fix
        assert ca.sign(place.ca, folder / "ann.csr").who == "ann"


class TestTheAuthority:
    def test_a_clients_request_never_becomes_a_servers_certificate(self, place: Place) -> None:
        place.begin()
        csr = place.folder / "x.csr"
        csr.write_bytes(request_pem("ann", new_key()))
        with pytest.raises(SecurityRefusal, match="not the request of a server"):
            ca.sign(place.ca, csr, server=True)
        with pytest.raises(SecurityRefusal, match="asks for the certificate of a server"):
            ca.sign(place.ca, place.identity / "server.csr")

    @pytest.mark.parametrize("name", ["../x", "a b", "fedft server", "x" * 60 + "/y"])
    def test_names_are_plain(self, name: str, place: Place) -> None:
        ca.init(place.ca)
        csr = place.folder / "x.csr"
        csr.write_bytes(request_pem(name, new_key()))
        with pytest.raises(SecurityRefusal):
            ca.sign(place.ca, csr)
        with pytest.raises(SecurityRefusal):
            request(name, place.folder / "y.csr", place.folder / "site")

    def test_another_key_is_not_signed_unawares(self, place: Place) -> None:
        ca.init(place.ca)
        made = request("ann", place.folder / "ann.csr", place.folder / "ann")
        for wrong in ("00" * 32, made.fingerprint[:15], "", made.fingerprint[::-1]):
            with pytest.raises(SecurityRefusal, match="is for the key"):
                ca.sign(place.ca, made.path, fingerprint=wrong)
        grouped = " ".join(made.fingerprint[i : i + 4] for i in range(0, 64, 4))
        assert ca.sign(place.ca, made.path, fingerprint=f"SHA256: {grouped.upper()}").who == "ann"

    @pytest.mark.parametrize("days", [float("nan"), float("inf"), 0.0, -3.0, 1e9])
    def test_days_are_days(self, days: float, place: Place) -> None:
        place.begin()
        with pytest.raises(ConfigError, match="no time in days"):
            place.signed("ann", days=days)

    def test_nothing_is_written_over(self, place: Place) -> None:
        ca.init(place.ca)
        with pytest.raises(ConfigError, match="not empty"):
            ca.init(place.ca)
        place.signed("ann")
        (place.folder / "there").write_text("")
        with pytest.raises(ConfigError, match="exists already"):
            ca.roster(place.ca, [], place.folder / "there")
        with pytest.raises(ConfigError, match="exists already"):
            ca.kit(place.ca, "ann", "h:1", place.folder / "there")
        with pytest.raises(ConfigError, match="exists already"):
            request("ann", place.folder / "there", place.folder / "ann")

    @pytest.mark.parametrize("server", ["lab", "lab:0", "lab:99999", "a b:1", "http://lab:1", ":1"])
    def test_an_address_is_one(self, server: str, place: Place) -> None:
        ca.init(place.ca)
        place.signed("ann")
        with pytest.raises(ConfigError, match="no address"):
            ca.kit(place.ca, "ann", server, place.folder / "ann.kit")
        ca.kit(place.ca, "ann", "[::1]:8470", place.folder / "ann.kit")

    def test_a_folder_that_is_none_is_not_made_one(self, place: Place) -> None:
        place.folder.joinpath("x.csr").write_bytes(request_pem("ann", new_key()))
        with pytest.raises(ConfigError, match="not the folder of an authority"):
            ca.sign(place.ca, place.folder / "x.csr")
        assert not place.ca.exists()

    @pytest.mark.parametrize("text", [b"", b"x", b"\xff" * 100, b"y" * (1 << 21)])
    def test_what_is_no_request_is_refused_in_a_sentence(self, text: bytes, place: Place) -> None:
        ca.init(place.ca)
        (place.folder / "x.csr").write_bytes(text)
        with pytest.raises(FedftError):
            ca.sign(place.ca, place.folder / "x.csr")
        with pytest.raises(ConfigError):
            ca.sign(place.ca, place.folder)  # a folder


class TestRoster:
    @pytest.fixture
    def roster(self, place: Place) -> Path:
        ca.init(place.ca)
        for name in ("ann", "bob"):
            place.signed(name)
        ca.roster(place.ca, [], place.folder / "roster.json")
        return place.folder / "roster.json"

    def test_a_kit_pins_the_keys_of_all(self, place: Place, roster: Path) -> None:
        kit = place.kit("ann", roster)
        found = pinned(kit, enrolled(kit, place.folder / "ann"))
        assert found is not None and set(found.keys) == {"ann", "bob"}
        for name in ("ann", "bob"):
            found.check(name, keys_in(place.folder / name)[0].public_key())
        with pytest.raises(SecurityRefusal, match="has the key"):
            found.check("bob", keys_in(place.folder / "ann")[0])
        with pytest.raises(SecurityRefusal, match="no such client"):
            found.check("eve", new_key())

    def test_two_thousand_clients_fit_and_more_are_refused(
        self, place: Place, roster: Path
    ) -> None:
        authority, kit = Authority(place.ca), place.kit("ann")
        mine = {"ann": key_digest(keys_in(place.folder / "ann")[0])}
        for count, fits in ((2000, True), (4000, False)):
            keys = {f"client-{i:05d}": f"{i:064x}" for i in range(count)} | mine
            long = replace(kit, roster=Roster(keys, "2026").signed(authority.sign))
            path = place.folder / f"{count}.kit"
            if fits:
                long.write(path)
                found = pinned(Kit.read(path), enrolled(kit, place.folder / "ann"))
                assert found is not None and len(found.keys) == count + 1
            else:
                with pytest.raises(ConfigError, match="are allowed"):
                    long.write(path)

    def test_without_a_roster_none_is_pinned(self, place: Place, roster: Path) -> None:
        kit = place.kit("ann")
        assert pinned(kit, enrolled(kit, place.folder / "ann")) is None

    def test_one_changed_digit_is_noticed(self, place: Place, roster: Path) -> None:
        authority, text = (place.ca / "ca.pem").read_bytes(), roster.read_text()
        digest = Roster.verified(text, authority).keys["bob"]  # positive control
        swapped = ("1" if digest[0] != "1" else "2") + digest[1:]
        for old, new in ((digest, swapped), ('"bob"', '"eve"'), ('"made": "2', '"made": "3')):
            with pytest.raises(SecurityRefusal, match="not signed by the authority"):
                Roster.verified(text.replace(old, new), authority)

    def test_a_server_cannot_sign_one(self, place: Place, roster: Path) -> None:
        key = new_key()

        def sign(data: bytes) -> bytes:
            return key.sign(data, ec.ECDSA(hashes.SHA256()))

        forged = Roster({"ann": "0" * 64}, "2026").signed(sign)
        with pytest.raises(SecurityRefusal, match="not signed by the authority"):
            Roster.verified(forged, (place.ca / "ca.pem").read_bytes())

    def test_a_site_that_it_does_not_know_does_not_join(self, place: Place, roster: Path) -> None:
        place.signed("eve")
        with pytest.raises(SecurityRefusal, match="no such client"):
            place.kit("eve", roster)
        kit = replace(place.kit("eve"), roster=roster.read_text())
        with pytest.raises(SecurityRefusal, match="no such client"):
            pinned(kit, enrolled(kit, place.folder / "eve"))

    @pytest.mark.parametrize("text", ["", "{}", "[]", "1", "[" * 9999, '{"format": 1}'])
    def test_what_is_none_is_said_to_be_none(self, text: str, place: Place) -> None:
        with pytest.raises(ConfigError, match="no roster"):
            Roster.verified(text, (ca.init(place.ca)).read_bytes())


class TestKitsWithoutAKey:
    def test_they_hold_no_secret(self, place: Place) -> None:
        place.begin()
        place.signed("ann")
        place.kit("ann")
        assert b"PRIVATE" not in (place.folder / "ann.kit").read_bytes()

    def test_another_site_has_no_use_for_them(self, place: Place) -> None:
        place.begin()
        for name in ("ann", "bob"):
            place.signed(name)
        kit = place.kit("ann")
        with pytest.raises(SecurityRefusal, match="does not belong"):
            enrolled(kit, place.folder / "bob")
        with pytest.raises(ConfigError, match="--site-dir"):
            enrolled(kit, place.folder / "empty")

    def test_the_key_is_found_where_the_request_put_it(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(place.folder / "data"))
        ca.init(place.ca)
        made = request("ann", place.folder / "ann.csr")
        ca.sign(place.ca, made.path, fingerprint=made.fingerprint)
        kit = place.kit("ann")
        assert default_folder(kit) == made.folder
        assert enrolled(kit, made.folder).key == read_private(made.folder / "site.key")


# ── damage ────────────────────────────────────────────────────────────────────────────────────


def damaged(data: bytes, generator: random.Random) -> bytes:
    """With a byte changed, left out or put in, a piece cut off, or a piece said twice."""
    at, other = generator.randrange(len(data)), generator.randrange(len(data))
    low, high = sorted((at, other))
    return generator.choice(
        [
            data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at + 1 :],
            data[:at] + bytes([generator.randrange(256)]) + data[at:],
            data[:low] + data[high:],
            data[:high] + data[low:],
            data[:at],
        ]
    )


def test_whatever_is_damaged_is_noticed_or_means_the_same(place: Place) -> None:
    own = place.begin()
    registry = identity.Registry(place.identity)
    pem = place.signed("ann").read_bytes()
    ca.roster(place.ca, [], place.folder / "roster.json")
    kit = place.kit("ann", place.folder / "roster.json")
    pins = Roster.verified(kit.roster, own.pem).keys
    csr = (place.folder / "ann.csr").read_bytes()
    server_csr = (place.identity / "server.csr").read_bytes()
    text = (place.folder / "ann.kit").read_bytes()
    path = place.folder / "damaged"

    def roster(data: bytes) -> bool:
        return Roster.verified(data.decode(errors="replace"), own.pem).keys == pins

    def certificate(data: bytes) -> bool:
        return registry.take_in("ann", data, own).key == pins["ann"]

    def request_of(server: bool) -> Callable[[bytes], bool]:
        def take(data: bytes) -> bool:
            path.write_bytes(data)
            who = ca.sign(place.ca, path, server=server).who
            return "lab.example" in who if server else who == "ann"

        return take

    def kit_of(data: bytes) -> bool:
        write_private(path, data)
        read = Kit.read(path)
        if not read.key and not read.insecure:
            found = pinned(read, enrolled(read, place.folder / "ann"))
            return read.name == "ann" and (found is None or found.keys == pins)
        return read.insecure

    generator = random.Random(0)
    targets: list[tuple[bytes, Callable[[bytes], bool]]] = [
        ((place.folder / "roster.json").read_bytes(), roster),
        (pem, certificate),
        (csr, request_of(False)),
        (server_csr, request_of(True)),
        (text, kit_of),
    ]
    for good, take in targets:
        assert take(good)  # positive control
        refused = 0
        for _ in range(100):
            try:
                assert take(damaged(good, generator))
            except FedftError as error:
                assert error.what
                refused += 1
        assert refused > 50


# ── clocks ────────────────────────────────────────────────────────────────────────────────────


class TestClocks:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> x509.Certificate:
        return Authority(tmp_path / "ca").client("ann", new_key().public_key(), days=1)

    def test_one_that_is_not_valid_yet_is_told_with_the_difference(
        self, certificate: x509.Certificate
    ) -> None:
        begins = certificate.not_valid_before_utc
        with pytest.raises(SecurityRefusal, match="in 5 min by this machine's clock") as told:
            check_time(certificate, "the kit", now=begins - timedelta(minutes=5))
        assert "clock of this machine" in told.value.fix
        check_time(certificate, "the kit", now=begins)  # positive control

    def test_one_that_expired_minutes_ago_is_told_with_the_difference(
        self, certificate: x509.Certificate
    ) -> None:
        ends = certificate.not_valid_after_utc
        with pytest.raises(SecurityRefusal, match=r"expired on .*, 3 min ago by this") as told:
            check_time(certificate, "the kit", now=ends + timedelta(minutes=3))
        assert "Check the clock" in told.value.fix
        with pytest.raises(SecurityRefusal, match="40 days ago"):
            check_time(certificate, "the kit", now=ends + timedelta(days=40))
        check_time(certificate, "the kit", now=ends - timedelta(seconds=1))  # positive control


# ── the whole of it, by real processes ────────────────────────────────────────────────────────


@dataclass
class Machines:
    """Commands as an operator types them, each a process of its own."""

    folder: Path
    started: list[subprocess.Popen[str]]

    def fedft(self, line: str, code: int = 0) -> str:
        """What a command says, both streams."""
        ran = self.start(line)
        said, _ = ran.communicate(timeout=200)
        assert ran.returncode == code, said
        assert "Traceback" not in said
        return said

    def start(self, line: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedft", *line.split()],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, [])
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


@pytest.mark.grpc
@pytest.mark.timeout(900)
def test_a_federation_whose_authority_is_on_another_machine(
    machines: Machines, tiny_table: Callable[..., dict[str, Any]], tiny_data: Path
) -> None:
    """From ``ca init`` to the end of the run, with a renewal and three strangers on the way."""
    here, fedft = machines.folder, machines.fedft
    rounds = {"count": 2, "per-round": 2, "evaluate-every": 1}
    config = parse_config(tiny_table(fleet={"clients": 2}, rounds=rounds))
    (here / "config.toml").write_text(config.to_toml())
    port = free_port()
    serve = f"serve config.toml --run-dir run --port {port} --ca ca/ca.pem --linger 20"

    fedft("ca init ca")
    said = fedft(serve, code=3)
    assert "no certificate to show" in said and "ca sign" in said
    said = fedft("ca sign ca run/identity/server.csr --server")
    assert "localhost" in said
    (here / "run/identity/server.pem").write_bytes((here / "ca/servers/localhost.pem").read_bytes())
    server = machines.start(serve)

    join = f"join {{0}}.kit --data {tiny_data} --site-dir {{0}} --give-up 120 --threads 1"
    join += f" --model {config.model.source}"
    # Strangers: known to the authority but not invited; of another authority; of no authority.
    fedft("ca request eve -o eve.csr --site-dir eve")
    fedft("ca sign ca eve.csr")
    fedft(f"ca kit ca eve --server 127.0.0.1:{port} -o eve.kit")
    assert "not registered here" in fedft(join.format("eve"), code=7)
    fedft("ca init other")
    fedft("ca request mallory -o mallory.csr --site-dir mallory")
    fedft("ca sign other mallory.csr")
    fedft(f"ca kit other mallory --server 127.0.0.1:{port} -o mallory.kit")
    assert "do not trust each other" in fedft(join.format("mallory"), code=7)
    assert "elsewhere" in fedft("invite mallory --run-dir run -o made.kit", code=2)

    for name, days in (("bob", 365), ("ann", 0.003)):  # ann's is due at once, and lasts 259 s
        fedft(f"ca request {name} -o {name}.csr --site-dir {name}")
        fedft(f"ca sign ca {name}.csr --days {days}")
    fedft("ca roster ca ann bob -o roster.json")
    for name in ("ann", "bob"):
        fedft(f"ca kit ca {name} --server 127.0.0.1:{port} -o {name}.kit --roster roster.json")
        fedft(f"invite {name} --run-dir run --certificate ca/clients/{name}.pem")

    # A renewal: ann asks, is told to wait, and has the new certificate the next time.
    ann = machines.start(join.format("ann"))
    waiting = here / "run/identity/requests/ann.csr"
    for _ in range(600):
        if waiting.exists():
            break
        assert ann.poll() is None and server.poll() is None
        time.sleep(0.1)
    ann.terminate()
    said, _ = ann.communicate(timeout=60)
    assert "pins the keys of 2 clients" in said
    assert "was not renewed" in said and "waits there to be signed" in said
    fedft("ca sign ca run/identity/requests/ann.csr")
    fedft("invite ann --run-dir run --certificate ca/clients/ann.pem")
    ann, bob = machines.start(join.format("ann")), machines.start(join.format("bob"))
    said, _ = ann.communicate(timeout=300)
    assert ann.returncode == 0, said
    assert "certificate of this client was renewed" in said
    said, _ = bob.communicate(timeout=60)
    assert bob.returncode == 0, said
    said, _ = server.communicate(timeout=60)
    assert server.returncode == 0, said

    authority = key_digest(load_certificate((here / "ca/ca.pem").read_bytes(), "ca").public_key())
    assert authority not in {key_digest(key) for key in keys_in(here / "run")}
    assert authority in {key_digest(key) for key in keys_in(here / "ca")}
    register = identity.Registry(here / "run/identity").clients()
    assert {name: client.state for name, client in register.items()} == {
        "ann": "done",
        "bob": "done",
    }
    assert register["ann"].expires[:4] == register["bob"].expires[:4]  # a year, like bob's
