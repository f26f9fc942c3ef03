"""Several labels a text, and numbers: what files have of them, strata, notes, pairs."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.clients.own import Own
from fedft.core.data.source import Data, prepare
from fedft.core.errors import MismatchError
from fedft.core.models import input_encoder, load_base
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.tasks import task_of
from tests.core.tasks.cases import CASES, rows_of


def data_of(name: str, folder: Path, source: Path, **spec: Any) -> Data:
    encoder = input_encoder(ModelSpec(source=str(folder), task=name), folder)
    given = {"test_fraction": 0.25, "max_length": 24} | spec
    return prepare(DataSpec(source=str(source), **given), name, encoder)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def as_csv(path: Path, rows: list[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            )
    return path


def as_parquet(path: Path, rows: list[Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["multi-label", "token-classification", "regression"])
def test_the_same_rows_in_every_kind_of_file(name: str, folder_of: Any, tmp_path: Path) -> None:
    rows, folder = rows_of(CASES[name]), folder_of(name)
    usual = data_of(name, folder, jsonl(tmp_path / "rows.jsonl", rows))
    for made in (as_csv(tmp_path / "r.csv", rows), as_parquet(tmp_path / "r.parquet", rows)):
        found = data_of(name, folder, made)
        assert found.fingerprint == usual.fingerprint, made.name
        assert found.per_class == usual.per_class
    tested = data_of(name, folder, tmp_path / "r.csv", test_source=str(tmp_path / "r.csv"))
    assert len(tested.test) == len(rows)


def test_class_ids_of_datasets_are_named(folder_of: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["O", "B-animal", "I-animal", "B-tool", "I-tool", "B-plant", "I-plant"]
    rows = rows_of(CASES["token-classification"])
    ids = [{**row, "tags": [names.index(tag) for tag in row["tags"]]} for row in rows]
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        tags=datasets.List(datasets.ClassLabel(names=names)),
    )
    made = datasets.Dataset.from_list(ids, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train.parquet")
    folder = folder_of("token-classification")
    usual = data_of("token-classification", folder, jsonl(tmp_path / "rows.jsonl", rows))
    found = data_of("token-classification", folder, tmp_path / "set")
    assert found.fingerprint == usual.fingerprint


def test_a_client_names_its_own_columns(folder_of: Any, tmp_path: Path) -> None:
    """``fedft join --column tokens=words --column tags=ner``."""
    name, rows = "token-classification", rows_of(CASES["token-classification"])
    theirs = [{"words": row["tokens"], "ner": row["tags"]} for row in rows]
    source = jsonl(tmp_path / "theirs.jsonl", theirs)
    usual = data_of(name, folder_of(name), jsonl(tmp_path / "r.jsonl", rows), test_fraction=0.0)
    own = Own(columns={"tokens": "words", "tags": "ner"})
    folder = folder_of(name)
    encoder = input_encoder(ModelSpec(source=str(folder), task=name), folder)
    spec = own.data(DataSpec(max_length=24), str(source))
    assert prepare(spec, name, encoder).fingerprint == usual.fingerprint
    with pytest.raises(MismatchError, match=r"no column 'tokens' \(data\.columns\.tokens\)"):
        prepare(Own().data(DataSpec(max_length=24), str(source)), name, encoder)


# ------------------------------------------------------------------------------- multi-label


def test_rows_without_a_label_are_learnt_too(folder_of: Any, tmp_path: Path) -> None:
    rows = rows_of(CASES["multi-label"], 16)
    data = data_of("multi-label", folder_of("multi-label"), jsonl(tmp_path / "r.jsonl", rows))
    labels = torch.cat(
        [part.collate(np.arange(len(part))).labels for part in (data.train, data.test)]
    )
    assert len(labels) == 16 and labels.dtype == torch.float32
    assert (labels.sum(1) == 0).sum() == 2, "of 16 rows two have none of three labels"
    assert labels.sum(0).tolist() == [8, 8, 8]


def test_strata_are_sets_and_rare_sets_go_by_their_rarest_class() -> None:
    from fedft.core.tasks.rows import RawRows

    sets = [[0]] * 12 + [[0, 1]] * 10 + [[]] * 2 + [[0, 2]] * 3 + [[1, 2]] * 9 + [[0, 3]]
    rows = RawRows(
        {"text": ["x"] * len(sets)}, [np.array(own, np.int64) for own in sets],
        ("a", "b", "c", "d"), None, "rows", np.arange(len(sets)), Path(),
    )  # fmt: skip
    found = task_of("multi-label").strata(rows)
    assert found is not None
    of = {frozenset(own): int(code) for own, code in zip(sets, found, strict=True)}
    assert of[frozenset({0, 2})] == of[frozenset({1, 2})], "of both the third class is the rarest"
    assert len(set(of.values())) == 5, "[0], [0, 1], none, the third class, the fourth"
    assert set(found.tolist()) == set(range(5))


def test_a_stratified_split_gives_each_set_its_share(folder_of: Any, tmp_path: Path) -> None:
    rows = rows_of(CASES["multi-label"], 160)  # eight sets, twenty rows each
    data = data_of("multi-label", folder_of("multi-label"), jsonl(tmp_path / "r.jsonl", rows))
    labels = data.test.collate(np.arange(len(data.test))).labels
    _, counts = labels.unique(dim=0, return_counts=True)
    assert len(counts) == 8 and counts.min() >= 4 and counts.max() <= 6


# -------------------------------------------------------------------------------- regression


def test_numbers_as_text_and_their_notes(folder_of: Any, tmp_path: Path) -> None:
    texts = ["3", " -2.5 ", "1e3", "1_000", "٣"]
    rows = [{"text": "fur tail", "target": value} for value in texts]
    source = jsonl(tmp_path / "r.jsonl", rows)
    data = data_of("regression", folder_of("regression"), source, test_fraction=0.0)
    assert data.train.collate(np.arange(5)).labels.tolist() == [3, -2.5, 1000, 1000, 3]
    assert data.classes == () and data.per_class == () and data.strata is None
    (note,) = data.notes
    assert note.startswith("training rows: targets have mean 400.7 and standard deviation 489.")
    small = jsonl(tmp_path / "s.jsonl", [{"text": "fur", "target": x} for x in (0.5, 9, -3)])
    assert not data_of("regression", folder_of("regression"), small, test_fraction=0.0).notes


def test_a_pair_is_read_where_it_is_named(folder_of: Any, tmp_path: Path) -> None:
    rows = [
        {"text": "fur tail", "pair": f"paw {'claw ' * (i % 3)}", "target": i / 10} for i in range(8)
    ]
    folder, source = folder_of("regression"), jsonl(tmp_path / "r.jsonl", rows)
    alone = data_of("regression", folder, source, test_fraction=0.0)
    paired = data_of("regression", folder, source, test_fraction=0.0, columns={"pair": "pair"})
    assert "token_type_ids" not in alone.train.collate(np.arange(8)).inputs
    batch = paired.train.collate(np.arange(8))
    assert set(batch.inputs["token_type_ids"].unique().tolist()) == {0, 1}
    assert (paired.train.lengths > alone.train.lengths).all()
    with pytest.raises(MismatchError, match=r"no column 'other' \(data\.columns\.pair\)"):
        data_of("regression", folder, source, columns={"pair": "other"})
    broken = jsonl(tmp_path / "b.jsonl", [*rows, {"text": "fur", "pair": "", "target": 1}])
    with pytest.raises(MismatchError, match=r"b.jsonl:9: pair: missing or empty"):
        data_of("regression", folder, broken, columns={"pair": "pair"})


# ------------------------------------------------------------- as transformers has the losses


@pytest.mark.parametrize("name", ["multi-label", "regression", "token-classification"])
def test_the_loss_is_that_of_transformers(name: str, folder_of: Any, tmp_path: Path) -> None:
    """The model that a stock program loads, with its own loss: the same number."""
    folder = folder_of(name)
    data = data_of(name, folder, jsonl(tmp_path / "r.jsonl", rows_of(CASES[name], 24)))
    lora = LoraSpec(rank=2, target_modules=("query",))
    model: Any = load_base(ModelSpec(source=str(folder), task=name), lora, len(data.classes)).model
    batch = data.train.collate(np.arange(9))
    with torch.inference_mode():
        theirs = model(**batch.inputs, labels=batch.labels)
    task = task_of(name)
    tally = task.judged(theirs.logits, batch.labels, data.classes)
    assert tally.loss_sum / tally.count == pytest.approx(float(theirs.loss), rel=1e-5)
    wanted = {"multi-label": "multi_label_classification", "regression": "regression"}
    if name in wanted:
        assert model.config.problem_type == wanted[name]
