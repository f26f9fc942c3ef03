"""Data: what is read, what is refused and with which words, what becomes of a row."""

import gzip
import json
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedft.clients.own import Own
from fedft.core.data import readers
from fedft.core.data.raw import BadRows
from fedft.core.data.readers import WORDNET
from fedft.core.data.source import RawData, codes, load, prepare, test_rows
from fedft.core.data.text_files import MAX_LINE_BYTES, read_csv, read_json, read_tsv
from fedft.core.errors import ConfigError, MismatchError, SecurityRefusal
from fedft.core.examples import IGNORED, TokenExamples
from fedft.core.spec import DataSpec, PartitionSpec

test_rows.__test__ = False  # type: ignore[attr-defined]  # a function of ours, not a test

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(20)]


def jsonl(path: Path, rows: list[Any]) -> DataSpec:
    """Writes rows, or raw lines where they are bytes."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return DataSpec(source=str(path), test_fraction=0)


def message(spec: DataSpec, task: Any = "classification", **keys: Any) -> str:
    with pytest.raises(MismatchError) as caught:
        load(spec, task, **keys)
    return str(caught.value)


# The vendored data


def test_wordnet_is_balanced_and_distinct() -> None:
    raw = load(DataSpec(test_fraction=0), "classification")
    assert len(raw.train) == 7200 == len(set(raw.train.values["text"]))
    assert len(raw.classes) == 12 and raw.train.labels is not None
    assert np.bincount(raw.train.labels).tolist() == [600] * 12
    assert all(name.startswith("noun.") for name in raw.classes)
    assert {len(text.split()) for text in raw.train.values["text"]} <= set(range(3, 31))


def test_the_licence_lies_beside_the_definitions() -> None:
    notice = (files("fedft.core.data") / "wordnet" / "LICENSE.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice


def test_the_definitions_are_what_the_script_makes() -> None:
    data_noun = Path("/usr/share/wordnet/data.noun")
    if not data_noun.exists():
        pytest.skip("Debian's wordnet-base is not installed")
    folder = files("fedft.core.data") / "wordnet"
    script: dict[str, Any] = {"__name__": "build"}
    exec((folder / "build.py").read_text(encoding="utf-8"), script)
    packed = (folder / "definitions.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    made = script["select"](script["definitions"](data_noun))
    assert [(row["text"], row["label"]) for row in rows] == made


# Files


def test_the_three_kinds_of_files_give_the_same(tmp_path: Path) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [*ROWS, {"text": 'a "quoted", long\nrow – ünï', "label": "b"}]
    spec = jsonl(tmp_path / "d.jsonl", rows)
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    loaded = [
        load(spec.model_copy(update={"source": str(tmp_path / name)}), "classification")
        for name in ("d.jsonl", "d.csv", "d.parquet")
    ]
    for raw in loaded:
        assert raw.train.values["text"] == [row["text"] for row in rows]
        assert raw.train.labels is not None
        assert [raw.classes[i] for i in raw.train.labels] == [row["label"] for row in rows]
    assert [raw.train.where(1).rsplit(":", 1)[1] for raw in loaded] == ["2", "3", "2"]


def test_integer_labels_are_classes_in_numerical_order(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": i} for i in (10, 9, 2, 10)]
    raw = load(jsonl(tmp_path / "d.jsonl", rows), "classification")
    assert raw.classes == ("2", "9", "10")
    assert raw.train.labels is not None and raw.train.labels.tolist() == [2, 1, 0, 2]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"text": "x", "label": "a"}', b"", b'{"text": "y", "label": "b"}']
    raw = load(jsonl(tmp_path / "d.jsonl", lines), "classification")
    assert raw.train.values["text"] == ["x", "y"] and raw.train.lines.tolist() == [1, 3]


BAD_LINES = {
    "malformed": (b'{"text": "secret words', "malformed JSON: "),
    "array": (b'["secret words"]', "a JSON object is expected, got list"),
    "deep": (b"[" * 100_000, "too deep"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "too long a number"),
    "utf-8": (
        b'{"text": "secret words \xff", "label": "a"}',
        "not UTF-8: byte 0xff at position 24",
    ),
    "utf-16": ("secret words".encode("utf-16"), "not UTF-8"),
    "surrogate": (b'{"text": "secret words \\ud800", "label": "a"}', "not a valid Unicode text"),
    "long": (b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than 1,000,000 bytes"),
    "no-text": (b'{"label": "a"}', "text: missing or empty"),
    "null": (b'{"text": null, "label": "a"}', "text: missing or empty"),
    "blank": (b'{"text": " \\t ", "label": "a"}', "nothing but white space"),
    "number": (b'{"text": 3, "label": "a"}', "text is expected, got int"),
    "no-label": (b'{"text": "secret words"}', "label: missing or empty"),
    "float": (
        b'{"text": "secret words", "label": 0.5}',
        "text or an integer is expected, got float",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_told_with_file_line_and_reason(name: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[name]
    said = message(jsonl(tmp_path / "d.jsonl", [*ROWS[:7], line, *ROWS]))
    assert f"{tmp_path / 'd.jsonl'}:8: " in said and reason in said
    assert "skip-bad" in said and "secret" not in said


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_on_request(name: str, tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", [*ROWS[:7], BAD_LINES[name][0], *ROWS[7:]])
    raw = load(spec.model_copy(update={"skip_bad": True}), "classification")
    assert raw.train.values["text"] == [row["text"] for row in ROWS]
    assert sum(raw.skipped.values()) == 1
    assert raw.train.lines.tolist() == [*range(1, 8), *range(9, 22)]


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    frame = b'{"label": "a", "text": ""}'
    line = frame[:-2] + b"x" * (MAX_LINE_BYTES - len(frame)) + b'"}'
    assert len(load(jsonl(tmp_path / "d.jsonl", [line, ROWS[1]]), "classification").train) == 2


@given(st.binary(max_size=200))
def test_no_bytes_bring_a_reader_down(content: bytes) -> None:
    import io

    bad = BadRows(skip=True)
    for reader in (read_json, read_csv, read_tsv, readers._read_parquet):
        try:
            table = reader("d", io.BytesIO(content), bad)
        except MismatchError:
            continue
        assert all(len(column) == len(table) for column in table.columns.values())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"only text", "1 fields where the header has 2"),
        (b"text,a,more", "3 fields"),
        (b"text \xff,a", "not UTF-8"),
        (b"x" * 200_000 + b",a", "field larger than field limit"),
        (b"x" * (MAX_LINE_BYTES + 1) + b",a", "longer than 1,000,000 bytes"),
    ],
)
def test_a_bad_csv_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"text,label\nfine,a\n\n" + line + b"\nalso fine,b\n")
    spec = DataSpec(source=str(path), test_fraction=0)
    said = message(spec)
    assert f"{path}:4: " in said and reason in said
    raw = load(spec.model_copy(update={"skip_bad": True}), "classification")
    assert raw.train.values["text"] == ["fine", "also fine"] and raw.train.lines.tolist() == [2, 5]


def test_a_csv_file_needs_a_header(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"a,a\n1,2\n")
    said = message(DataSpec(source=str(path)))
    assert "must name every column once, and 'a' stands there 2 times" in said


@pytest.mark.parametrize(
    ("name", "content"), [("d.jsonl", b""), ("d.jsonl", b"\n\n"), ("d.csv", b"text,label\n")]
)
def test_empty_data_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert f"{path} has no rows" in message(DataSpec(source=str(path)))


def test_nothing_left_after_skipping(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", [b"{", b"["]).model_copy(update={"skip_bad": True})
    assert "no rows left after skipping 2" in message(spec)
    spec = jsonl(tmp_path / "d.jsonl", [{"text": "", "label": "a"}]).model_copy(
        update={"skip_bad": True}
    )
    assert "no rows left after skipping {'text': 1}" in message(spec)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in message(DataSpec(source=str(tmp_path / "absent.jsonl")))


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing else")
    assert "not a readable Parquet file" in message(DataSpec(source=str(tmp_path / "d.parquet")))


def test_a_wrong_column_names_those_there_are_and_the_nearest(tmp_path: Path) -> None:
    rows = [{"sentence": "x", "topic": "y", "label": "a"}]
    said = message(jsonl(tmp_path / "d.jsonl", rows).model_copy(update={"text": "sentense"}))
    assert "no column 'sentense' (data.text); it has sentence, topic, label" in said
    assert 'set data.text = "sentence"' in said


def test_a_wrong_partition_column_is_a_configuration_error(tmp_path: Path) -> None:
    partition = PartitionSpec(kind="natural", column="ownr")
    spec = jsonl(tmp_path / "d.jsonl", [r | {"owner": "o"} for r in ROWS])
    with pytest.raises(ConfigError, match=r"data\.partition\.column") as caught:
        load(spec.model_copy(update={"partition": partition}), "classification")
    assert 'data.partition.column = "owner"' in caught.value.fix


@pytest.mark.parametrize("source", ["../secrets", "/etc/passwd", "a/b/c", "wheel:nope", ""])
def test_a_source_of_no_known_kind(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.source"):
        load(DataSpec(source=source), "classification")


def test_a_file_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("not a hub id")
    with pytest.raises(ConfigError, match=r"data\.txt"):
        load(DataSpec(source="data.txt"), "classification")


def test_one_class_is_none(tmp_path: Path) -> None:
    assert "classification needs two" in message(jsonl(tmp_path / "d.jsonl", [ROWS[0]] * 3))


def test_a_site_keeps_the_runs_classes(tmp_path: Path) -> None:
    """A site that holds one class of three still numbers it as the server does."""
    spec = Own().data(DataSpec(partition=PartitionSpec(column="gone")), str(tmp_path / "d.jsonl"))
    jsonl(tmp_path / "d.jsonl", [{"text": "x", "label": "b"}] * 4)
    raw = load(spec, "classification", classes=("a", "b", "c"))
    assert raw.train.labels is not None and raw.train.labels.tolist() == [1] * 4
    assert raw.classes == ("a", "b", "c") and len(raw.test) == 0
    said = message(spec, classes=("x", "y"))
    assert "d.jsonl:1: label: 'b' is none of the 2 classes" in said


# Other sources


@pytest.fixture
def chatterbot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package laid out like chatterbot-corpus, which may not be imported."""
    english = tmp_path / "chatterbot_corpus" / "data" / "english"
    english.mkdir(parents=True)
    (english.parents[1] / "__init__.py").write_text("raise RuntimeError('imported')")
    (english / "food.yml").write_text(
        "conversations:\n- - Are you hungry?\n  - No.\n  - Never.\n- - What is 2 + 2?\n  - 4\n"
    )
    (english / "ai.yml").write_text("conversations:\n- - What are you?\n  - A program.\n  - ''\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return english


def test_data_that_a_package_carries(chatterbot: Path) -> None:
    spec = DataSpec(
        source="wheel:chatterbot-corpus",
        test_fraction=0,
        partition=PartitionSpec(kind="natural", column="topic"),
    )
    raw = load(spec, "causal-lm")
    assert raw.train.values["prompt"] == [
        "What are you?",
        *["Are you hungry?"] * 2,
        "What is 2 + 2?",
    ]
    assert raw.train.values["answer"] == ["A program.", "No.", "Never.", "4"]
    assert raw.train.owners == ["ai", "food", "food", "food"]
    assert raw.classes == () and raw.train.labels is None
    assert "chatterbot_corpus" not in sys.modules


def test_malformed_yaml_names_the_file(chatterbot: Path) -> None:
    (chatterbot / "food.yml").write_text("conversations: [")
    spec = DataSpec(source="wheel:chatterbot-corpus", test_fraction=0)
    assert "wheel:chatterbot-corpus/food.yml: malformed YAML" in message(spec, "causal-lm")
    raw = load(spec.model_copy(update={"skip_bad": True}), "causal-lm")
    assert len(raw.train) == 1 and raw.skipped == {"malformed": 1}


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers._WHEELS, "absent-data", ("absent_data_", readers._read_chatterbot))
    assert "pip install absent-data" in message(DataSpec(source="wheel:absent-data"))


