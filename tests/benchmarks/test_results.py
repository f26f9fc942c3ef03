"""What the benchmarks do with their figures: kept by section, judged, drawn."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import engines, page, record, targets
from benchmarks.record import RESULTS, Results, chosen
from benchmarks.turns import spread, take_turns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results with round figures."""

    def row(name: str, precision: str, ms: float, **over: float) -> dict[str, Any]:
        return {
            "contender": name,
            "precision": precision,
            "ms_a_sample": spread([ms, ms]),
            "over": {key.replace("_", " "): value for key, value in over.items()},
            "share_of_gemm": {"peak": 2 / ms, "model": 3 / ms},
        }

    rows = [
        row("peft", "fp32", 20, peft_fp32=1, peft=1),
        row("cohort 8", "fp32", 10, peft_fp32=2, peft=2, one_adapter=1.5),
        row("peft", "bf16", 8, peft_fp32=2.5, peft=1),
        row("cohort 8", "bf16", 5, peft_fp32=4, peft=1.6, one_adapter=0.9),
        row("cohort 16", "bf16", 4, peft_fp32=5, peft=1.9, one_adapter=1.1),
    ]
    Results("cohort", tmp_path).add("minilm/qv/real/8", {"rows": rows})
    ways = {"loops": 12.0, "flower": 20.0, "flower, kept, bf16": 15.0, "fedft, bf16": 4.0}
    timed = [
        {"way": way, "batch": batch, "ms_a_sample": spread([ms * (2 if batch == 1 else 1)])}
        for way, ms in ways.items()
        for batch in (8, 1)
    ]
    Results("engines", tmp_path).add("8 sites", {"sites": 8, "rows": engines.over(timed)})
    cost = {"worker": spread([1.0]), "driver": spread([0.01]), "ray": spread([0.1])}
    ratios = {"worker": spread([1.0]), "worker + driver": spread([1.01])}
    section = {"loop_cpu_s": spread([1.0]), "round_cpu_s": cost, "over_loop": ratios}
    Results("federation", tmp_path).add("ray-8", section)
    few = {"start_s": spread([2.0]), "round_s": spread([1.0]), "peak_mib": spread([600.0])}
    many = {"start_s": spread([2.5]), "round_s": spread([1.0]), "peak_mib": spread([660.0])}
    Results("registered", tmp_path).add("10", {"fleets": {"1000": few, "1000000": many}})

    def peak(held: int | str, predicted: float, measured: float) -> dict[str, Any]:
        own = {
            "predicted_mib": predicted,
            "measured_mib": measured,
            "error": predicted / measured - 1,
        }
        return {"batch": 8, "held" if isinstance(held, str) else "blocks": held, **own}

    memory = Results("memory", tmp_path)
    memory.add("decoder", {"rows": [peak(1, 33.0, 30.0), peak(4, 100.0, 100.0)]})
    memory.add("decoder-checkpointing", {"rows": [peak(1, 20.0, 25.0), peak(4, 50.0, 50.0)]})
    memory.add("decoder-halves", {"rows": [peak("attention", 90.0, 60.0)]})
    return tmp_path


def test_sections_are_kept_and_replaced_one_by_one(tmp_path: Path) -> None:
    Results("x", tmp_path).add("a", {"value": 1})
    Results("x", tmp_path).add("b", {"value": 2})
    Results("x", tmp_path).add("a", {"value": 3})
    sections = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["sections"]
    assert {key: own["value"] for key, own in sections.items()} == {"a": 3, "b": 2}


def test_what_another_machine_measured_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Results("x", tmp_path).add("a", {})
    here = record.environment()
    assert Results("x", tmp_path).measured_here("a")
    assert not Results("x", tmp_path).measured_here("b")
    other_revision = {**here, "git": {"commit": "0", "dirty": False}}
    monkeypatch.setattr(record, "environment", lambda: other_revision)
    assert Results("x", tmp_path).measured_here("a")
    other_torch = {**here, "versions": {**here["versions"], "torch": "0"}}
    monkeypatch.setattr(record, "environment", lambda: other_torch)
    assert not Results("x", tmp_path).measured_here("a")
    Results("x", tmp_path).add("a", {})
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [about["versions"]["torch"] for about in content["environments"].values()] == ["0"]


