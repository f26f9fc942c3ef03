"""A data set is known by its rows, whatever file, order, format or column names they come in."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fedft.core.data.rowkeys import Keys, fingerprint, row_keys
from fedft.core.spec import DataSpec

ROWS = [
    {"text": f"the record of patient number {i} in this ward", "label": i % 2, "age": 20.5 + i}
    for i in range(12)
]


def keys(path: Path) -> Keys:
    return row_keys(DataSpec(source=str(path)), "classification")


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_same_rows_have_one_name_in_any_file_order_format_and_naming(tmp_path: Path) -> None:
    first = fingerprint(keys(jsonl(tmp_path / "a.jsonl", ROWS)))
    (tmp_path / "elsewhere").mkdir()
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    renamed = [{"a": r["label"], "b": r["text"], "c": r["age"], "none": None} for r in ROWS]
    for other in (
        jsonl(tmp_path / "elsewhere" / "b.jsonl", shuffled),
        jsonl(tmp_path / "twice.jsonl", ROWS + ROWS),
        jsonl(tmp_path / "renamed.jsonl", renamed),
        jsonl(tmp_path / "spaced.jsonl", [{**r, "text": f" {r['text']}\n".upper()} for r in ROWS]),
        as_csv(tmp_path / "a.csv", ROWS),
        as_parquet(tmp_path / "a.parquet", ROWS),
    ):
        assert fingerprint(keys(other)) == first, other.name
    changed = [{**ROWS[0], "age": 3.0}, *ROWS[1:]]
    for name, rows in {"less": ROWS[1:], "changed": changed}.items():
        assert fingerprint(keys(jsonl(tmp_path / f"{name}.jsonl", rows))) != first


@pytest.mark.parametrize(
    ("name", "rows", "shared"),
    [
        ("a column more", [{**r, "id": i} for i, r in enumerate(ROWS)], True),
        ("other labels", [{**r, "label": "yes"} for r in ROWS], True),
        ("one old row", [ROWS[3], *({**r, "text": str(r["text"]) + "!"} for r in ROWS)], True),
        ("other rows", [{**r, "text": str(r["text"]) + "!"} for r in ROWS], False),
        ("short values in common", [{"text": "yes", "label": i % 2} for i in range(5)], False),
    ],
)
def test_files_that_share_rows_share_keys(
    name: str, rows: list[dict[str, object]], shared: bool, tmp_path: Path
) -> None:
    own = keys(jsonl(tmp_path / "own.jsonl", ROWS))
    other = keys(jsonl(tmp_path / "other.jsonl", rows))
    assert bool(np.isin(other, own).any()) is shared


def test_short_texts_alone_do_not_tell_rows_apart_but_whole_rows_do(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "yes", "label": 0, "n": i} for i in range(5)]
    own = keys(jsonl(tmp_path / "own.jsonl", rows))
    assert len(own) == 5
    assert np.isin(keys(jsonl(tmp_path / "other.jsonl", rows[2:3])), own).all()


def test_images_are_known_by_their_content(tmp_path: Path) -> None:
    from PIL import Image

    spec = DataSpec(source="")
    seen: list[Keys] = []
    for folder, name in (("one", "x.png"), ("two", "y.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / folder / name)
        path = jsonl(tmp_path / folder / "rows.jsonl", [{"image": name, "label": 1}])
        spec = spec.model_copy(update={"source": str(path)})
        seen.append(row_keys(spec, "image-classification"))
    assert np.array_equal(*seen)
    Image.new("RGB", (4, 4), (9, 9, 8)).save(tmp_path / "two" / "y.png")
    assert not np.isin(row_keys(spec, "image-classification"), seen[0]).any()


def test_hostile_rows_have_keys(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(
        b'{"text": "\\ud800 half a pair", "label": [1, {"b": null}]}\n'
        b"not json\n"
        b'{"text": 1e400, "label": true}\n{}\n'
    )
    assert len(keys(path)) == 3
