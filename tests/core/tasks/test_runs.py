"""Whole runs of every task: both engines agree, what is exported is stock, every metric is reported."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.api import Run
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.batches import _cutter
from fedft.core.data.source import prepare
from fedft.core.errors import ConfigError
from fedft.core.examples import Examples
from fedft.core.models import Base, initial_adapter, input_encoder, load_base
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.tasks import TASKS, task_of
from fedft.core.types import Adapter, Batch, LocalTraining, TrainPlan
from fedft.report import write_report
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from tests.core.tasks.cases import CASES, rows_of
from tests.core.tasks.other_tasks import OTHERS

ALL = [*TASKS, *OTHERS]
TASKS_READ = {name: task.reads for name, task in {**TASKS, **OTHERS}.items()}
ALONE = [name for name in ALL if {**TASKS, **OTHERS}[name].alone]


def table_of(name: str, model: Path, tmp_path: Path, cohort: int) -> dict[str, Any]:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows_of(CASES[name], 60))) + "\n")
    case = CASES[name]
    return {
        "model": {"source": str(model), "task": name},
        "lora": {"rank": 2, "target-modules": list(_targets(model, case.lora))},
        "data": {
            "source": str(source),
            "max-length": 24,
            "holdout": 0.25,
            "partition": {"kind": case.kind, "alpha": 5.0},
        },
        "fleet": {"clients": 3},
        "rounds": {"count": 2, "per-round": 3, "evaluate-every": 1},
        "training": {"batch-size": 4, "lr": 1e-2, "optimizer": "sgd"},
        "engine": {"backend": "inline", "cohort": cohort, "precision": "fp32"},
    }


def _targets(model: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """A vision transformer of newer versions calls them as decoders do."""
    kind = json.loads((model / "config.json").read_text())["model_type"]
    return ("q_proj", "v_proj") if kind == "vit" else names


@pytest.mark.parametrize("name", ALL)
def test_a_run_of_every_task(name: str, folder_of: Any, tmp_path: Path) -> None:
    """Its export loads in stock peft: the run itself compares scores, and says so in its summary."""
    task, tensors = task_of(name), {}
    for cohort in (1, 3):
        table = table_of(name, folder_of(name), tmp_path, cohort)
        run = Run(simulate(parse_config(table), tmp_path / f"run-{cohort}").path)
        keys = {"loss", *(metric.name for metric in task.metrics)}
        for line in run.rounds:
            assert set(line["eval"]) == keys and set(line["sites"]) == {*keys, "n"}
        assert run.metrics["verified"]["rows"] > 0
        assert list(run.declared) == list(task.declared)
        first = run.declared[0]
        best, final = run.metrics["best"], run.metrics["final"]
        assert not first.better(final, best)
        assert {k: v for k, v in best.items() if k != "round"} in [r["eval"] for r in run.rounds]
        tensors[cohort] = run.adapter("last").factors().tensors()
        page = tmp_path / f"page-{cohort}.html"
        write_report([run.directory], page)
        for metric in task.declared:
            assert f"Test {metric.title}" in page.read_text(encoding="utf-8")
        engine = json.loads((run.directory / "environment.json").read_text())["engine"]
        assert engine["engine"] == ("cohort" if cohort > 1 and task.alone else "loop")
        assert task.alone or cohort == 1 or "depends on others" in engine["why"]
        if cohort == 1:
            _its_card_loads_it(run, tmp_path / "export")
    for key, tensor in tensors[1].items():
        assert torch.allclose(tensors[3][key], tensor, atol=2e-5), key


def _its_card_loads_it(run: Run, folder: Path) -> None:
    """The lines of Python on the card, as they stand, give the adapter's own tensors."""
    run.adapter("last").save_pretrained(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    told: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))), told)
    mine, theirs = run.adapter("last").factors().tensors(), told["model"].state_dict()
    for key, tensor in mine.items():
        found = [value for name, value in theirs.items() if name.replace(".default", "") == key]
        head = [v for n, v in theirs.items() if n.replace(".modules_to_save.default", "") == key]
        assert torch.equal(torch.as_tensor((found + head)[-1]), tensor), key


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("kept", [False, True])
def test_clients_together_are_as_clients_alone(
    name: str, kept: bool, folder_of: Any, tmp_path: Path
) -> None:
    """In float64: three clients with ranks and batches of different size and length, and each alone.

    ``kept`` adapts the last block only, so that the cohort engine keeps what enters it.
    """
    if kept and TASKS_READ[name] == "image":
        pytest.skip("its small model has one block")
    folder = folder_of(name)
    _compare(name, folder, _targets(folder, CASES[name].lora), kept, tmp_path)


