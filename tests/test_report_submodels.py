"""Submodels in the report: the table with paired differences, and the figures."""

from pathlib import Path
from typing import Any

import pytest

from fedft.report import charts
from fedft.report.compare_figures import of_comparison
from fedft.report.groups import Metric, group
from fedft.report.records import Record
from fedft.report.run_figures import of_run
from fedft.report.statistics import t_quantile
from fedft.report.submodels import score_by_size, sizes, words
from fedft.report.tables import tabulate

ACCURACY = Metric(("eval", "accuracy"), "Test accuracy", "accuracy", percent=True, higher=True)


def record(arm: str, seed: int, whole: float, parts: dict[str, float], **pruning: Any) -> Record:
    """A run of an arm that is evaluated in its second and last round, and was worse before."""

    def line(round_: int, loss: float) -> dict[str, Any]:
        scored = {size: {"accuracy": value - loss} for size, value in parts.items()}
        submodels = {"submodels": scored} if parts else {}
        return {"round": round_, "eval": {"accuracy": whole - loss}, **submodels}

    config = {"strategy": {"name": "fedavg-lora"}, "seed": seed, "pruning": pruning}
    rounds = (line(1, 0.1), line(2, 0.0))
    return Record(Path(f"{arm}-seed{seed}"), config, "", {}, rounds, (), {}, ("cka", "random"))


def arms() -> list[Record]:
    return [
        record("cka", 0, 0.70, {"3": 0.60, "12": 0.65}),
        record("cka", 1, 0.80, {"3": 0.64, "12": 0.75}),
        record("random", 0, 0.68, {"3": 0.50, "12": 0.64}),
        record("random", 1, 0.79, {"3": 0.58, "12": 0.72}),
        record("whole", 0, 0.9, {}),
    ]


def test_sizes_are_ordered_as_numbers_and_hostile_keys_are_none() -> None:
    assert sizes(arms()) == (3, 12)
    assert sizes([record("cka", 0, 0.7, {"<b>": 0.1, "-1": 0.1, "²": 0.1, "9" * 9: 0.1})]) == ()
    assert [words(1, "block"), words(3, "sublayer")] == ["1 block", "3 sublayers"]


def test_the_table_has_each_size_and_its_paired_difference() -> None:
    table = tabulate(arms()[:4])
    mine = {row.label: row for row in table.rows}
    score = mine["random"].submodels[3].score
    gain = mine["random"].submodels[3].gain
    assert score is not None
    assert gain is not None
    assert score.mean == pytest.approx(0.54)
    assert gain.mean == pytest.approx(-0.08)  # -0.10 and -0.06, seed by seed
    assert gain.half == pytest.approx(t_quantile(0.975, 1) * 0.02)
    assert mine["cka"].submodels[3].gain is None
    header = table.header()
    assert header[4:8] == [
        "With 3 blocks (%)", "Δ with 3 blocks", "With 12 blocks (%)", "Δ with 12 blocks",
    ]  # fmt: skip
    assert table.cells()[1][4:6] == ["54.00 ± 50.82", "−8.00 ± 25.41"]
    assert "With 3 blocks (%)" in table.markdown()
    assert r"$\Delta$ with 3 blocks" in table.latex()
    assert table.to_json()[1]["submodels"][3]["gain"]["mean"] == pytest.approx(-0.08)  # type: ignore[index]


def test_an_arm_without_submodels_shows_a_dash() -> None:
    rows = tabulate(arms()).cells()
    whole = next(
        cells for cells in rows if cells[0].startswith("whole") or cells[0] == "fedavg-lora"
    )
    assert whole[4:8] == ["—"] * 4


def test_sublayers_are_called_so() -> None:
    fine = record("cka", 0, 0.7, {"3": 0.6}, granularity="sublayer")
    assert "With 3 sublayers (%)" in tabulate([fine]).header()
    mixed = [fine, record("random", 0, 0.7, {"3": 0.6})]
    assert "With 3 parts (%)" in tabulate(mixed).header()


def test_the_figures_say_what_every_arm_reaches_with_how_much() -> None:
    groups = group(arms()[:4])
    figure = score_by_size(groups, ACCURACY, charts.styles(groups))
    assert figure is not None
    assert (
        "cka 62.0 % with 3 blocks, 70.0 % with 12 blocks, 75.0 % with the whole model" in figure.svg
    )
    assert "random 54.0 % with 3 blocks" in figure.svg
    alone = next(f for f in of_run(arms()[0], ACCURACY) if f.name == "score-size")
    assert "whole model 70.0 %, 3 blocks 60.0 %, 12 blocks 65.0 %" in alone.svg


def test_without_pruning_the_report_says_nothing_of_it() -> None:
    plain = [record("cka", seed, 0.7, {}) for seed in (0, 1)]
    assert len(tabulate(plain).header()) == 5
    assert not any(f.name == "score-size" for f in of_comparison(group(plain), ACCURACY))
    assert not any(f.name == "score-size" for f in of_run(plain[0], ACCURACY))
