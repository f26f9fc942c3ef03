"""Every key of every table takes a value, or refuses it in words of the configuration."""

import datetime
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from fedft.core.errors import ConfigError
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.sentences import _table_in
from fedft.strategies import RULES

NASTY: list[Any] = [
    *(True, -1, 1.5, float("nan"), 10**30, "", "x" * 5000, "\0", "1", datetime.date(2026, 1, 1)),
    *([], [1], ["a"], [[1]], {}, {"a": 1}, {"kind": "x"}, {"name": "x"}, {"name": ["x"]}),
]

FOREIGN = re.compile(
    r"pydantic|validation error|Input should|Value error|\[type=|Error\(|NoneType|BaseModel|"
    r"Extra inputs|Unable to|discriminator|instance of|literal\[|tuple\[|constrained"
)


def keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of a table and of the tables in it, the rule's apart."""
    for name, field in model.model_fields.items():
        path = (*above, field.alias or name)
        yield path
        if (table := _table_in(field.annotation)) and path != ("strategy",):
            yield from keys(table, path)


def tables() -> Iterator[dict[str, Any]]:
    for path in keys(RunConfig):
        for value in NASTY:
            table = value
            for key in reversed(path):
                table = {key: table}
            yield table
    for rule in RULES:
        name = rule.model_fields["name"].default
        for key, field in rule.model_fields.items():
            for value in NASTY:
                yield {"strategy": {"name": name, (field.alias or key): value}}


def test_every_key_takes_or_refuses_every_kind_of_value() -> None:
    taken = refused = 0
    for table in tables():
        try:
            config = parse_config(table)
        except ConfigError as error:
            said = str(error)
            assert error.fix, table
            assert not FOREIGN.search(said), said
            refused += 1
        else:
            assert parse_toml(config.to_toml(), "x") == config
            taken += 1
    assert taken > 100 and refused > 1000, "both ways are gone"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"training": {"dp": {"nosie-multiplier": 1}}}, "did you mean 'noise-multiplier'"),
        ({"strategy": {"name": "fedprox", "inner": {"name": "lora-fair", "rige": 1}}}, "'ridge'"),
        ({"fleet": {"ranks": [4, -1]}}, r"\[fleet\] ranks\[1\] = -1: must be greater than 0"),
        ({"engine": {"cohort": "x"}}, "a whole number or 'auto' is expected"),
        ({"lora": {"target-modules": [1]}}, r"target-modules\[0\] = 1: text is expected\n  →"),
        ({"fleet": {"ranks": {"kind": "uniform", "low": 1}}}, r"\[fleet.ranks\] high is missing"),
        ({"fleet": {"clients": 5}}, r"\n  \[rounds\] per-round = 10 is more than"),
    ],
)
def test_a_sentence_has_the_place_and_the_rule(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(table)
