"""Every way in which people save a table gives the same rows; what is no table is named for what it is."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedft.core.data import labels
from fedft.core.data.raw import LISTED, BadRows
from fedft.core.data.source import RawData, check_test, load
from fedft.core.data.text_files import read_csv
from fedft.core.errors import ConfigError, FedftError, MismatchError
from fedft.core.spec import DataSpec, PartitionSpec

ROWS = [
    {"text": "plain words", "label": "pos"},
    {"text": 'with "quotes", commas; semicolons | bars', "label": "neg"},
    {"text": "two\nlines", "label": "pos"},
    {"text": "ünïcödé – 東京 🎈", "label": "neg"},
    {"text": "a tab\tinside", "label": "pos"},
    {"text": "the end, ", "label": "neg"},
]


def separated(
    separator: str, end: str = "\n", index: bool = False, quote: int = csv.QUOTE_MINIMAL
) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end, quoting=quote)  # type: ignore[arg-type]
    writer.writerow([""] * index + ["text", "label"])
    for i, row in enumerate(ROWS):
        writer.writerow([i] * index + [row["text"], row["label"]])
    return stream.getvalue().encode()


LINES = "\n".join(map(json.dumps, ROWS)).encode()
LISTED_ROWS = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()

WAYS: dict[str, tuple[str, bytes]] = {
    "lines": ("d.jsonl", LINES),
    "capitals": ("D.JSONL", LINES),
    "ndjson": ("d.ndjson", LINES),
    "lines in .json": ("d.json", LINES),
    "list": ("d.json", LISTED_ROWS),
    "list in .jsonl": ("d.jsonl", LISTED_ROWS),
    "list on one line": ("d.json", json.dumps(ROWS).encode()),
    "BOM and list": ("d.json", codecs.BOM_UTF8 + LISTED_ROWS),
    "BOM and lines": ("d.jsonl", codecs.BOM_UTF8 + LINES),
    "CRLF lines": ("d.jsonl", LINES.replace(b"\n", b"\r\n")),
    "blank lines": ("d.jsonl", LINES.replace(b"\n", b"\n\n \n")),
    "comma": ("d.csv", separated(",")),
    "semicolon": ("d.csv", separated(";")),
    "tab": ("d.csv", separated("\t")),
    "bar": ("d.csv", separated("|")),
    "tsv": ("d.tsv", separated("\t")),
    "TSV": ("d.TSV", separated("\t")),
    "tsv that is none": ("d.tsv", separated(",")),
    "all quoted": ("d.csv", separated(";", quote=csv.QUOTE_ALL)),
    "CRLF": ("d.csv", separated(",", "\r\n")),
    "BOM": ("d.csv", codecs.BOM_UTF8 + separated(";", "\r\n")),
    "sep": ("d.csv", b"sep=;\r\n" + separated(";", "\r\n")),
    "spaces in the header": ("d.csv", separated(",").replace(b"text,label", b"text, label ")),
    "index of pandas": ("d.csv", separated(",", index=True)),
    "index of pandas, tabs": ("d.tsv", separated("\t", index=True)),
    "empty column": ("d.csv", separated(",").replace(b",pos\n", b",pos,\n").replace(b",neg\n", b",neg,\n").replace(b"label\n", b"label,\n")),
    "blank first line": ("d.csv", b"\n" + separated(",")),
    "gz": ("d.jsonl.gz", gzip.compress(LINES)),
    "GZ": ("d.CSV.GZ", gzip.compress(separated(";"))),
    "list gz": ("d.json.gz", gzip.compress(LISTED_ROWS)),
    "bz2": ("d.jsonl.bz2", bz2.compress(LINES)),
    "xz": ("d.tsv.xz", lzma.compress(separated("\t"))),
    "gz unpacked by a browser": ("d.jsonl.gz", LINES),
    "gz without the name": ("d.csv", gzip.compress(separated(","))),
}  # fmt: skip


def loaded(path: Path, **keys: Any) -> RawData:
    return load(DataSpec(source=str(path), test_fraction=0, **keys), "classification")


def labelled(raw: RawData) -> list[tuple[str, str]]:
    assert raw.train.labels is not None
    return [
        (text, raw.classes[i])
        for text, i in zip(raw.train.values["text"], raw.train.labels, strict=True)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_a_table_is_read(way: str, tmp_path: Path) -> None:
    name, content = WAYS[way]
    (tmp_path / name).write_bytes(content)
    raw = loaded(tmp_path / name)
    wanted = [(row["text"], row["label"]) for row in ROWS]
    if "CRLF" in way or way in ("BOM", "sep"):
        wanted = [(text.replace("\r\n", "\n"), label) for text, label in wanted]
    assert labelled(raw) == wanted
    assert raw.notes == ()


@pytest.mark.parametrize("orient", ["records", "lines", "csv", "csv-index", "tsv", "parquet"])
def test_what_pandas_exports_is_read(orient: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([*ROWS, {"text": "unlabelled", "label": None}])
    name = {"records": "d.json", "lines": "d.jsonl", "tsv": "d.tsv", "parquet": "d.parquet"}
    path = tmp_path / name.get(orient, "d.csv")
    match orient:
        case "records":
            frame.to_json(path, orient="records")
        case "lines":
            frame.to_json(path, orient="records", lines=True)
        case "parquet":
            frame.to_parquet(path)
        case _:
            frame.to_csv(path, index="index" in orient, sep="\t" if orient == "tsv" else ",")
    raw = loaded(path, skip_bad=True)
    assert labelled(raw) == [(row["text"], row["label"]) for row in ROWS]
    assert raw.skipped == {"label": 1}


@given(
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(
        st.tuples(st.text("ab ,;\t|\"'\n:é", min_size=1, max_size=12), st.sampled_from("xy")),
        min_size=2,
        max_size=30,
    ),
)
def test_whatever_the_texts_hold_the_separator_is_found(
    separator: str, end: str, rows: list[tuple[str, str]]
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end)
    writer.writerows([("id", "text", "label"), *((i, *row) for i, row in enumerate(rows))])
    bad = BadRows(skip=True)
    table = read_csv("d", io.BytesIO(stream.getvalue().encode()), bad)
    assert not bad.counts
    assert table.columns["text"] == [text for text, _ in rows]


FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "Excel": ("d.csv", b"PK\x03\x04" + b"xl" * 50, "ZIP archive, as Excel's"),
    "old Excel": ("d.csv", b"\xd0\xcf\x11\xe0" + bytes(50), "old Excel"),
    "Parquet": ("d.jsonl", b"PAR1" + bytes(50), "a Parquet file"),
    "UTF-16": ("d.csv", "text,label\nä,b\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("d.csv", "text,label\nä,b\n".encode("utf-16-le"), "not text"),
    "pickle": ("d.jsonl", b"\x80\x04\x95" + bytes(9), "a pickle"),
    "zstd": ("d.jsonl", b"\x28\xb5\x2f\xfd" + b"x" * 9, "zstd"),
    "zip in gz": ("d.csv.gz", gzip.compress(b"PK\x03\x04abc"), "ZIP"),
    "zeros": ("d.jsonl", bytes(100), "not text"),
    "empty": ("d.json", b"", "it is empty"),
    "empty gz": ("d.jsonl.gz", gzip.compress(b""), "it is empty"),
    "cut gz": ("d.jsonl.gz", gzip.compress(LINES * 50)[:-20], "cannot be decompressed"),
    "damaged gz": ("d.jsonl.gz", gzip.compress(LINES)[:30] + b"?" * 99, "cannot be decompressed"),
    "damaged xz": ("d.jsonl.xz", lzma.compress(LINES)[:30] + b"?" * 99, "cannot be decompressed"),
    "damaged bz2": ("d.jsonl.bz2", bz2.compress(LINES)[:30] + b"?" * 99, "cannot"),
    "text as Parquet": ("d.parquet", LINES, "not a readable Parquet file"),
    "columns": ("d.json", json.dumps({"text": ["a"], "label": ["b"]}).encode(), "no column|missing|text is expected"),
    "object over lines": ("d.json", json.dumps({"data": ROWS}, indent=1).encode(), "one JSON object over several lines"),
    "half a list": ("d.json", LISTED_ROWS[:-9], "begins as a JSON list and is none: .* at line"),
    "list in Latin-1": ("d.json", LISTED_ROWS.replace(b"words", b"\xe9"), "not UTF-8"),
    "header in Latin-1": ("d.csv", b"t\xe9xt,label\na,b\n", "not UTF-8: byte 0xe9"),
    "header alone": ("d.csv", b"text,label\n", "has no rows"),
    "CR alone": ("d.csv", b"text,label\ra,b\rc,d\r", "CR alone"),
    "open quote": ("d.csv", b'text,label\nfine,a\n"not closed,b\nfine,a\nfine,b\n', "begins at line 3: is a quote left open"),
    "no header": ("d.csv", b"a secret of many many words that goes on and on,pos\nb,neg\n", "has no column 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_table_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    name, content, words = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MismatchError, match=words) as caught:
        loaded(tmp_path / name)
    assert caught.value.fix and "that goes on and on" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(MismatchError, match="a pipe or a device"):
        loaded(tmp_path / "d.jsonl")
    (tmp_path / "e.csv").mkdir()
    with pytest.raises(MismatchError, match="Is a directory"):
        loaded(tmp_path / "e.csv")


@pytest.mark.parametrize(
    "source", ["a\0b.jsonl", "~nobody-here/x.csv", "x" * 5000, "x" * 300 + ".csv", "\0"]
)
def test_no_source_brings_the_reader_down(source: str) -> None:
    with pytest.raises(FedftError):
        load(DataSpec(source=source), "classification")


def test_two_parquet_columns_of_one_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table([["a"], ["b"], ["c"]], names=["text", "label", "text"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(MismatchError, match="two columns called 'text'"):
        loaded(tmp_path / "d.parquet")


# Bad rows


def test_bad_rows_are_told_together_in_order_with_a_count(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[i % 2]) for i in range(60)]
    lines[3] = "{"
    for i in range(10, 30):
        lines[i] = '{"text": "secret", "label": null}'
    lines[40] = '{"text": "", "label": "pos"}'
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(MismatchError) as caught:
        loaded(tmp_path / "d.jsonl")
    first, *listed, more, fix = str(caught.value).splitlines()
    assert first == "22 bad rows (label 20, malformed 1, text 1):"
    places = [line.split(": ")[0].rpartition(":")[2] for line in listed]
    assert places == ["4", *map(str, range(11, 11 + LISTED - 1))]
    assert "and 12 more" in more and "--skip-bad" in fix and "secret" not in str(caught.value)
    assert loaded(tmp_path / "d.jsonl", skip_bad=True).skipped == {
        "malformed": 1,
        "label": 20,
        "text": 1,
    }


def test_bad_rows_of_both_files_are_one_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, ROWS), "{"]))
    (tmp_path / "b.jsonl").write_text(
        '{"text": "x", "label": "new"}\n{"text": "x", "label": "pos"}\n['
    )
    with pytest.raises(MismatchError) as caught:
        loaded(tmp_path / "a.jsonl", test_source=str(tmp_path / "b.jsonl"))
    said = str(caught.value)
    assert "3 bad rows" in said and "a.jsonl:7: malformed" in said and "b.jsonl:3: " in said
    assert (
        "b.jsonl:1: label: 'new' is none of the 2 classes (neg, pos) of the training data" in said
    )


def test_memory_does_not_grow_with_the_bad_rows() -> None:
    bad = BadRows(skip=False)
    for i in range(100_000):
        bad.add(f"d:{i}", "malformed", "x")
    assert sum(map(len, bad._first.values())) == LISTED
    with pytest.raises(MismatchError, match="100,000 bad rows"):
        bad.check()


def test_the_source_may_have_colons_in_it() -> None:
    bad = BadRows(skip=False)
    for where in ("wheel:x/b.yml", "C:/d.csv:10", "C:/d.csv:9"):
        bad.add(where, "malformed", "x")
    with pytest.raises(MismatchError) as caught:
        bad.check()
    assert str(caught.value).index("csv:9") < str(caught.value).index("csv:10")


def test_only_near_columns_are_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,response\na,b\nc,d\n")
    with pytest.raises(MismatchError) as caught:
        load(DataSpec(source=str(tmp_path / "d.csv")), "causal-lm")
    assert (
        "no column 'answer'" in caught.value.what and "it has prompt, response" in caught.value.what
    )
    assert 'data.answer = "' not in caught.value.fix


# Labels


def dataset(tmp_path: Path, values: list[Any], **keys: Any) -> RawData:
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return loaded(tmp_path / "d.jsonl", **keys)


LABELS: dict[str, tuple[list[Any], list[str], tuple[str, ...], list[str]]] = {
    # values, classes of the rows (None: a bad row), words of the notes
    "spaces": ([" pos", "pos", "neg\t", "neg "], ["pos", "pos", "neg", "neg"], ("neg", "pos"), ["' pos' and 'pos' are taken for one class, 'pos'", "one class, 'neg'"]),
    "spaces alone": ([" pos", " neg"], ["pos", "neg"], ("neg", "pos"), []),
    "integers": ([1, 0, 10, 2], ["1", "0", "10", "2"], ("0", "1", "2", "10"), []),
    "integers as text": (["1", "0", "10", "2"], ["1", "0", "10", "2"], ("0", "1", "2", "10"), []),
    "whole floats": ([1.0, 0.0, 10.0], ["1", "0", "10"], ("0", "1", "10"), []),
    "whole floats as text": (["1.0", "0.0", "10.0"], ["1", "0", "10"], ("0", "1", "10"), []),
    "mixed numbers": ([1, "1", 1.0, "0"], ["1", "1", "1", "0"], ("0", "1"), ["1, '1' and 1.0 are taken for one class, '1'"]),
    "versions": (["1.0", "1.1", "2.0"], ["1.0", "1.1", "2.0"], ("1.0", "1.1", "2.0"), []),
    "leading zeros": (["01", "1", "02"], ["01", "1", "02"], ("01", "1", "02"), []),
    "booleans": ([True, False, True], ["True", "False", "True"], ("False", "True"), []),
    "booleans and text": ([True, "False", "True"], ["True", "False", "True"], ("False", "True"), ["True and 'True' are taken for one class"]),
    "booleans and integers": ([True, 1, 0], ["True", "1", "0"], ("0", "1", "True"), []),
    "case": (["Pos", "pos", "neg"], ["Pos", "pos", "neg"], ("Pos", "neg", "pos"), ["'Pos', 'pos' are different classes"]),
    "words for nothing": (["None", "some"], ["None", "some"], ("None", "some"), ["'None' is one of the classes; if it stands for a missing value"]),
    "unseen marks": (["\ufeffpos", "pos", "neg\u200b"], ["pos", "pos", "neg"], ("neg", "pos"), ["taken for one class, 'pos'"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels_become_classes_in_a_defined_way(kind: str, tmp_path: Path) -> None:
    values, rows, classes, words = LABELS[kind]
    raw = dataset(tmp_path, values)
    assert raw.classes == classes
    assert [label for _, label in labelled(raw)] == rows
    assert len(raw.notes) == len(words)
    for word in words:
        assert any(word in note for note in raw.notes), raw.notes


@pytest.mark.parametrize(
    "value", [None, "", "  ", float("nan"), "NaN", "nan", "<NA>", "NaT", "#N/A"]
)
def test_a_missing_label_is_a_bad_row(value: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"d\.jsonl:3: label: missing or empty"):
        dataset(tmp_path, ["a", "b", value])
    assert dataset(tmp_path, ["a", "b", value], skip_bad=True).skipped == {"label": 1}


@pytest.mark.parametrize("value", [0.5, [1], {"a": 1}, float("inf"), "\ud800", -0.5])
def test_what_can_be_no_class_is_a_bad_row(value: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"d\.jsonl:3: label: "):
        dataset(tmp_path, ["a", "b", value])


def test_owners_are_named_as_classes_are(tmp_path: Path) -> None:
    rows = [
        {"text": "t", "label": "ab"[i % 2], "who": who}
        for i, who in enumerate(["ann ", "ann", 7, "7", 7.0])
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = loaded(tmp_path / "d.jsonl", partition=PartitionSpec(kind="natural", column="who"))
    assert raw.train.owners == ["ann", "ann", "7", "7", "7"]
    assert any("one owner, 'ann'" in note for note in raw.notes)


def test_a_test_file_spells_the_classes_in_its_own_way(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\nx, 1.0\ny,0\n")
    raw = dataset(tmp_path, [0, 1, 2], test_source=str(tmp_path / "test.csv"))
    assert raw.test.labels is not None and raw.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize("format_", ["jsonl", "csv", "parquet"])
def test_the_format_does_not_decide_over_the_classes(format_: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    columns: list[tuple[list[Any], tuple[str, ...]]] = [
        ([1, 2, 10], ("1", "2", "10")),
        ([1.0, 2.0, None, 10.0], ("1", "2", "10")),
        ([True, False], ("False", "True")),
        ([" a", "b", "a"], ("a", "b")),
    ]
    for column, classes in columns:
        frame = pandas.DataFrame({"text": ["t"] * len(column), "label": column})
        path = tmp_path / f"d.{format_}"
        match format_:
            case "jsonl":
                frame.to_json(path, orient="records", lines=True)
            case "csv":
                frame.to_csv(path)
            case _:
                frame.to_parquet(path)
        assert loaded(path, skip_bad=True).classes == classes


@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        max_size=20,
    )
)
def test_names_of_names_are_the_same(values: list[Any]) -> None:
    once = labels.named(values)
    texts = [name for name in once if isinstance(name, str)]
    assert labels.named(texts) == texts
    assert labels.named(values, known=texts) == once
    labels.notes("d", ("class", "classes"), values, once)


def test_notes_are_few_and_short() -> None:
    random.seed(0)
    values = [f"{'x' * 200}{letter}{' ' * n}" for letter in string.ascii_letters for n in range(3)]
    said = labels.notes("d", ("class", "classes"), values, labels.named(values))
    assert (
        len(said) == 6 and all(len(note) < 400 for note in said) and "more such notes" in said[-1]
    )


# The test set


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"test_fraction": 0.0}, ConfigError, "test-fraction = 0 leaves the server no test set"),
        ({"test_fraction": 0.001}, MismatchError, "0.001 of 20 rows leaves the server no test row"),
        ({"test_source": "t.csv"}, MismatchError, r"test-source = 't\.csv' has no row"),
    ],
)
def test_a_run_that_could_not_be_scored_is_refused(
    keys: dict[str, Any], error: type[FedftError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        check_test(DataSpec(**keys), 0, 20)
    assert caught.value.fix
    check_test(DataSpec(**keys), 1, 20)


@pytest.mark.parametrize(
    ("source", "words"),
    [("/nowhere/t.xlsx", "none of the known kinds"), ("wheel:nothing-here", "no reader")],
)
def test_a_test_source_that_cannot_be_is_named_as_such(
    tmp_path: Path, source: str, words: str
) -> None:
    """Not as data.source, which is fine."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n')
    with pytest.raises(ConfigError, match=words) as caught:
        loaded(tmp_path / "a.jsonl", test_source=source)
    assert caught.value.what.startswith(f"data.test-source = {source!r}")
