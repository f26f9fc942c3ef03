"""Every task, judged by all that its predictions can be judged by, in both engines."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedft.core.errors import ConfigError
from fedft.core.metrics import METRICS
from fedft.core.tasks import TASKS, task_of
from fedft.report.page import of_run
from fedft.report.records import read
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from tests.core.tasks.cases import CASES
from tests.core.tasks.test_runs import table_of

# By kind of predictions; pairs of texts and images are judged as texts are.
NAMES = [
    name for name in TASKS if name in CASES and name not in ("text-pair", "image-classification")
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_judged_by_all_that_its_task_can_have(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    task, scores = task_of(name), {}
    metrics = [metric.name for metric in METRICS.values() if task.can_be_judged_by(metric)]
    counted = "class" in task.predicts
    for cohort in (1, 3):
        table = table_of(name, folder_of(name), tmp_path, cohort)
        table["rounds"] = {"count": 1, "per-round": 3}
        table["data"]["holdout"] = 0.25
        table["evaluation"] = {
            "metrics": metrics, "best": metrics[-1], "before": True, "per-class": counted,
            "max-rows": 9, "max-new-tokens": 4,
        }  # fmt: skip
        run = simulate(parse_config(table), tmp_path / f"run-{cohort}").path
        (line,) = [json.loads(x) for x in (run / "rounds.jsonl").read_text().splitlines()]
        assert set(line["eval"]) == {"loss", *metrics} == set(line["start"])
        assert list(line["eval"])[1] == metrics[-1]
        gathered = {n for n in metrics if METRICS[n].gathers}
        assert set(line["sites"]) == {"loss", "n", *metrics} - gathered
        assert ("by_class" in line) == counted
        page = of_run(read(run))
        assert all(f"id='score-{n}'" in page for n in metrics[:-1] if line["eval"][n] is not None)
        shares = {n: line["eval"][n] for n in metrics if METRICS[n].percent}
        assert all(0 <= share <= 1 for share in shares.values() if share is not None), shares
        scores[cohort] = line["start"]
    assert len(metrics) >= 2
    for key, value in scores[1].items():
        theirs = scores[3][key]
        assert (value is None) == (theirs is None)
        assert value is None or math.isclose(value, theirs, rel_tol=1e-5, abs_tol=1e-6), key


@pytest.mark.parametrize("prompted", [False, True])
def test_texts_are_judged_where_something_stands_before_them(
    prompted: bool, folder_of: Any, tmp_path: Path
) -> None:
    """Plain text has no prompt that the model could go on from: told before anything is trained."""
    table = table_of("causal-lm", folder_of("causal-lm"), tmp_path, 1)
    table["data"] |= {
        "format": "prompt-answer" if prompted else "text",
        "partition": {"kind": "iid"},
    }
    rows = [{"prompt": "old fur", "answer": "leaf root", "text": "leaf root seed"}] * 30
    Path(table["data"]["source"]).write_text("\n".join(map(json.dumps, rows)) + "\n")
    table["rounds"] = {"count": 1, "per-round": 1}
    table["evaluation"] = {"metrics": ["exact-match"], "max-new-tokens": 2}
    if prompted:
        run = simulate(parse_config(table), tmp_path / "run").path
        assert json.loads((run / "rounds.jsonl").read_text())["eval"]["exact-match"] is not None
        return
    with pytest.raises(ConfigError, match="exact-match: the model is to go on from a prompt"):
        simulate(parse_config(table), tmp_path / "run")
