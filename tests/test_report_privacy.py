"""What the report and the terminal say of a private run: ε with its δ, its sampling, its adjacency."""

import html
import json
from pathlib import Path
from typing import Any

import pytest

from fedft.api import Run
from fedft.console import RunConsole
from fedft.report import page, privacy
from fedft.report.records import Record
from fedft.report.tables import tabulate

SITE = {
    "epsilon": 7.978,
    "delta": 1e-5,
    "noise_multiplier": 0.558,
    "sampling": "poisson",
    "sampling_rate": 0.05,
    "adjacency": "add or remove one client",
    "releases": 20,
}
EXAMPLE = {
    "epsilon": 4.381,
    "median": 3.9,
    "delta": 1e-6,
    "noise_multiplier": 1.0,
    "sampling": "poisson",
    "adjacency": "add or remove one example of a client",
    "sites": 12,
}
PROMISE = (
    "ε = 7.98 at δ = 1e-05; Poisson sampling, rate 0.05, noise multiplier 0.558, releases 20; "
    "adjacency: add or remove one client"
)


def record(rule: str, *spent: dict[str, Any], seed: int = 0) -> Record:
    """A run with an evaluation, and what it says of privacy, a round; then one without either."""
    rounds = [
        {"round": k, "eval": {"accuracy": 0.5, "loss": 1.0}, "privacy": units}
        for k, units in enumerate(spent, 1)
    ]
    rounds.append({"round": len(spent) + 1, "train": {"loss": 1.0}})
    config = {"strategy": {"name": rule}, "seed": seed}
    return Record(Path(f"{rule}-seed{seed}"), config, "", {}, tuple(rounds), (), {})


def half(unit: dict[str, Any]) -> dict[str, Any]:
    return {**unit, "epsilon": unit["epsilon"] / 2}


def test_the_page_of_a_private_run_says_what_it_promises() -> None:
    run = record("central-dp", {"site": half(SITE)}, {"site": SITE, "example": EXAMPLE})
    shown = html.unescape(page.of_run(run))
    assert "<dt>ε of a client</dt><dd>7.98<small>δ = 1e-05, after round 2</small>" in shown
    assert "<dt>ε of an example</dt><dd>4.38<small>δ = 1e-06, after round 2</small>" in shown
    assert f"<dt>Privacy by client</dt><dd>{PROMISE}</dd>" in shown
    assert "ε = 4.38 (3.90 in the median) at δ = 1e-06; Poisson sampling" in shown
    assert "clients 12; adjacency: add or remove one example of a client" in shown


def test_nothing_is_said_of_a_run_that_promises_nothing() -> None:
    plain = record("fedavg-lora", {})
    assert "ε" not in page.of_run(plain)
    table = tabulate([plain])
    assert not any("ε" in title for title in table.header())
    assert "ε" not in table.note()
    assert table.rows[0].epsilon == {}


def test_the_table_shows_the_largest_account_of_the_seeds() -> None:
    runs = [
        record("fedavg-lora", {}),
        record("central-dp", {"site": half(SITE)}, seed=0),
        record("central-dp", {"site": SITE}, seed=1),
    ]
    table = tabulate(runs)
    column = table.header().index("ε of a client")
    assert [cells[column] for cells in table.cells()] == ["—", "7.98"]
    assert table.note().endswith(
        "ε of a client: δ = 1e-05, Poisson sampling, adjacency: add or remove one client; "
        "the largest of the runs' accounts."
    )
    assert [row["epsilon"] for row in table.to_json()] == [{}, {"site": 7.978}]


def test_two_kinds_of_promise_in_one_table_are_told_apart() -> None:
    other = {**SITE, "delta": 1e-3}
    text = privacy.terms([record("a", {"site": SITE}), record("b", {"site": other})])
    assert "δ = 1e-05, Poisson" in text and " or δ = 0.001, Poisson" in text


def test_an_account_without_a_bound_is_infinite_and_never_absent() -> None:
    """JSON has no infinity: the run directory holds null."""
    run = record("central-dp", {"site": {**SITE, "epsilon": None}})
    assert "<dd>∞<small>δ = 1e-05" in page.of_run(run)
    both = [run, record("central-dp", {"site": SITE}, seed=1)]
    assert privacy.largest(both) == {"site": None}
    assert "∞" in tabulate(both).cells()[0]


def test_what_a_run_brings_along_stays_text() -> None:
    run = record("central-dp", {"site": {**SITE, "adjacency": "<script>alert(1)</script>"}})
    assert "<script" not in page.of_run(run)
    assert "<script" not in page.of_comparison([run, record("x", {"site": SITE})], [])


def test_the_terminal_says_it_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text("")
    scores = {"loss": 1.0, "accuracy": 0.5}
    summary = {
        "status": "finished",
        "rounds": 2,
        "final": scores,
        "best": {"round": 2, **scores},
        "bytes": {"up": 1, "down": 1},
        "seconds": 1.0,
        "privacy": {"site": SITE},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    RunConsole().result(Run(tmp_path))
    assert f"privacy by client: {PROMISE}" in capsys.readouterr().out
