"""Meters in reports: any of them is drawn from what it says of itself, and nothing is imported."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedft.core.meters import METERS, Curve, EffectiveRank, Heat, Plot
from fedft.report import charts, meter_figures
from fedft.report.drawn import drawn
from fedft.report.figures import Figure
from fedft.report.groups import Group, group
from fedft.report.records import Record, load, read
from fedft.report.tables import Table, summarise
from tests.test_report import HOSTILE, LAYERS, write_run

PLOT = Plot(
    title="Depth",
    quantity="Metres",
    axis="linear",
    low=0.0,
    better="lower",
    caption="How deep it lies.",
    quoted=(("width", ("wide",)),),
    curves=(
        Curve(("deep",), "deep", name="Depth (m)", title="Depth per round", column="Depth (m)"),
        Curve(("mud",), "mud", above=0.5, part=True, note="Mud: what lies on top."),
    ),
    heat=Heat(("by", "layer"), ("deep",), "Depth by layer", "Metres"),
)

DESCRIBED = [PLOT.to_json()]


def with_meter(
    path: Path,
    reading: Callable[[int], Any],
    plots: Any = None,
    key: str = "depth",
    **options: Any,
) -> Path:
    """A run with a meter that nobody here has heard of."""
    run = write_run(path, rounds=options.pop("rounds", 4), **options)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["meters"] = {key: reading(line["round"])}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = json.loads((run / "environment.json").read_text())
    environment["meters"] = [{"key": key, "plots": DESCRIBED if plots is None else list(plots)}]
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def depth(round_: int) -> dict[str, Any]:
    layers = {m: {"deep": float(k + round_)} for k, m in enumerate(LAYERS)}
    return {"deep": 2.0 * round_, "wide": 3.0, "mud": 0.1 * round_, "by": {"layer": layers}}


def comparison(tmp_path: Path, reading: Callable[[int], Any] = depth, **more: Any) -> list[Record]:
    for rule, scale in (("fedavg-lora", 1.0), ("flora", 3.0)):
        for seed in (0, 1):

            def one(round_: int, by: float = scale + 0.1 * seed) -> Any:
                found = reading(round_)
                return {**found, "deep": by * found["deep"]} if "deep" in found else found

            with_meter(tmp_path / f"{rule}-{seed}", one, rule=rule, seed=seed, **more)
    return load([tmp_path])[0]


def theirs(record: Record) -> dict[str, Figure]:
    """The curves that are not of the first meters."""
    found = [meter_figures.run_curves(record, one) for one in drawn([record]) if later(one.name)]
    return {figure.name: figure for figure in found if figure is not None}


def bands(groups: list[Group]) -> list[Figure]:
    """The same of a comparison."""
    look = charts.styles(groups)
    found = [
        meter_figures.curve_bands(groups, look, one, c)
        for one in drawn([run for g in groups for run in g.runs.values()])
        for c in one.plot.curves
        if later(one.name) and c.name
    ]
    return [figure for figure in found if figure is not None]


def later(name: str) -> bool:
    return name.startswith("meter-")


def texts(svg: str) -> list[str]:
    return [t.strip() for t in ElementTree.fromstring(svg).itertext() if t.strip()]


def alt(svg: str) -> str:
    label = ElementTree.fromstring(svg).get("aria-label")
    assert label is not None
    return label


def test_a_meter_of_others_is_drawn_from_its_description(tmp_path: Path) -> None:
    figures = {f.name: f for f in meter_figures.of_run(read(with_meter(tmp_path / "r", depth)))}
    assert list(figures) == [
        "bias",
        "lag",
        "drift",
        "meter-depth",
        "bias-layers",
        "meter-depth-layers",
    ]
    figure = figures["meter-depth"]
    assert figure.title == "Depth"
    assert figure.caption == "How deep it lies; mean width 3.0000. Lower is better."
    assert alt(figure.svg) == "Depth per round: deep 5.00 in the mean, 8.00 at most."
    assert "Metres" in texts(figure.svg)
    layers = figures["meter-depth-layers"]
    assert layers.title == "Depth by layer and round"
    assert "metres of 12 layers in 4 columns, between 1.00 and 15.0" in alt(layers.svg)


def test_a_part_is_drawn_and_explained_where_there_is_any(tmp_path: Path) -> None:
    run = with_meter(tmp_path / "r", lambda r: {"deep": 2.0, "mud": 0.4 * r})
    figure = theirs(read(run))["meter-depth"]
    assert figure.caption == "How deep it lies. Mud: what lies on top. Lower is better."
    assert alt(figure.svg).endswith(" Mud of it: 1.00 in the mean.")
    assert {"deep", "mud"} <= set(texts(figure.svg))
    alone = with_meter(tmp_path / "alone", lambda r: {"mud": 0.4 * r})
    assert theirs(read(alone)) == {}


def test_a_meter_of_others_is_compared_and_has_its_column(tmp_path: Path) -> None:
    records = comparison(tmp_path)
    groups = group(records)
    figures = meter_figures.compared(groups, charts.styles(groups), leading=False)
    names = [f.name for f in figures]
    assert names == ["lag-displacement", "meter-depth-deep"]
    figure = figures[1]
    assert figure.title == "Depth per round"
    assert figure.caption.startswith("Lower is better. Bands: 95 % interval over 2 seeds.")
    assert alt(figure.svg) == "Depth per round, in the last round: fedavg-lora 8.40, flora 24.4."
    assert figure.wide is not None
    assert [f.name for f in meter_figures.heats(groups)] == ["bias-layers", "meter-depth-layers"]
    table = summarise([tmp_path])
    column = table.header().index("Depth (m)")
    cells = {row[0]: row[column] for row in table.cells()}
    assert cells["fedavg-lora"].startswith("5.25 ± ")
    assert cells["flora"].startswith("15.25 ± ")
    row = table.to_json()[0]
    assert json.loads(json.dumps(row))["meters"]["Depth (m)"]["mean"] == pytest.approx(5.25)


def test_where_no_run_has_the_meter_there_is_no_column(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rounds=3)
    table: Table = summarise([tmp_path])
    titles = {c.column for kind in METERS for plot in kind.plots for c in plot.curves if c.column}
    assert titles == {"Effective rank", "Agreement"}
    assert not titles & set(table.header())


def test_a_meter_of_ours_needs_no_description(tmp_path: Path) -> None:
    def value(round_: int) -> dict[str, Any]:
        layers = {LAYERS[0]: 1.5, LAYERS[1]: None, LAYERS[2]: 2.5 + round_}
        return {"mean": 2.0 + round_, "layers": layers}

    run = with_meter(tmp_path / "r", value, plots=(), key="effective_rank")
    figures = {f.name: f for f in meter_figures.of_run(read(run))}
    assert figures["meter-effective_rank"].caption == EffectiveRank.plots[0].caption
    assert "effective rank of 2 layers in 4 columns" in alt(
        figures["meter-effective_rank-layers"].svg
    )


@pytest.mark.parametrize(
    ("axis", "values", "shown"),
    [
        ("linear", (-3.0, 5.0, 2.0, 0.0), "1.00 in the mean, 5.00 at most"),
        ("share", (0.25, 0.5, 0.75, 1.0), "62.5 % in the mean, 100.0 % at most"),
        ("ratio", (0.0, 1e-9, 0.0, 1e-8), "zero in the mean, zero at most"),
        ("ratio", (0.1, 10.0, 1e-7, 1.0), "2.8 in the mean, 10. at most"),
        ("log", (1e-9, 0.0, 1e3, -5.0), "500 in the mean, 1000 at most"),
    ],
)
def test_axes_of_every_kind(
    tmp_path: Path, axis: Any, values: tuple[float, ...], shown: str
) -> None:
    plot = Plot("Depth", "Metres", (Curve(("deep",), "deep", name="m", title="T"),), axis=axis)
    described = {"plots": (plot.to_json(),), "reading": lambda r: {"deep": values[r - 1]}}
    run = with_meter(tmp_path / "one" / "r", **described)
    figure = theirs(read(run))["meter-depth"]
    assert alt(figure.svg) == f"Depth per round: deep {shown}."
    several = group(comparison(tmp_path / "several", **described))
    (compared,) = bands(several)
    assert compared.name == "meter-depth-deep"
    assert ("Geometric mean." in compared.caption) == (axis in ("ratio", "log"))


@pytest.mark.parametrize("value", [None, "deep", [], {"deep": "x"}, {"deep": 1e999}, {"deep": {}}])
def test_a_reading_of_the_wrong_kind_is_left_out(tmp_path: Path, value: Any) -> None:
    run = with_meter(tmp_path / "r", lambda _: value)
    assert theirs(read(run)) == {}


@pytest.mark.parametrize(
    "rows",
    [
        *(None, "x", {"key": "depth"}, [None, 3, "x", []], [{"key": 3, "plots": []}]),
        [{"key": "depth", "plots": "x"}],
        [{"key": "depth", "plots": [None, 3, {}, {"title": "t"}]}],
        [{"key": "../depth", "plots": [PLOT.to_json()]}],
        [{"key": "x' onload='alert(1)", "plots": [PLOT.to_json()]}],
        [{"key": "bias", "plots": [PLOT.to_json()]}],
    ],
)
def test_what_describes_no_meter_of_others_draws_none(tmp_path: Path, rows: Any) -> None:
    run = with_meter(tmp_path / "r", depth)
    environment = json.loads((run / "environment.json").read_text()) | {"meters": rows}
    (run / "environment.json").write_text(json.dumps(environment))
    record = read(run)
    ours = [one.name for one in drawn([])]
    assert [one.name for one in drawn([record])] == ours
    assert theirs(record) == {}


def test_a_strangers_text_stays_text(tmp_path: Path) -> None:
    plot = PLOT.to_json()
    plot |= {"title": HOSTILE, "quantity": HOSTILE, "caption": HOSTILE}
    plot["quoted"] = [[HOSTILE, ["wide"]]]
    texts_ = dict.fromkeys(("label", "note", "name", "title", "caption", "column"), HOSTILE)
    plot["curves"] = [{**one, **texts_, "part": False, "above": None} for one in plot["curves"]]
    plot["heat"] |= {"title": HOSTILE, "quantity": HOSTILE}
    records = comparison(tmp_path, plots=[plot])
    groups = group(records)
    mine = [*theirs(records[0]).values(), *bands(groups)]
    mine += [f for f in meter_figures.heats(groups) if later(f.name)]
    assert len(mine) == 4
    for figure in mine:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", figure.name)
        for said in (figure.title, figure.caption, figure.svg, figure.wide or ""):
            assert "\x1b" not in said
            assert "\u202e" not in said
        root = ElementTree.fromstring(figure.svg)
        assert not [e for e in root.iter() if str(e.tag).endswith("script")]
    assert "\x1b" not in "".join(map("".join, [summarise([tmp_path]).header()]))


def test_nothing_is_imported_for_a_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run = with_meter(tmp_path / "r", depth)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config + '\n[evaluation]\nmeters = ["theirs:Depth"]\n')
    assert list(theirs(read(run))) == ["meter-depth"]
    assert "theirs" not in sys.modules


def test_runs_that_were_measured_by_others_are_still_one_group(tmp_path: Path) -> None:
    for seed, names in enumerate((["bias"], ["bias", "agreement"])):
        write_run(tmp_path / str(seed), seed=seed, rounds=2, evaluation={"meters": names})
    assert [(g.label, len(g.runs)) for g in group(load([tmp_path])[0])] == [("fedavg-lora", 2)]