def test_sections_are_chosen_by_a_part_of_their_name() -> None:
    quick, full = ["a/8"], ["a/8", "a/1", "b/8"]
    assert chosen(quick, full, False, None) == ["a/8"]
    assert chosen(quick, full, True, None) == full
    assert chosen(quick, full, False, ["b", "/1"]) == ["a/1", "b/8"]
    with pytest.raises(SystemExit, match="there are: a/8, a/1, b/8"):
        chosen(quick, full, False, ["c"])


def test_contenders_take_turns_within_each_repeat() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = take_turns({"a": lambda: job("a"), "b": lambda: job("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert measured == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_targets_are_judged_by_the_figures(folder: Path) -> None:
    verdicts = {t.what: (t.measured, t.verdict) for t in targets.targets(folder)}
    assert verdicts["cohort bf16 over peft fp32, batch 8, real text"] == (5, "met")
    assert verdicts["cohort bf16 over peft bf16, batch 8, real text"] == (1.9, "missed")
    assert verdicts["cohort fp32 over peft fp32, batch 8, real text"] == (2, "met")
    assert verdicts["cohort bf16 over one adapter at batch K·8, the worse K"] == (0.9, "missed")
    assert verdicts["cohort bf16 over peft fp32, batch 1, real text"] == (None, "not measured")
    assert verdicts["moonshot: share of the GEMM peak, the best row"] == (0.5, "met")
    assert verdicts["fedft bf16 over Flower's engine, batch 8"] == (5.0, "met")
    assert verdicts["the same, aim, batch 8"] == (5.0, "missed")
    assert verdicts["CPU seconds of a round at K = 1 over the plain loop, ray, batch 8"] == (
        1.01,
        "met",
    )
    assert verdicts["memory of a million registered over a thousand"] == (60.0, "met")
    quarter = "memory of a client with a quarter of the blocks over the whole, the worst"
    assert verdicts[quarter] == (0.3, "met")  # of halves, or with checkpointing, nothing is asked
    assert verdicts["the same memory, aim"] == (0.3, "missed")
    assert verdicts["largest error of the memory predicted"] == (pytest.approx(0.2), "missed")


def test_without_results_every_target_is_open(tmp_path: Path) -> None:
    assert {t.verdict for t in targets.targets(tmp_path)} == {"not measured"}


def test_the_page_has_a_figure_and_a_table_for_each_benchmark(folder: Path) -> None:
    figures, text = page.page(folder)
    assert figures.keys() == {"engines", "cohort", "registered"}
    for name, svg in figures.items():
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert f"(figures/{name}.svg)" in text
    drawn = "".join(ElementTree.fromstring(figures["cohort"]).itertext())
    assert "cohort 16, bf16" in drawn
    assert "| minilm/qv/real/8 | cohort 16, bf16 | 4 (4–4) | 5.00× | 1.90× | 1.10× | 50% |" in text
    assert "| fedft, bf16, batch 8 | 8 sites | 4 (4–4) | 5.00× | – | 3.75× | 3.00× |" in text
    assert "| 10 of 1,000,000 | 2.5 (2.5–2.5) | 1 (1–1) | 660 (660–660) |" in text
    assert "| decoder | 8 | 1 / 4 | 33 / 100 | 30 / 100 | +10% | 0.30 |" in text
    assert "| decoder-halves | 8 | attention | 90 | 60 | +50% | – |" in text


def test_only_what_stands_between_the_markers_is_rewritten() -> None:
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter"
    assert page.filled(text, "new") == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter"
    with pytest.raises(ValueError, match="the page needs"):
        page.filled("no markers", "new")


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    committed = (page.DOCS / "performance.md").read_text(encoding="utf-8")
    assert page.filled(committed, page.page(RESULTS)[1]) == committed
