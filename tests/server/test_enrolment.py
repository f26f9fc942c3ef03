"""Who of the real clients takes part: drawn as in a simulation, and whether a draw would have to wait."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from fedft.core.errors import QuorumFailure
from fedft.server import enrolment
from fedft.server.enrolment import EnrolledRoster
from fedft.server.identity import Client
from fedft.server.messages import Waiting


@dataclass
class Register:
    """Sites a, b, c and d, all of which have joined."""

    revoked: tuple[str, ...] = ()

    def clients(self) -> dict[str, Client]:
        return {
            name: Client(
                name,
                node,
                kit="",
                invited="then",
                joined="then",
                revoked="then" if name in self.revoked else "",
                examples=10,
            )
            for node, name in enumerate("abcd", 1)
        }


@dataclass
class Present:
    connected: frozenset[str]
    away: dict[str, float] = field(default_factory=dict[str, float])

    def away_s(self, site: str) -> float:
        return self.away.get(site, 1000.0)

    def wait_connected(self, enough: Any, timeout: float) -> bool:
        raise AssertionError("nobody is to be waited for")


def roster(there: str, revoked: tuple[str, ...] = (), **away: float) -> EnrolledRoster:
    register: Any = Register(revoked)
    return EnrolledRoster(register, Present(frozenset(there), away), quorum=1, first=1)


def test_with_everybody_there_a_cohort_is_drawn_at_once() -> None:
    everybody = roster("abcd")
    assert everybody.ready(3)
    drawn = everybody.sample(0, 1, 0, 3)
    assert [site.name for site in drawn] == sorted(site.name for site in drawn)
    assert len(drawn) == 3


def test_too_few_sites_are_worth_waiting_for() -> None:
    assert not roster("ab").ready(3)
    assert not roster("abcd", revoked=("a", "b")).ready(3)


def test_a_site_that_went_away_just_now_is_waited_for() -> None:
    assert not roster("abc", d=1.0).ready(3)
    assert roster("abc", d=31.0).ready(3)
    assert roster("abc", revoked=("d",), d=1.0).ready(3)


def test_where_a_draw_would_wait_none_is_made_ahead() -> None:
    """The control: the draw that ``ready`` warns of does wait."""
    with pytest.raises(AssertionError, match="waited for"):
        roster("abc", d=1.0).sample(0, 1, 0, 4)


class Waited(Present):
    """Nobody comes or goes; waiting costs no time, but the clock of the test goes on."""

    clock: float = 0.0

    def wait_connected(self, enough: Any, timeout: float) -> bool:
        Waited.clock += timeout
        if Waited.clock > 10_000:
            raise AssertionError("nobody waits for so long")
        return False


def waiting(
    monkeypatch: pytest.MonkeyPatch, there: str, quorum: int, **options: Any
) -> tuple[EnrolledRoster, list[Waiting]]:
    """A roster on a clock of its own, and what it said of its waiting."""
    Waited.clock = 0.0
    monkeypatch.setattr(enrolment.time, "monotonic", lambda: Waited.clock)
    register: Any = Register()
    seen: list[Waiting] = []
    watch = lambda w: None if w is None else seen.append(w)  # noqa: E731
    made = EnrolledRoster(register, Waited(frozenset(there)), quorum=quorum, watch=watch, **options)
    return made, seen


def test_with_a_quorum_a_round_waits_for_gather_s_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some, seen = waiting(monkeypatch, "ab", 2, gather_s=60.0, patience_s=600.0)
    assert [site.name for site in some.sample(0, 1, 0, 4)] == ["a", "b"]
    assert 60 <= Waited.clock < 62
    assert {(w.verb, w.done, w.wanted, w.missing) for w in seen} == {
        ("connected", 2, 4, ("c", "d"))
    }
    # It is not waited for again in every round that the same two are there.
    some.sample(0, 2, 0, 4)
    assert Waited.clock < 62


def test_without_a_quorum_it_waits_as_long_as_there_is_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, seen = waiting(monkeypatch, "a", 2, gather_s=60.0, patience_s=600.0)
    with pytest.raises(QuorumFailure, match="1 clients were connected after 600 s"):
        few.sample(0, 1, 0, 4)
    assert 600 <= Waited.clock < 602
    assert "round 1: 1 of 4 connected; waiting for b, c, d, " in seen[0].line()


def test_those_that_a_server_was_told_to_wait_for_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``--wait-for``: for the first round only."""
    some, _ = waiting(monkeypatch, "abc", 2, first=4, gather_s=60.0, patience_s=600.0)
    assert len(some.sample(0, 1, 0, 3)) == 3
    assert 600 <= Waited.clock < 602
    some.sample(0, 2, 0, 3)
    assert Waited.clock < 602


def test_clients_that_come_and_go_for_ever_hold_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time somebody looks, a drawn client has just left."""
    some, _ = waiting(monkeypatch, "abc", 2, gather_s=60.0, grace_s=30.0)
    some.presence.away["d"] = 1.0  # type: ignore[attr-defined]
    assert [site.name for site in some.sample(0, 1, 0, 4)] == ["a", "b", "c"]
    assert Waited.clock < 200
