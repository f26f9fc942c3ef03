"""`[evaluation] meters`: from the configuration into the record of a round, on the inline grid."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fedft.core.errors import ConfigError
from fedft.core.meters import DEFAULT, METERS, Agreement, Meter, Round, chosen, plot_from
from fedft.core.types import ServerState
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.federation import Completed
from fedft.server.measuring import EvaluationSpec
from fedft.server.rounds import one_round, rounds
from tests.server.test_rounds import federation, initial, state_digest

FIRST = [kind.key for kind in METERS if kind.top]


def measured(*kinds: type[Meter], **settings: Any) -> Completed:
    return one_round(replace(federation(**settings), meters=kinds), ServerState(initial()))


def without_time(completed: Completed) -> dict[str, Any]:
    return {k: v for k, v in dict(completed.record).items() if k != "seconds"}


def test_a_run_that_names_no_meters_is_measured_as_ever() -> None:
    config = RunConfig()
    assert config.evaluation.kinds == chosen(DEFAULT)
    assert config.evaluation.described() == {}
    line = without_time(one_round(federation(), ServerState(initial())))
    assert [key for key in line if key in FIRST or key.startswith("meter")] == [
        "bias",
        "lag",
        "drift",
    ]
    assert parse_toml(config.to_toml(), "it") == config


def test_a_run_is_measured_by_what_it_names_and_comes_to_the_same_model() -> None:
    ever, more, none = measured(*chosen(DEFAULT)), measured(*METERS), measured()
    assert state_digest(ever.state) == state_digest(more.state) == state_digest(none.state)
    line, bare = without_time(more), without_time(none)
    assert list(line["meters"]) == ["effective_rank", "agreement"]
    assert -1 <= line["meters"]["agreement"]["cosine"] <= 1
    assert line["meters"]["agreement"]["clients"] == len(line["cohort"])
    rank = initial().rank
    assert all(1 <= x <= rank + 1e-6 for x in line["meters"]["effective_rank"]["layers"].values())
    rest = {k: v for k, v in line.items() if k not in ("meters", "spectrum")}
    assert rest == without_time(ever)
    assert bare == {k: v for k, v in rest.items() if k not in FIRST}


def test_the_spectrum_is_read_where_the_model_is_evaluated() -> None:
    kept = {"count": 4, "evaluate-every": 2}
    asked = replace(federation(**kept, spectrum=True), meters=())
    named = replace(federation(**kept), meters=chosen(["spectrum"]))
    lines = [
        [without_time(completed) for completed in rounds(one, ServerState(initial()))]
        for one in (asked, named)
    ]
    assert lines[0] == lines[1]
    assert ["spectrum" in line for line in lines[0]] == ["eval" in line for line in lines[0]]
    assert [line["round"] for line in lines[0] if "spectrum" in line] == [2, 4]


class Breaks(Meter):
    key = "breaks"
    needs = "products"

    def value(self, round_: Round) -> dict[str, float]:
        raise KeyError("no such layer")


def test_a_meter_that_fails_does_not_stop_a_round_and_the_record_names_it() -> None:
    ever, broken = measured(Agreement), measured(Breaks, Agreement)
    assert state_digest(ever.state) == state_digest(broken.state)
    line = without_time(broken)
    assert line.pop("meter_errors") == {"breaks": "KeyError: 'no such layer'"}
    assert line == without_time(ever)
    assert json.loads(json.dumps(line)) == line


def test_a_run_says_how_its_later_meters_are_drawn() -> None:
    spec = EvaluationSpec(meters=("bias", "effective_rank", "agreement"))
    (rank, agreement) = json.loads(json.dumps(spec.described()))["meters"]
    assert (rank["key"], agreement["key"]) == ("effective_rank", "agreement")
    assert tuple(map(plot_from, agreement["plots"])) == Agreement.plots


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["biass"], "no meter is called 'biass'; did you mean 'bias'?"),
        (["bias", "bias"], "the meter 'bias' is named twice"),
        ("bias", "a list is expected"),
        ([3], "text is expected"),
    ],
)
def test_meters_that_there_are_not_are_refused_before_a_run(names: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=r"\[evaluation") as told:
        parse_config({"evaluation": {"meters": names}})
    assert why in str(told.value)
