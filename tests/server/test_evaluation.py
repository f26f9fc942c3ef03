"""`[evaluation]`: what a run is judged by, from the configuration into records, reports and exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fedft import api
from fedft.core import stock
from fedft.core.data.source import prepare, sampled
from fedft.core.errors import ConfigError, SecurityRefusal
from fedft.core.metrics import METRICS, MOST_GATHERED, Metric, Predictions, Sum, Tally
from fedft.core.models import input_encoder
from fedft.core.plugins import REMOTE
from fedft.core.spec import ModelSpec
from fedft.core.tasks import judged
from fedft.report.page import of_run
from fedft.report.records import read
from fedft.report.tables import summarise
from fedft.server import inputs
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from fedft.trackers.base import numbers
from tests.conftest import StopAfter

Table = Callable[..., dict[str, Any]]
ALL = ["accuracy", "macro-f1", "micro-f1", "weighted-f1", "balanced-accuracy", "mcc", "auroc"]
EVERY: dict[str, Any] = {
    "metrics": ALL,
    "best": "mcc",
    "per-class": True,
    "max-rows": 23,
    "before": True,
}


class Optimism(Metric):
    """How often the last class is predicted; its name is nobody's."""

    name = "optimism"
    higher = False
    sums: ClassVar = {"last": Sum()}

    def tally(self, found: Predictions) -> Any:
        return {"last": int((found.predicted == found.classes - 1).sum())}

    def value(self, tally: Tally) -> float:
        return tally.number("last") / tally.count


