"""The laws of a task: the same for every one, those that only the tests have among them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedft.core.data.source import Data, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import Examples
from fedft.core.metrics import Tally, packed, unpacked
from fedft.core.models import input_encoder
from fedft.core.spec import DataSpec, ModelSpec
from fedft.core.tasks import TASKS, Task, log_likelihoods, task_of
from fedft.core.types import IGNORED, Batch
from tests.core.tasks.cases import CASES, rows_of
from tests.core.tasks.other_tasks import OTHERS

ALL = [*TASKS, *OTHERS]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def data_of(name: str, folder: Path, tmp_path: Path, rows: list[Any] | None = None) -> Data:
    source = written(tmp_path / f"{name}.jsonl", rows_of(CASES[name]) if rows is None else rows)
    encoder = input_encoder(ModelSpec(source=str(folder), task=name), folder)
    return prepare(DataSpec(source=source, test_fraction=0.25, max_length=24), name, encoder)


def test_every_task_has_a_case() -> None:
    assert set(CASES) == set(ALL)


def outputs_for(task: Task, batch: Batch, classes: int, seed: int = 0) -> Tensor:
    """Outputs as a model would give them, [b, …] or [b, t, …]."""
    generator = torch.Generator().manual_seed(seed)
    positions, _ = task.targets(batch.labels)
    width = len(batch) if not task.alone else 1 if task.name == "regression" else max(classes, 40)
    if classes and task.alone:
        width = classes
    shape = (len(batch), width) if positions is None else (*batch.labels.shape, width)
    if task.made_up is not None:
        shape = (len(batch), *task.made_up)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lined_up(task: Task, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if task.refers:
        own = log_likelihoods(task, outputs, batch.labels)
        return task.referred(own, torch.zeros_like(own))
    positions, targets = task.targets(batch.labels)
    return outputs if positions is None else outputs.flatten(0, 1)[positions], targets


def tally(task: Task, outputs: Tensor, batch: Batch, names: Sequence[str]) -> Tally:
    return task.judged(outputs, batch.labels, names)


@pytest.mark.parametrize("name", ALL)
def test_targets_never_leave_padding(name: str, folder_of: Any, tmp_path: Path) -> None:
    """Whatever is behind the end of a row: nothing of it is scored, and scores do not change with it."""
    task, data = task_of(name), data_of(name, folder_of(name), tmp_path)
    batch = data.train.collate(np.arange(len(data.train)))
    positions, targets = task.targets(batch.labels)
    if positions is None:
        assert len(targets) == len(batch)
        return
    names = ("decoder_attention_mask", "attention_mask")
    real = next(batch.inputs[name] for name in names if name in batch.inputs).bool()
    assert not bool(real.all()), "no row is padded: the law would hold of anything"
    scored = positions[task.scored(targets)]
    assert len(scored) > 0 and bool(real.flatten()[scored].all())
    outputs = outputs_for(task, batch, len(data.classes))
    other = torch.where(real[..., None], outputs, torch.full_like(outputs, 7.0))
    assert tally(task, other, batch, data.classes) == tally(task, outputs, batch, data.classes)
    alone = [data.train.collate(np.array([row])) for row in range(len(data.train))]
    each = [task.targets(one.labels)[1] for one in alone]
    assert torch.equal(torch.cat([t[task.scored(t)] for t in each]), targets[task.scored(targets)])


def test_a_token_is_predicted_by_the_one_before_it() -> None:
    """By hand: the only place where labels are shifted."""
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, IGNORED, IGNORED]])
    positions, targets = task_of("causal-lm").targets(labels)
    assert positions is not None
    scored = targets != IGNORED
    assert positions[scored].tolist() == [1, 2, 4]
    assert targets[scored].tolist() == [5, 6, 7]
    control, _ = task_of("token-classification").targets(labels)
    assert control is not None and control[(labels != IGNORED).flatten()].tolist() == [2, 3, 5]


@pytest.mark.parametrize("name", [name for name in ALL if {**TASKS, **OTHERS}[name].alone])
def test_slices_add_up_to_the_whole(name: str, folder_of: Any, tmp_path: Path) -> None:
    task, data = task_of(name), data_of(name, folder_of(name), tmp_path)
    n = len(data.train)
    whole = data.train.collate(np.arange(n))
    outputs = outputs_for(task, whole, len(data.classes))
    expected = tally(task, outputs, whole, data.classes)
    parts: list[Tally] = []
    for rows in np.array_split(np.arange(n), 5):
        batch = data.train.collate(rows)
        own = outputs.unflatten(0, (n, task.each))[rows].flatten(0, 1)
        own = own if outputs.ndim == 2 else own[:, : batch.labels.shape[1]]
        parts.append(tally(task, own, batch, data.classes))
    total = Tally.total(parts)
    assert total.count == expected.count > 0
    assert total.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)
    assert set(total.sums) == set(task.sums)
    for sum_name, value in expected.sums.items():
        exact = task.sums[sum_name].whole
        assert total.sums[sum_name] == (value if exact else pytest.approx(value, rel=1e-12))
    loss = task.loss(*lined_up(task, outputs, whole), "mean")
    assert float(loss) == pytest.approx(expected.loss_sum / expected.count, rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_every_declared_metric_is_scored_and_sums_cross_the_wire(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    task, data = task_of(name), data_of(name, folder_of(name), tmp_path)
    batch = data.test.collate(np.arange(len(data.test)))
    found = tally(task, outputs_for(task, batch, len(data.classes)), batch, data.classes)
    scores = task.scores(found)
    assert list(scores) == ["loss", *(metric.name for metric in task.metrics)]
    assert all(np.isfinite(value) for value in scores.values())
    assert [d.name for d in task.declared] == [metric.name for metric in task.metrics]
    classes = len(data.classes)
    sent = packed(found, task.sums)
    assert unpacked(sent, task.sums, classes) == found
    assert task.scores(Tally()) == {}
    nothing = unpacked(packed(Tally(), task.sums), task.sums, classes)
    assert nothing is not None and nothing.count == 0
    first = task.metrics[0].declared
    key, step = first.by or first.name, 0.01 if first.higher else -0.01
    better = {**scores, key: scores[key] + step}
    assert task.better(better, scores) and not task.better(scores, better)
    assert task.better(scores, None) and not task.better(scores, scores)
    for lie in _lies(sent, task):
        assert unpacked(lie, task.sums, classes) is None


def _lies(sent: dict[str, Any], task: Task) -> list[dict[str, Any]]:
    """Replies that no honest client sends."""
    found = [{**sent, "num-examples": -1}, {k: v for k, v in sent.items() if k != "loss-sum"}]
    for name, one in task.sums.items():
        value = sent[name]
        found.append({k: v for k, v in sent.items() if k != name})
        if one.length is not None:
            found += [{**sent, name: value[:-1]}, {**sent, name: 3}, {**sent, name: [*value, 0]}]
            value = value[0]
        wrong = [-1, sent["num-examples"] + 1] if one.whole else [float("nan"), float("inf")]
        for number in wrong:
            told = number if one.length is None else [number, *sent[name][1:]]
            found.append({**sent, name: told})
    return found


@pytest.mark.parametrize("name", ALL)
def test_bad_rows_are_told_with_file_line_and_reason(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    good = rows_of(CASES[name], 24)
    for i, (bad, said) in enumerate(CASES[name].bad.values()):
        rows = [*good[:7], bad, *good[7:]]
        with pytest.raises(MismatchError) as caught:
            data_of(name, folder_of(name), tmp_path, rows)
        assert f"{name}.jsonl:8: " in str(caught.value), i
        assert said in str(caught.value), i
    column = TASKS[name].columns[0].key
    with pytest.raises(MismatchError, match=f"no column {column!r}"):
        data_of(name, folder_of(name), tmp_path, [{"other": 1, "x": 2}] * 4)


@pytest.mark.parametrize("name", ALL)
def test_subsets_and_fingerprints(name: str, folder_of: Any, tmp_path: Path) -> None:
    data = data_of(name, folder_of(name), tmp_path)
    train: Examples = data.train
    rows = np.array([3, 1, 4])
    a, b = train.collate(rows), train.subset(rows).collate(np.arange(3))
    assert torch.equal(a.labels, b.labels)
    for key, value in a.inputs.items():
        assert torch.equal(value, b.inputs[key]), key
    assert train.fingerprint() == data_of(name, folder_of(name), tmp_path).train.fingerprint()
    assert train.subset(rows).fingerprint() != train.subset(rows[::-1].copy()).fingerprint()


@pytest.mark.parametrize("name", ALL)
def test_there_may_be_no_test_row(name: str, folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of(name)
    source = written(tmp_path / "rows.jsonl", rows_of(CASES[name], 6))
    encoder = input_encoder(ModelSpec(source=str(folder), task=name), folder)
    data = prepare(DataSpec(source=source, test_fraction=0), name, encoder)
    assert (len(data.train), len(data.test)) == (6, 0)
    strata = data.strata
    assert strata is None or (len(strata) == 6 and strata.dtype == np.int64)
    assert len(data.per_class) == len(data.classes)


def test_an_unknown_task_is_told_with_a_near_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no task is called .clasification.(.*\n)*.*classification"
    ):
        task_of("clasification")
    with pytest.raises(ValueError, match="did you mean 'classification'"):
        ModelSpec(task="clasification")


def test_a_table_without_further_columns_is_written_as_ever() -> None:
    assert "columns" not in DataSpec().model_dump_json()
    named = DataSpec(columns={"pair": "b"})
    assert DataSpec.model_validate_json(named.model_dump_json()) == named
