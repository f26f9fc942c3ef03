"""Meters of our own keep the laws, and every law is broken by a meter that breaks it."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from fedft import conformance
from fedft.conformance import meters
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.meters import METERS, REGISTRY, Curve, Meter, Plot, Round
from fedft.core.plugins import RECORD, USER
from fedft.core.types import ClientUpdate
from fedft.server.config_file import configured, parse_config
from fedft.server.measuring import EvaluationSpec
from fedft.server.outside import outside

HERE = "tests.conformance.test_meters"


class Sound(Meter):
    key = "sound"
    needs = "each"

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def add(self, update: ClientUpdate) -> None:
        self.seen.append((update.site, update.examples))

    def value(self, round_: Round) -> Mapping[str, Any]:
        return {"clients": len(self.seen)}


class Raising(Sound):
    def value(self, round_: Round) -> Mapping[str, Any]:
        raise ZeroDivisionError


class Odd(Sound):
    def value(self, round_: Round) -> Any:
        return {"tensor": next(iter(round_.before.adapter.tensors().values()))}


class FirstOne(Sound):
    def value(self, round_: Round) -> Mapping[str, Any]:
        return {"first": self.seen[0][0]}


class Counting(Sound):
    def value(self, round_: Round) -> Mapping[str, Any]:
        return {"examples": sum(n for _, n in self.seen)}


class Writing(Sound):
    def add(self, update: ClientUpdate) -> None:
        next(iter(update.tensors.values())).mul_(2)


class Lasting(Sound):
    numbers = itertools.count()

    def value(self, round_: Round) -> Mapping[str, Any]:
        return {"calls": next(self.numbers)}


class Misdrawn(Sound):
    plots = (
        Plot(title="x", quantity="x", caption="x", curves=(Curve(keys=("nope",), label="x"),)),
    )


BROKEN = {
    Raising: "It says plain data of every kind of round",
    Odd: "It says plain data of every kind of round",
    FirstOne: "The order of the clients changes nothing",
    Counting: "Only shares of the examples count, and clients without any change nothing",
    Writing: "What it is shown is not written to",
    Lasting: "Nothing is left over from one round to the next",
    Misdrawn: "Its figures draw what it says",
}


@pytest.mark.parametrize("kind", METERS, ids=lambda kind: kind.key)
@pytest.mark.parametrize("law", meters.LAWS, ids=lambda law: law.says)
def test_our_own_keep_every_law(kind: type[Meter], law: Any) -> None:
    law.check(kind)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_meter_that_breaks_a_law_is_found(kind: type[Meter]) -> None:
    broken = {f.law for f in conformance.check(f"{HERE}:{kind.__name__}") if f.outcome == "broken"}
    assert BROKEN[kind] in broken
    assert set(BROKEN.values()) == {law.says for law in meters.LAWS}, "every law has a control"


def test_a_sound_one_is_found_sound() -> None:
    assert {f.outcome for f in conformance.check(f"{HERE}:Sound")} == {"held"}


def test_a_run_names_a_meter_from_outside(tiny_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table(evaluation={"meters": ["bias", f"{HERE}:Sound"]})
    monkeypatch.setattr(REGISTRY, "_known", {})
    with pytest.raises(SecurityRefusal, match=f"--allow {HERE}:Sound"):
        parse_config(table)
    config = parse_config(table, trust=USER)
    assert [kind.key for kind in config.evaluation.kinds] == ["bias", "sound"]
    assert outside(config).keys() == {f"{HERE}:Sound"}
    assert parse_config(table, trust=RECORD) == config, "what was admitted is known"
    given = configured(config, {"evaluation.meters": [Sound, "lag"]})
    assert given.evaluation.meters == (f"{HERE}:Sound", "lag")


@pytest.mark.parametrize(
    ("name", "said"),
    [("bais", "no meter is called 'bais'"), (f"{HERE}:METERS", "not a meter"), (3, "text")],
)
def test_what_is_no_meter_is_told(name: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(parse_config({}), {"evaluation": {"meters": [name]}})
    assert EvaluationSpec().meters
