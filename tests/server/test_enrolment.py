"""Who of the real clients takes part: drawn as in a simulation, and whether a draw would have to wait."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from server.enrolment import EnrolledRoster
from server.identity import Client


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
