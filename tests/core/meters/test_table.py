"""The table of meters: how each is drawn, where it stands, and what is refused."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from fedft.core import meters
from fedft.core.errors import ConfigError
from fedft.core.meters import METERS, Meter, plot_from
from fedft.core.types import ServerState
from tests.core.meters.federations import CASES
from tests.core.meters.test_laws import Spread, every_meter, read

# ── how it is drawn ───────────────────────────────────────────────────────────────────────────


def entry(reading: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        reading = reading[key]
    return reading


@every_meter
def test_what_is_drawn_is_read(kind: type[Meter]) -> None:
    """Every number that a plot names stands in a reading, and is a number in some round."""
    meters.check_meter(kind, kind.key)
    readings = [r for name in CASES if (r := read(kind, CASES[name]())) is not None]
    for plot in kind.plots:
        assert plot_from(json.loads(json.dumps(plot.to_json()))) == plot
        assert plot.title
        assert plot.quantity
        assert not plot.curves[0].part
        for keys in [*(c.keys for c in plot.curves), *(keys for _, keys in plot.quoted)]:
            assert any(isinstance(entry(r, keys), int | float) for r in readings), keys
        if plot.heat is not None:
            layers = [v for r in readings for v in entry(r, plot.heat.keys).values()]
            assert any(isinstance(entry(v, plot.heat.value), float) for v in layers)


@pytest.mark.parametrize(
    "data",
    [
        *(None, 3, "x", [], {}, {"title": "t", "quantity": "q", "curves": []}),
        {"title": 3, "quantity": "q", "curves": [{"keys": ["a"], "label": "l"}]},
        {"title": "t", "quantity": "q", "curves": [{"keys": [], "label": "l"}]},
        {"title": "t", "quantity": "q", "curves": [{"keys": "a", "label": "l"}]},
        {"title": "t", "quantity": "q", "curves": [{"keys": ["a"], "label": "l"}], "axis": "polar"},
        {"title": "t", "quantity": "q", "curves": [{"keys": ["a"], "label": "l"}], "low": "0"},
        {"title": "t", "quantity": "q", "curves": [{"keys": ["a"], "label": "l"}], "high": 1e999},
        {
            "title": "t",
            "quantity": "q",
            "curves": [{"keys": ["a"], "label": "l"}],
            "heat": {"x": 1},
        },
        {"title": "t", "quantity": "q", "curves": [{"keys": ["a"], "label": "l"}], "better": "up"},
    ],
)
def test_a_description_that_is_none_is_read_as_none(data: object) -> None:
    assert plot_from(data) is None


def test_a_description_from_outside_is_cut() -> None:
    curve = {"keys": ["a"], "label": "l" * 10_000}
    plot = plot_from({"title": "t" * 10_000, "quantity": "q", "curves": [curve] * 500})
    assert plot is not None
    assert max(map(len, (plot.title, plot.curves[0].label))) < 1000
    assert len(plot.curves) < 20


# ── the table ─────────────────────────────────────────────────────────────────────────────────


def test_the_first_meters_keep_their_places_in_the_record() -> None:
    assert [k.key for k in METERS if k.top] == ["bias", "lag", "drift", "heads", "spectrum"]
    assert meters.DEFAULT == ("bias", "lag", "drift", "heads")


@every_meter
def test_a_meter_is_one_file_under_its_name(kind: type[Meter]) -> None:
    assert kind.__module__ == f"fedft.core.meters.{kind.key}"
    assert meters.find(kind.key) is kind


def test_a_meter_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no meter is called 'efective_rank'") as told:
        meters.find("efective_rank")
    assert "did you mean 'effective_rank'?" in told.value.fix
    with pytest.raises(ConfigError, match="'bias' is named twice"):
        meters.chosen(["bias", "lag", "bias"])


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"key": "Bad Key"}, "a key is made of"),
        ({}, "a key is made of"),
        ({"key": "good", "needs": "all"}, "needs = 'all'"),
        ({"key": "good", "when": "never"}, "when = 'never'"),
        ({"key": "good", "plots": ["x"]}, "has plots that are none"),
        ({"key": "bias"}, "is the key of one of fedft's own"),
        ({"key": "good", "top": True}, "top = True"),
    ],
)
def test_a_meter_of_others_is_checked_before_a_run(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        meters.check_foreign(
            type("Theirs", (Spread,), {"key": None, **attributes}), "theirs:Theirs"
        )


def test_what_is_no_meter_is_refused() -> None:
    for value in (3, "bias", dict, ServerState, None):
        with pytest.raises(ConfigError, match="is not a meter"):
            meters.check_foreign(value, "theirs:Thing")
    assert meters.check_foreign(Spread, "theirs:Spread") is Spread