def test_offline_and_not_cached_gives_the_command_at_once() -> None:
    said = message(DataSpec(source="nobody/nothing", subset="sub", split="dev"))
    command = "datasets.load_dataset('nobody/nothing', 'sub', split='dev')"
    assert f'python -c "import datasets; {command}"' in said


def test_a_dead_network_is_found_out_by_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import httpx
    import huggingface_hub

    class Dead:
        calls = 0

        def head(self, url: str, timeout: float) -> None:
            Dead.calls += 1
            raise httpx.ConnectError("no route")

    def cached_only(*args: object, **keys: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Dead)
    monkeypatch.setattr(datasets, "load_dataset", cached_only)
    assert "hub cannot be reached" in message(DataSpec(source="nobody/nothing"))
    assert Dead.calls == 1
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_datasets_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    columns = {"text": ["x", "y", "z"], "label": [1, 0, -1]}
    made = datasets.Dataset.from_dict(columns, features=features)
    asked: list[object] = []

    def load_dataset(*args: object, **keys: object) -> Any:
        asked.extend([*args, keys])
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DataSpec(source="some/set", subset="s", split="dev", test_fraction=0, skip_bad=True)
    raw = load(spec, "classification")
    assert asked == ["some/set", "s", {"split": "dev"}]
    assert raw.classes == ("no", "yes") and raw.train.values["text"] == ["x", "y"]
    assert raw.train.labels is not None and raw.train.labels.tolist() == [1, 0]
    assert raw.skipped == {"label": 1}


