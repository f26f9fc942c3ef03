"""`[training] method`: a client method beside the rule's, with a table of its own."""

from typing import Any

import pytest

from fedft.core.errors import ConfigError
from fedft.core.training_table import TrainingSpec
from fedft.core.types import LocalTraining
from fedft.server.config_file import parse_config, parse_toml


def training(**table: Any) -> LocalTraining:
    return parse_config({"training": table}).training.local()


def test_a_method_is_named_and_has_a_table_of_its_own() -> None:
    assert training(method="proximal", proximal={"mu": 0.3}) == LocalTraining(proximal_mu=0.3)
    assert training(method="proximal") == LocalTraining(proximal_mu=0.01)
    tail = training(method="tail", tail={"strength": 0.2, "keep": 0.5})
    assert tail == LocalTraining(tail_penalty=0.2, tail_keep=0.5)
    assert training() == LocalTraining()
    assert training(**{"proximal-mu": 0.3}) == LocalTraining(proximal_mu=0.3), "the old key"


def test_what_is_written_reads_as_the_same_object() -> None:
    table = {"training": {"method": "tail", "tail": {"strength": 0.2, "keep": 0.5}}}
    config = parse_config(table)
    assert parse_toml(config.to_toml(), "x") == config
    assert TrainingSpec.model_validate(config.training.model_dump(by_alias=True)) == config.training


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"method": "proximol"}, "no client method is called 'proximol'; did you mean 'proximal'"),
        ({"method": "control-variates"}, "is what a rule of .strategy. asks for"),
        ({"method": "dp-sgd"}, r"is what .training. dp asks for"),
        ({"method": "proximal", "proximal": {"nu": 1}}, "nu"),
        ({"method": "proximal", "proximal": {"mu": -1}}, "mu = -1"),
        ({"method": "proximal", "proximal": {"mu": float("nan")}}, "mu"),
        ({"method": "proximal", "proximal": 0.1}, "a table of the method's values"),
        ({"method": "proximal", "tail": {"keep": 0.5}}, "tail"),
        ({"proximal": {"mu": 0.1}}, "proximal"),
        ({"method": "proximal", "proximal-mu": 0.1}, "say the same"),
        ({"method": 3}, "method"),
    ],
)
def test_what_is_no_method_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training(**table)