def lines_of(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def logits_of(run: Path, config: Any) -> tuple[Any, Any]:
    """The exported adapter's logits on the run's test rows, by stock transformers and peft."""
    folder = Path(config.model.source)
    spec = ModelSpec(source=str(folder))
    encoder = input_encoder(spec, folder)
    data = prepare(config.data, "classification", encoder, most_test_rows=23)
    (adapter,) = sorted((run / "adapters").iterdir())[-1:]
    model = stock.stock_model(adapter, spec, folder, len(data.classes), "fp32", encoder.special)
    rows = [data.test.collate(np.array([i])) for i in range(len(data.test))]
    with torch.inference_mode():
        logits = torch.cat([model(**batch.inputs).logits for batch in rows])
    return logits, torch.cat([batch.labels for batch in rows])


def test_a_run_is_judged_by_what_it_names(tiny_table: Table, tmp_path: Path) -> None:
    """Scores of every kind, in slices and through the wire, are those of the exported adapter."""
    config = parse_config(tiny_table(evaluation=EVERY, data={"holdout": 0.25}))
    run = simulate(config, tmp_path / "run").path
    lines = lines_of(run)
    assert [("start" in x, "eval" in x, "by_class" in x) for x in lines] == [
        *((True, False, False), (False, True, True), (False, False, False), (False, True, True)),
    ]
    last = lines[-1]
    assert list(last["eval"]) == ["loss", "mcc", *(n for n in ALL if n != "mcc")]
    logits, right = logits_of(run, config)
    said, classes = logits.argmax(-1), logits.shape[-1]
    assert len(right) == 23
    scores = last["eval"]
    assert scores["accuracy"] == sk.accuracy_score(right, said)
    assert scores["mcc"] == pytest.approx(sk.matthews_corrcoef(right, said), abs=1e-12)
    areas = sk.roc_auc_score(right, logits.double().softmax(-1), multi_class="ovr")
    assert scores["auroc"] == pytest.approx(areas, abs=1e-9)
    table = last["by_class"]
    matrix = sk.confusion_matrix(right, said, labels=range(classes))
    assert table["confusion"] == matrix.tolist()
    assert table["support"] == matrix.sum(1).tolist()
    assert table["predicted"] == matrix.sum(0).tolist()
    environment = json.loads((run / "environment.json").read_text())
    assert [metric["name"] for metric in environment["metrics"]][:2] == ["mcc", "accuracy"]
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best["mcc"] == max(x["eval"]["mcc"] for x in lines if "eval" in x)
    # Of a client's own rows no number of a single one leaves it, and so no rank of them either.
    assert "auroc" not in last["sites"] and "mcc" in last["sites"]
    assert {f"eval/{name}" for name in ALL} <= numbers(last).keys()  # type: ignore[arg-type]


def test_scores_do_not_depend_on_who_computes_them_nor_on_a_kill(
    tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(evaluation=EVERY)
    whole = simulate(parse_config(table), tmp_path / "whole").path
    table["engine"] = {"backend": "processes", "workers": 2, "cohort": 1}
    others = simulate(parse_config(table), tmp_path / "others").path
    assert lines_of(others) == lines_of(whole)
    table["engine"] = {"backend": "inline", "cohort": 1}
    stop = StopAfter(1)
    with pytest.raises(Exception, match="stopped"):
        simulate(parse_config(table), tmp_path / "cut", trackers=[stop], stop=stop)
    assert "start" in lines_of(tmp_path / "cut")[0]
    assert lines_of(resume(tmp_path / "cut").path) == lines_of(whole)


def test_what_is_measured_changes_no_model_and_by_default_no_record(
    tiny_table: Table, tmp_path: Path
) -> None:
    plain = simulate(parse_config(tiny_table()), tmp_path / "plain")
    more = simulate(parse_config(tiny_table(evaluation=EVERY)), tmp_path / "more")
    a, b = plain.summary(), more.summary()
    assert a is not None and b is not None
    assert a["adapter_sha256"] == b["adapter_sha256"]
    assert a.get("history_sha256") == b.get("history_sha256")
    assert all(x.keys() & {"start", "by_class"} == set() for x in lines_of(plain.path))
    assert list(lines_of(plain.path)[-1]["eval"]) == ["loss", "accuracy"]
    task = parse_config(tiny_table()).task().model_dump_json()
    for key in ("metrics", "per_class", "test_rows", "start"):
        assert f'"{key}"' not in task


def test_reports_and_tables_show_every_metric_and_the_start(
    tiny_table: Table, tmp_path: Path
) -> None:
    run = simulate(parse_config(tiny_table(evaluation=EVERY)), tmp_path / "run").path
    page = of_run(read(run))
    for name in ALL:
        assert name == "mcc" or f"id='score-{name}'" in page
    assert "id='score'" in page and "id='confusion'" in page and "<h2>By class</h2>" in page
    start = lines_of(run)[0]["start"]["mcc"]
    assert f", from {start:.2f}" in page or f", from {start:.3f}" in page or ", from " in page
    table = summarise([run])
    header = table.header()
    assert header[2:4] == ["Test MCC", "At the start"]
    assert {"Test AUROC (%)", "Test balanced accuracy (%)"} <= set(header)
    row = dict(zip(header, table.cells()[0], strict=True))
    assert row["At the start"] not in ("—", "")
    assert api.Run(run).adapter("best").round in (2, 4)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"metrics": ["rouge-l"]}, "'rouge-l' cannot judge what a model says in classification"),
        ({"metrics": ["spearman"]}, "'spearman' cannot judge"),
        ({"best": "perplexity"}, "'perplexity' cannot judge"),
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"metrics": ["mcc", "mcc"]}, "'mcc' is named twice"),
        ({"metrics": []}, "names none"),
        ({"metrics": "mcc"}, "a list is expected"),
        ({"max-rows": 0}, "greater than 0"),
    ],
)
def test_a_metric_that_a_run_cannot_have_is_refused_at_once(
    table: dict[str, Any], said: str, tiny_table: Table
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(tiny_table(evaluation=table))
    parse_config(tiny_table(evaluation={"metrics": ["mcc"], "best": "mcc", "max-rows": 1}))


def test_items_without_a_class_are_not_counted_by_class(tiny_table: Table) -> None:
    with pytest.raises(ConfigError, match="has no class an item"):
        parse_config(tiny_table(model={"task": "causal-lm"}, evaluation={"per-class": True}))


def test_a_metric_of_ones_own_by_class_object_and_path(tiny_table: Table, tmp_path: Path) -> None:
    path = f"{__name__}:Optimism"
    for given in (Optimism, Optimism(), path):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = {"evaluation.metrics": ["accuracy", given], "evaluation.best": path}
        run = api.simulate(parse_config(tiny_table()), run_dir=folder, settings=settings)
        assert list(run.metrics["final"] or {}) == ["loss", "optimism", "accuracy"]
    code = json.loads((folder / "environment.json").read_text())["plugins"]
    assert list(code) == [path]


def test_a_server_makes_no_client_import_a_metric() -> None:
    with pytest.raises(SecurityRefusal, match="is code from outside"):
        judged("classification", ["somewhere.else:Metric"], trust=REMOTE)


def test_names_that_would_hide_a_key_of_the_record_are_refused(tiny_table: Table) -> None:
    for name in ("loss", "n", "round", "per-class", "accuracy", "a b", ""):
        bad = type("Bad", (Optimism,), {"name": name})
        with pytest.raises(ConfigError, match="name"):
            parse_config(tiny_table(evaluation={"metrics": [bad]}))


def test_a_metric_of_single_items_is_refused_beyond_its_bound(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inputs, "MOST_GATHERED", 30)
    with pytest.raises(ConfigError, match="auroc keeps numbers of every test row") as told:
        simulate(parse_config(tiny_table(evaluation={"metrics": ["mcc", "auroc"]})), tmp_path / "a")
    most = int(told.value.fix.split("at most ")[1].split(",")[0])
    simulate(
        parse_config(
            tiny_table(evaluation={"metrics": ["auroc"], "max-rows": most}, rounds={"count": 1})
        ),
        tmp_path / "b",
    )


def test_gathering_without_end_stops() -> None:
    column = np.broadcast_to(np.zeros(1), (MOST_GATHERED // 2 + 1, 1))
    half = Tally(0.0, len(column), {}, {"numbers": [column]})
    Tally.total([half])
    with pytest.raises(Exception, match="more than 16,777,216 numbers"):
        Tally.total([half, half])


def test_a_score_that_is_not_defined_is_no_best() -> None:
    better, nan = METRICS["mcc"].declared.better, float("nan")
    assert better({"mcc": nan}, None)
    assert better({"mcc": -0.5}, {"mcc": nan}) and better({"mcc": -0.5}, {"mcc": None})  # type: ignore[dict-item]
    assert not better({"mcc": nan}, {"mcc": nan}) and not better({"mcc": nan}, {"mcc": -0.5})
    assert METRICS["mcc"].declared.shown(nan) == "–"


@pytest.mark.parametrize(("rows", "most"), [(41, 1), (41, 40), (41, 41), (1000, 37), (7, 3)])
def test_a_sample_has_its_size_and_every_class_its_share(rows: int, most: int) -> None:
    strata = np.random.default_rng(0).integers(5, size=rows) ** 2
    for seed in range(5):
        chosen = sampled(rows, most, seed, strata)
        assert len(chosen) == most == len(set(chosen.tolist()))
        assert (np.sort(chosen) == chosen).all()
        for k in set(strata.tolist()):
            share = most * float((strata == k).mean())
            assert abs(int((strata[chosen] == k).sum()) - share) < 1 + 1e-9
        assert (chosen == sampled(rows, most, seed, strata)).all()
        assert len(sampled(rows, most, seed)) == most
    if 1 < most < rows - 1:
        assert len({tuple(sampled(rows, most, seed, strata)) for seed in range(5)}) > 1
