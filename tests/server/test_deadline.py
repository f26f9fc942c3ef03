"""When a round of real clients closes where nobody says: by hand, and in what users are shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedft.core import models
from fedft.server.config_file import parse_config
from fedft.server.deadline import Pace, pace_of
from fedft.server.forecast import as_text, forecast

Table = Callable[..., dict[str, Any]]


def test_a_slow_laptop_on_a_slow_line() -> None:
    """22.7 million parameters at 128 tokens: 6 * 22.7e6 * 128 = 1.74e10 operations an example."""
    pace = Pace(flops=6 * 22.7e6 * 128)
    assert pace.example_s == pytest.approx(3.487, abs=1e-3)
    # 100 examples twice, and 0.6 MB each way at 1 Mbit/s: 60 + 697.3 + 9.6
    assert pace.seconds(200, 1_200_000) == pytest.approx(60 + 697.3 + 9.6, abs=0.1)


def test_it_goes_by_the_model_and_the_longest_row(tiny_table: Table, tiny_model: Path) -> None:
    def flops(**changes: Any) -> float:
        config = parse_config(tiny_table(**changes))
        shapes = models.schema(config.model, config.lora, 3)
        return pace_of(config, shapes, models.geometry(config.model, tiny_model)).flops

    config = parse_config(tiny_table())
    parameters = models.schema(config.model, config.lora, 3).parameters
    assert flops(data={"max-length": 16}) == 6 * parameters * 16
    assert flops(data={"max-length": 32}) == 2 * flops(data={"max-length": 16})


def test_a_plan_says_it(tiny_table: Table) -> None:
    untold = parse_config(tiny_table())
    cost = forecast(untold)
    assert cost["deadline"]["given_s"] is None and cost["deadline"]["least_s"] == 60
    assert "a round closes after 60 s + " in as_text(untold, cost)
    assert "at 1 Mbit/s" in as_text(untold, cost)
    told = parse_config(tiny_table(rounds={"deadline-s": 90}))
    assert "a round closes after 90 s\n" in as_text(told, forecast(told))