# The central test set


def test_the_test_set_is_stratified_seeded_and_apart() -> None:
    one = load(DataSpec(), "classification", seed=1)
    assert one.test.labels is not None and np.bincount(one.test.labels).tolist() == [90] * 12
    assert len(set(one.train.values["text"]) | set(one.test.values["text"])) == 7200
    assert load(DataSpec(), "classification", seed=1).test.values["text"] == one.test.values["text"]
    assert load(DataSpec(), "classification", seed=2).test.values["text"] != one.test.values["text"]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abcdefgh")), min_size=1, max_size=150),
    st.floats(0, 0.6),
    st.integers(0, 9),
)
def test_the_split_loses_no_class_and_no_owner(
    rows: list[tuple[int, str]], fraction: float, seed: int
) -> None:
    labels, owners = np.array([r[0] for r in rows]), [r[1] for r in rows]
    held = test_rows(len(rows), fraction, seed, labels, owners)
    kept = np.flatnonzero(~held)
    assert set(labels[kept]) == set(labels) and {owners[i] for i in kept} == set(owners)
    assert held.sum() <= np.ceil(fraction * len(rows))


@given(st.lists(st.integers(3, 40), min_size=2, max_size=6), st.integers(0, 9))
def test_each_class_gives_about_its_share(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    held = test_rows(len(labels), 0.3, seed, labels)
    share = 0.3 * len(labels) / (len(labels) - len(sizes))
    for label, size in enumerate(sizes):
        assert abs(held[labels == label].sum() - share * (size - 1)) <= 1
    assert abs(held.sum() - 0.3 * len(labels)) <= 1


def test_a_test_file_of_its_own(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "test.jsonl", [{"text": "new", "label": "b"}])
    spec = spec.model_copy(
        update={"test_source": str(tmp_path / "test.jsonl"), "test_fraction": 0.5}
    )
    raw = load(spec, "classification")
    assert len(raw.train) == 20 and raw.test.values["text"] == ["new"]
    assert raw.test.labels is not None and raw.test.labels.tolist() == [1]
    jsonl(tmp_path / "test.jsonl", [{"text": "new", "label": "z"}])
    assert "test.jsonl:1: label: 'z' is none of the 2 classes" in message(spec)


def test_codes_go_by_text() -> None:
    got = codes(["b", "a", "b", "c"])
    assert got is not None and got.tolist() == [1, 0, 1, 2] and codes(None) is None


# Tokens


def tokenizer(template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, and the special ones."""
    special = ["<pad>", "<s>", "</s>", "<user>", "<bot>", "<end>"]
    vocabulary = {token: i for i, token in enumerate(special)}
    vocabulary |= {chr(c): len(special) + c - 10 for c in range(10, 127)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.add_special_tokens(special)
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    fast.chat_template = template
    return fast


CHAT = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def spoken(examples: TokenExamples, row: int, encoder: PreTrainedTokenizerFast) -> tuple[str, str]:
    """(the whole row, what is learned of it), decoded."""
    batch = examples.collate(np.array([row]))
    labels = batch.labels[0]
    whole, learned = batch.inputs["input_ids"][0], labels[labels != IGNORED]
    return "".join(encoder.batch_decode(whole[:, None])), "".join(
        encoder.batch_decode(learned[:, None])
    )


def qa(path: Path, *pairs: tuple[str, str], **keys: Any) -> DataSpec:
    spec = jsonl(path, [{"prompt": p, "answer": a} for p, a in pairs])
    return spec.model_copy(update=keys)


def test_classification_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    encoder = tokenizer(bos=True)
    data = prepare(jsonl(tmp_path / "d.jsonl", ROWS), "classification", encoder)
    assert isinstance(data.train, TokenExamples)
    for row, source in enumerate(ROWS):
        batch = data.train.collate(np.array([row]))
        assert batch.inputs["input_ids"][0].tolist() == encoder(source["text"])["input_ids"]
    assert data.train.pad_id == encoder.pad_token_id


def test_long_texts_are_cut(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", [{"text": "x" * 50, "label": name} for name in "ab"])
    data = prepare(
        spec.model_copy(update={"max_length": 10}), "classification", tokenizer(bos=True)
    )
    assert data.train.lengths.tolist() == [10, 10]


def test_chat_learns_the_answer_and_the_end_of_its_turn(tmp_path: Path) -> None:
    encoder = tokenizer(CHAT)
    data = prepare(qa(tmp_path / "d.jsonl", ("Hi?", "Yo"), ("A", "B\n")), "causal-lm", encoder)
    assert isinstance(data.train, TokenExamples)
    assert spoken(data.train, 0, encoder) == ("<user>Hi?<end>\n<bot>Yo<end>", "Yo<end>")
    assert spoken(data.train, 1, encoder) == ("<user>A<end>\n<bot>B\n<end>", "B\n<end>")


@pytest.mark.parametrize(("bos", "start"), [(False, ""), (True, "<s>")])
def test_without_a_template_a_row_is_prompt_newline_answer_eos(
    bos: bool, start: str, tmp_path: Path
) -> None:
    encoder = tokenizer(bos=bos)
    data = prepare(qa(tmp_path / "d.jsonl", ("Hi?", "Yo")), "causal-lm", encoder)
    assert isinstance(data.train, TokenExamples)
    assert spoken(data.train, 0, encoder) == (f"{start}Hi?\nYo</s>", "Yo</s>")


def test_a_template_that_forgets_the_end_gets_one(tmp_path: Path) -> None:
    encoder = tokenizer(CHAT.replace("{{ m.content }}<end>", "{{ m.content }}"))
    data = prepare(qa(tmp_path / "d.jsonl", ("Hi?", "Yo")), "causal-lm", encoder)
    assert isinstance(data.train, TokenExamples)
    assert spoken(data.train, 0, encoder)[1] == "Yo</s>"


def test_the_date_of_a_template_stands_still(tmp_path: Path) -> None:
    """Llama 3 writes today's date where it is told none; fingerprints would change overnight."""
    encoder = tokenizer(
        "{{ date_string if date_string is defined else strftime_now('%f') }}" + CHAT
    )
    data = prepare(qa(tmp_path / "d.jsonl", ("Hi?", "Yo")), "causal-lm", encoder)
    assert isinstance(data.train, TokenExamples)
    assert spoken(data.train, 0, encoder)[0].startswith("26 Jul 2024")


def test_a_template_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    encoder = tokenizer(CHAT.replace("%}<bot>{%", "%}<s><bot>{%"))
    with pytest.raises(MismatchError, match="chat template"):
        prepare(qa(tmp_path / "d.jsonl", ("Hi?", "Yo")), "causal-lm", encoder)


def test_the_answer_is_cut_and_never_to_nothing(tmp_path: Path) -> None:
    encoder = tokenizer()
    spec = qa(tmp_path / "d.jsonl", ("1234", "abcdef"), max_length=7)
    data = prepare(spec, "causal-lm", encoder)
    assert isinstance(data.train, TokenExamples)
    assert spoken(data.train, 0, encoder) == ("1234\nab", "ab")


def test_all_tokens_masked_is_a_bad_row(tmp_path: Path) -> None:
    pairs = [("a", "b"), ("12345678", "b"), ("c", "d")]
    spec = qa(tmp_path / "d.jsonl", *pairs, max_length=8)
    with pytest.raises(MismatchError, match=r"d\.jsonl:2: the prompt takes 9 tokens") as caught:
        prepare(spec, "causal-lm", tokenizer())
    assert "no token of the answer" in caught.value.what
    partition = PartitionSpec(kind="natural", column="prompt")
    skipping = spec.model_copy(update={"skip_bad": True, "partition": partition})
    data = prepare(skipping, "causal-lm", tokenizer())
    assert len(data.train) == 2 and data.skipped == {"tokens": 1}
    assert data.owners == ["a", "c"], "owners go with the rows that are left"


def test_no_training_row_left(tmp_path: Path) -> None:
    spec = qa(tmp_path / "d.jsonl", ("12345678", "b"), max_length=8, skip_bad=True)
    with pytest.raises(MismatchError, match="no training rows left"):
        prepare(spec, "causal-lm", tokenizer())


def test_the_fingerprint_is_that_of_the_encoded_data(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", ROWS)
    first = prepare(spec, "classification", tokenizer())
    assert first.fingerprint == prepare(spec, "classification", tokenizer()).fingerprint
    changed = [
        prepare(spec, "classification", tokenizer(bos=True)),
        prepare(spec, "classification", tokenizer(), classes=("a", "b", "c")),
        prepare(jsonl(tmp_path / "d.jsonl", ROWS[:-1]), "classification", tokenizer()),
    ]
    assert len({d.fingerprint for d in (first, *changed)}) == 4


# Images


def tint(image: Any) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)[:, None, None]


@pytest.fixture
def pictures(tmp_path: Path) -> DataSpec:
    from PIL import Image

    (tmp_path / "pics").mkdir()
    rows = []
    for i in range(4):
        Image.new("L", (3, 2), 50 * i).save(tmp_path / "pics" / f"{i}.png")
        rows.append({"image": f"pics/{i}.png", "label": "ab"[i % 2]})
    return jsonl(tmp_path / "d.jsonl", rows)


def test_images_by_path_become_pixel_values(pictures: DataSpec) -> None:
    data = prepare(pictures, "image-classification", tint)
    batch = data.train.collate(np.arange(4))
    assert batch.inputs["pixel_values"].shape == (4, 3, 1, 1)
    assert batch.inputs["pixel_values"][:, 1, 0, 0].tolist() == [0, 50, 100, 150]
    assert batch.labels.tolist() == [0, 1, 0, 1]
    assert data.fingerprint == prepare(pictures, "image-classification", tint).fingerprint


def test_images_in_other_forms(tmp_path: Path, pictures: DataSpec) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    content = (tmp_path / "pics" / "2.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": "2.png"}, "label": c} for c in "ab"]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    spec = pictures.model_copy(update={"source": str(tmp_path / "d.parquet")})
    packed = prepare(spec, "image-classification", tint).train.collate(np.arange(2))
    assert packed.inputs["pixel_values"][:, 0, 0, 0].tolist() == [100, 100]
    rows = [{"image": [[7, 8], [9, 10]], "label": "a"}, {"image": [[[1, 2, 3]]], "label": "b"}]
    nested = prepare(jsonl(tmp_path / "n.jsonl", rows), "image-classification", tint).train
    first, second = nested.collate(np.arange(2)).inputs["pixel_values"][..., 0, 0].tolist()
    assert (first, second) == ([7, 7, 7], [1, 2, 3])


