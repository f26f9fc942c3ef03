"""What a report says of runs of mixed ranks that lose what clients of low rank were not sent."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedft.report.formats import forgotten_text
from fedft.report.meter_figures import of_run
from fedft.report.records import read
from tests.test_report import render, summarise, write_run


def with_forgotten(path: Path, value: float, rule: str = "flexlora", **options: Any) -> Path:
    run = write_run(path, rule, rounds=4, **options)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["bias"]["forgotten"] = value
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_run_that_forgets_says_how_much(tmp_path: Path) -> None:
    run = with_forgotten(tmp_path / "run", 0.25)
    html = render(tmp_path, run)
    assert "<dt>Forgotten</dt><dd>0.25<small>" in html
    figure = next(f for f in of_run(read(run)) if f.name == "bias")
    assert "Forgotten of it: 0.25 in the mean." in figure.svg
    assert "forgotten" in figure.svg
    assert "what clients of low rank were not sent" in figure.caption


@pytest.mark.parametrize("value", [0.0, 3e-8, -0.2])
def test_where_nothing_is_lost_nothing_is_said(tmp_path: Path, value: float) -> None:
    """At one rank, for an exact rule in float32, and where the model has more of it than before."""
    html = render(tmp_path, with_forgotten(tmp_path / "run", value))
    old = render(tmp_path, write_run(tmp_path / "old", "flexlora", rounds=4))
    assert "orgotten" not in html
    assert "orgotten" not in old


def test_a_comparison_has_a_column_for_it_where_a_rule_forgets(tmp_path: Path) -> None:
    for seed in (0, 1):
        for rule, value in (("flexlora", 0.2 + 0.1 * seed), ("raflora", 1e-9)):
            with_forgotten(tmp_path / rule / str(seed), value, rule, seed=seed)
        write_run(tmp_path / "fedsa-lora" / str(seed), "fedsa-lora", seed=seed, rounds=4)
    table = summarise([tmp_path])
    column = table.header().index("Forgotten")
    found = {row[0]: row[column] for row in table.cells()}
    assert (found["flexlora"], found["raflora"], found["fedsa-lora"]) == ("0.25", "nothing", "—")


def test_numbers_as_people_read_them() -> None:
    assert [forgotten_text(v) for v in (None, -0.1, 0.0, 1e-6, 0.25)] == [
        "—", "nothing", "nothing", "nothing", "0.25"
    ]  # fmt: skip