@pytest.mark.parametrize("name", ["multi-label", "regression", "token-classification"])
def test_decoders_with_a_head_too(name: str, folder_of: Any, tmp_path: Path) -> None:
    _compare(name, folder_of("causal-lm"), ("q_proj", "v_proj"), True, tmp_path)


def _compare(name: str, folder: Path, modules: tuple[str, ...], kept: bool, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows_of(CASES[name], 40))) + "\n")
    model = ModelSpec(source=str(folder), task=name)
    data = prepare(
        DataSpec(source=str(source), test_fraction=0.2, max_length=24),
        name,
        input_encoder(model, folder),
    )
    lora = LoraSpec(rank=2, target_modules=modules, layers=(1,) if kept else None)

    def base() -> Base:
        found = load_base(model, lora, len(data.classes), names=data.classes)
        found.model.double()
        return found

    loop, cohort = PeftEngine(base(), lora), CohortEngine(base(), lora)
    training = LocalTraining(lr=0.05, optimizer="sgd", clip_norm=None)
    starts: list[Adapter] = []
    for rank in (2, 1, 3):
        start = initial_adapter(loop.base.shapes, lora, rank, seed=1)
        starts.append(start.replaced({n: t.double() for n, t in start.tensors().items()}))
    plans = [TrainPlan(own, training=training, site=f"client-{k}") for k, own in enumerate(starts)]
    cuts = [[(0, 4), (4, 6)], [(6, 11)], [(11, 12), (12, 19)]]
    batches = [_cut(data.train, k, own) for k, own in enumerate(cuts)]
    together = cohort.train(plans, batches)
    two_stacks = bool(getattr(cohort.base.model.config, "is_encoder_decoder", False))
    assert bool(cohort._prefix._kept) == (kept and not two_stacks)
    for k, trained in enumerate(together):
        (alone,) = loop.train([plans[k]], [batches[k]])
        assert trained.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-8)
        start = plans[k].start
        before = start.tensors()
        for key, tensor in alone.adapter.tensors().items():
            assert torch.allclose(trained.adapter.tensors()[key], tensor, rtol=0, atol=1e-8), key
        moved = sum(float((t - before[n]).norm()) for n, t in alone.adapter.tensors().items())
        assert moved > 1e-4, "nothing was learnt: anything would agree"
        mine, theirs = (e.evaluate(start, {}, batches[k]) for e in (cohort, loop))
        assert mine.count == theirs.count > 0
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-6)
        for sum_name, value in theirs.sums.items():
            exact = task_of(name).sums[sum_name].whole
            assert mine.sums[sum_name] == (value if exact else pytest.approx(value, rel=1e-6))


def _cut(examples: Examples, client: int, cuts: list[tuple[int, int]]) -> list[Batch]:
    """Batches that know which rows of the client's they are, as a worker cuts them."""
    first, end = cuts[0][0], cuts[-1][1]
    cut = _cutter(examples, np.arange(first, end), examples.lengths[first:end], f"pool-{client}")
    return [_double(cut(np.arange(a, b) - first)) for a, b in cuts]


def _double(batch: Any) -> Any:
    """Images in float64; labels of other kinds stay as they are."""
    from dataclasses import replace

    own = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
    return replace(batch, inputs=own)


def test_examples_that_are_not_alone_are_not_protected_one_by_one(
    folder_of: Any, tmp_path: Path
) -> None:
    table = table_of("sentence-embeddings", folder_of("sentence-embeddings"), tmp_path, 1)
    table["training"]["dp"] = {"noise-multiplier": 1.0}
    table["data"]["holdout"] = 0.0
    with pytest.raises(
        ConfigError, match="in sentence-embeddings the loss of one depends on others"
    ):
        parse_config(table)
    control = table_of("classification", folder_of("classification"), tmp_path, 1)
    control["training"]["dp"], control["data"]["holdout"] = table["training"]["dp"], 0.0
    parse_config(control)