def test_a_folder_of_images(
    pictures: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, number in (("cat", 1), ("dog", 3)):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "pics" / f"{number}.png").rename(tmp_path / "set" / name / "x.png")
    spec = DataSpec(source=str(tmp_path / "set"), test_fraction=0)
    data = prepare(spec, "image-classification", tint)
    assert data.classes == ("cat", "dog")
    assert data.train.collate(np.arange(2)).inputs["pixel_values"][:, 0, 0, 0].tolist() == [
        50,
        150,
    ]


@pytest.mark.parametrize(
    "value",
    ["pics/absent.png", "d.jsonl", [[1, 2], [3]], [[300]], [[0.5]], [[[1, 2]]], [], 3, None, {}],
)
def test_what_is_no_image_is_a_bad_row(value: Any, pictures: DataSpec, tmp_path: Path) -> None:
    rows = [*map(json.loads, (tmp_path / "d.jsonl").read_text().splitlines())]
    spec = jsonl(tmp_path / "d.jsonl", [*rows, {"image": value, "label": "a"}])
    said = message(spec, "image-classification")
    assert "d.jsonl:5: image: not a readable image" in said


@pytest.mark.parametrize(
    "path", ["../outside.png", "/etc/hostname", "pics/../../outside.png", "link.png"]
)
def test_an_image_path_may_not_leave_the_folder(
    path: str, pictures: DataSpec, tmp_path: Path
) -> None:
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes((tmp_path / "pics" / "0.png").read_bytes())
    (tmp_path / "link.png").symlink_to(outside)
    spec = jsonl(tmp_path / "d.jsonl", [{"image": path, "label": "a"}])
    # Not a bad row: skipping would hide an attack.
    for skip in (False, True):
        with pytest.raises(SecurityRefusal):
            load(spec.model_copy(update={"skip_bad": skip}), "image-classification")


def test_a_bomb_is_refused_by_its_header(
    pictures: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert "more pixels than PIL opens" in message(pictures, "image-classification")


def test_loading_is_lazy_about_heavy_libraries() -> None:
    """A gRPC client on a workstation reads its own file without datasets or pyarrow."""
    import subprocess

    code = (
        "import sys; from fedft.core.data.source import load; from fedft.core.spec import DataSpec;"
        "load(DataSpec(), 'classification'); from fedft.core.data import batches, partition;"
        "print([m for m in ('datasets', 'pyarrow', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_raw_data_are_frozen() -> None:
    raw: RawData = load(DataSpec(), "classification")
    with pytest.raises(AttributeError):
        raw.classes = ()  # type: ignore[misc]
    assert Counter(raw.skipped) == {} and raw.train.source == WORDNET
