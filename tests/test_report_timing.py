"""Simulated time in the report: curves, targets, the figure and the table."""

from pathlib import Path

import pytest

from fedft.report import charts
from fedft.report.compare_figures import of_comparison
from fedft.report.groups import TEST_LOSS, Metric, group
from fedft.report.records import Record
from fedft.report.run_figures import of_run
from fedft.report.tables import tabulate
from fedft.report.timing import at, common_target, curve, score_by_time, time_to

ACCURACY = Metric(("eval", "accuracy"), "Test accuracy", "accuracy", percent=True, higher=True)
LOSS = TEST_LOSS


def record(rule: str, seed: int, seconds: float, scores: list[float], timed: bool = True) -> Record:
    """A run that is evaluated every second round, ``seconds`` of simulated time apart."""
    rounds = []
    for k, accuracy in enumerate(scores, 1):
        for round_ in (2 * k - 1, 2 * k):
            line = {"round": round_, "train": {"loss": 1.0}, "seconds": {"train": 1.0}}
            if timed:
                line["clock"] = {
                    "seconds": seconds / 2,
                    "elapsed": seconds * round_ / 2,
                    "device_seconds": 3 * seconds,
                }
            if round_ % 2 == 0:
                line["eval"] = {"accuracy": accuracy, "loss": 1 - accuracy}
            rounds.append(line)
    config = {"strategy": {"name": rule}, "seed": seed}
    return Record(Path(f"{rule}-seed{seed}"), config, "", {}, tuple(rounds), (), {})


def arms() -> list[Record]:
    return [
        record("fedavg-lora", 0, 100, [0.2, 0.4, 0.6]),
        record("fedavg-lora", 1, 110, [0.2, 0.4, 0.5]),
        record("fedbuff", 0, 50, [0.1, 0.5, 0.6, 0.7]),
        record("fedbuff", 1, 60, [0.1, 0.5, 0.7, 0.6]),
    ]


def test_a_curve_and_what_is_read_off_it() -> None:
    points = curve(record("fedavg-lora", 0, 100, [0.2, 0.6]), ACCURACY)
    assert points == [(100, 0.2), (200, 0.6)]
    assert [at(points, t) for t in (100, 150, 200)] == pytest.approx([0.2, 0.4, 0.6])
    assert time_to(points, 0.3, higher=True) == pytest.approx(125)
    assert time_to(points, 0.1, higher=True) == 100
    assert time_to(points, 0.7, higher=True) is None
    falling = curve(record("fedavg-lora", 0, 100, [0.2, 0.6]), LOSS)
    assert time_to(falling, 0.7, higher=False) == pytest.approx(125)


def test_the_target_is_what_every_run_reached() -> None:
    assert common_target(arms(), ACCURACY) == 0.5  # the best of the second run
    assert common_target(arms(), LOSS) == 0.5
    without = record("fedavg-lora", 2, 100, [0.9], timed=False)
    assert common_target([*arms(), without], ACCURACY) is None


def test_the_table_has_the_time_to_the_target() -> None:
    table = tabulate(arms())
    mine = {row.label: row for row in table.rows}
    # 0.5 is half way from the second to the third evaluation, and at the third.
    first = mine["fedavg-lora"]
    assert first.time_to_target is not None
    assert first.time_to_target.mean == pytest.approx((250 + 330) / 2)
    assert first.simulated is not None
    assert first.simulated.mean == pytest.approx((300 + 330) / 2)
    assert first.device_seconds is not None
    assert first.device_seconds.mean == pytest.approx(6 * 3 * 105)
    assert mine["fedbuff"].time_to_target.mean == pytest.approx(110)  # type: ignore[union-attr]
    assert {"Time to 50.0 %", "Simulated time", "Device time"} <= set(table.header())
    assert table.to_json()[0]["target"] == 0.5
    assert "50.0 % is the best that every run reached" in table.note()


def test_without_a_clock_the_report_says_nothing_of_it() -> None:
    plain = [record("fedavg-lora", seed, 100, [0.2, 0.4], timed=False) for seed in (0, 1)]
    table = tabulate(plain)
    assert not {"Simulated time", "Device time"} & set(table.header())
    assert not any(f.name == "score-time" for f in of_comparison(group(plain), ACCURACY))
    assert not any(f.name == "score-time" for f in of_run(plain[0], ACCURACY))


def test_the_figures_show_the_ends_in_words() -> None:
    groups = group(arms())
    figure = score_by_time(groups, ACCURACY, charts.styles(groups))
    assert figure is not None
    # Bands end with the shortest run: at 300 s the second run is at 0.4 + 0.1 * 80 / 110.
    assert "fedavg-lora 53.6 % after 5 min 00 s" in figure.svg
    assert "Simulated time (min)" in figure.svg
    assert "fedavg-lora" in figure.svg
    assert figure.wide is not None
    alone = next(f for f in of_run(arms()[0], ACCURACY) if f.name == "score-time")
    assert "60.0 % after 5 min 00 s" in alone.svg
