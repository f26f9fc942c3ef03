"""Rows for a decoder are recognised by their columns, whatever form they come in."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedft.core.data.source import Data, load, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.examples import TokenExamples
from fedft.core.spec import DataSpec
from fedft.core.tasks.formats import FORMATS
from fedft.core.types import IGNORED
from tests.core.chat_templates import CHATML, tokenizer

Row = dict[str, Any]


def _said(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


ASKED, TOLD = _said("user", "Hi"), _said("assistant", "Hello")

ROWS: dict[str, Row] = {
    "prompt-answer": {"prompt": "Hi", "answer": "Hello"},
    "messages": {"messages": [ASKED, TOLD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "prompt-completion": {"prompt": [ASKED], "completion": [TOLD]},
    "text": {"text": "Hello"},
}
"""A row of each format. All but the last say the same."""


def write(folder: Path, rows: list[Row], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, rows: list[Row], **settings: Any) -> Data:
    spec = DataSpec(source=write(folder, rows), test_fraction=0.0, **settings)
    return prepare(spec, "causal-lm", tokenizer(CHATML))


def texts(data: Data) -> tuple[list[str], list[str]]:
    """Of each row the text, and what of it is learnt."""
    own, examples = tokenizer(CHATML), data.train
    assert isinstance(examples, TokenExamples)
    whole: list[str] = []
    learnt: list[str] = []
    for i in range(len(examples)):
        ids = examples.ids[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        if examples.answers is not None:
            labels = [IGNORED] * int(examples.answers[i]) + ids[int(examples.answers[i]) :]
        else:
            assert examples.token_labels is not None
            labels = examples.token_labels[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        whole.append(own.decode(ids))
        learnt.append(own.decode([label for label in labels if label != IGNORED]))
    return whole, learnt


def refusal(folder: Path, row: Row, **settings: Any) -> str:
    with pytest.raises(MismatchError) as caught:
        read(folder, [row], **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_said(name: str, tmp_path: Path) -> None:
    data = read(tmp_path, [ROWS[name]])
    assert f"{name} (" in data.notes[0] and "rows.jsonl" in data.notes[0]
    forced = read(tmp_path, [ROWS[name]], format=name)
    assert forced.fingerprint == data.fingerprint
    whole, learnt = texts(data)
    if name == "text":
        assert whole == learnt == ["Hello</s>"]
        return
    assert whole == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"]
    assert learnt == ["Hello<|im_end|>"]


def test_every_format_has_a_row() -> None:
    assert ROWS.keys() == FORMATS.keys()


def test_prompt_and_answer_are_the_same_bytes_as_ever(tmp_path: Path) -> None:
    """SHA-256 over the examples of this row, made before there were other formats."""
    data = read(tmp_path, [{"prompt": "Hi there", "answer": "Hello, 世界"}, ROWS["prompt-answer"]])
    assert data.train.fingerprint() == GOLDEN


GOLDEN = "999298ed7ae8b13f1cb6792a0ccc6f76491e8106c75dbd88b90e0923e8c05d44"


def test_prompt_and_answer_beside_other_columns_are_read_as_ever(tmp_path: Path) -> None:
    row = {**ROWS["prompt-answer"], **ROWS["messages"], "text": "other"}
    assert "prompt-answer" in read(tmp_path, [row]).notes[0]


def test_columns_of_two_formats_are_refused_by_name(tmp_path: Path) -> None:
    row = {**ROWS["alpaca"], "text": "Hi Hello"}
    told = refusal(tmp_path, row)
    assert "alpaca (instruction, output) or text (text)" in told and "data.format" in told
    assert "alpaca" in read(tmp_path, [row], format="alpaca").notes[0]
    assert texts(read(tmp_path, [row], format="text"))[0] == ["Hi Hello</s>"]


def test_columns_of_no_format_are_refused_by_name(tmp_path: Path) -> None:
    told = refusal(tmp_path, {"question": "Hi", "reply": "Hello"})
    assert "it has question, reply" in told and "messages (messages)" in told


def test_an_unknown_format_is_told_with_a_near_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.format = 'message'"):
        read(tmp_path, [ROWS["messages"]], format="message")
    spec = DataSpec(source=write(tmp_path, [{"text": "a", "label": "b"}]), format="messages")
    with pytest.raises(ConfigError, match="no format of this task"):
        load(spec, "classification")


def test_columns_by_other_names(tmp_path: Path) -> None:
    row = {"dialogue": [ASKED, TOLD]}
    assert "messages (dialogue)" in read(tmp_path, [row], columns={"messages": "dialogue"}).notes[0]
    told = refusal(tmp_path, row, columns={"messages": "dialog"})
    assert "no column 'dialog' (data.columns.messages)" in told
    told = refusal(tmp_path, {"ask": "Hi", "answer": "Hello"}, prompt="question")
    assert "no column 'question' (data.prompt)" in told


def test_training_and_test_rows_may_be_of_two_formats(tmp_path: Path) -> None:
    test = write(tmp_path, [ROWS["prompt-answer"]], "test.jsonl")
    spec = DataSpec(source=write(tmp_path, [ROWS["messages"]]), test_source=test)
    data = prepare(spec, "causal-lm", tokenizer(CHATML))
    assert len(data.train) == len(data.test) == 1
    assert any("test.jsonl" in note for note in data.notes)


def test_an_instruction_with_its_input(tmp_path: Path) -> None:
    rows = [{**ROWS["alpaca"], "input": given} for given in ("on this", "", None, " ")]
    whole, _ = texts(read(tmp_path, rows))
    assert "user\nHi\n\non this<|im_end|>" in whole[0]
    assert all("user\nHi<|im_end|>" in text for text in whole[1:])


def test_either_pair_of_names_in_either_column(tmp_path: Path) -> None:
    other = {"messages": ROWS["sharegpt"]["conversations"]}
    assert texts(read(tmp_path, [other])) == texts(read(tmp_path, [ROWS["messages"]]))
    other = {"conversations": ROWS["messages"]["messages"]}
    assert texts(read(tmp_path, [other])) == texts(read(tmp_path, [ROWS["messages"]]))


def test_a_text_and_how_it_goes_on_has_no_template(tmp_path: Path) -> None:
    whole, learnt = texts(read(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}]))
    assert whole == ["2 + 2 = 4</s>"] and learnt == [" 4</s>"]


BAD: dict[str, tuple[Row, str]] = {
    "unknown role": ({"messages": [_said("critic", "x"), TOLD]}, "message 1: the role 'critic' is none of"),
    "no role": ({"messages": [{"content": "x"}, TOLD]}, "message 1: it has no role"),
    "role of a list": ({"messages": [_said(["user"], "x"), TOLD]}, "message 1: the role is"),
    "empty answer": ({"messages": [ASKED, _said("assistant", "")]}, "message 2: content: missing or empty"),
    "blank answer": ({"messages": [ASKED, _said("assistant", " \n")]}, "nothing but white space"),
    "no content": ({"messages": [ASKED, {"role": "assistant"}]}, "message 2: content: missing or empty"),
    "no answer": ({"messages": [ASKED]}, "no message is the assistant's"),
    "answer first": ({"messages": [TOLD, ASKED, TOLD]}, "the assistant speaks first"),
    "answer after system": ({"messages": [_said("system", "S"), TOLD]}, "the assistant speaks first"),
    "parts": (
        {"messages": [_said("user", [{"type": "text", "text": "x"}]), TOLD]},
        "message 1: the content is a list of parts",
    ),
    "number": ({"messages": [_said("user", 3), TOLD]}, "message 1: content: text is expected, got"),
    "no list": ({"messages": "Hi"}, "messages: a list of messages is expected, got"),
    "no messages": ({"messages": []}, "messages: missing or empty"),
    "null": ({"messages": None}, "messages: missing or empty"),
    "a text in it": ({"messages": [ASKED, "Hello"]}, "message 2: role and content are expected"),
    "half a surrogate": ({"messages": [_said("user", "\ud800"), TOLD]}, "not a valid Unicode text"),
    "half a surrogate within": (
        {"messages": [ASKED, {**TOLD, "tool_calls": [{"function": {"name": "\ud800"}}]}]},
        "not a valid Unicode text",
    ),
    "prompt of two forms": ({"prompt": "Hi", "completion": [TOLD]}, "completion: a text where the prompt is"),
    "completion of a user": ({"prompt": [ASKED], "completion": [ASKED]}, "no message is the assistant's"),
    "completion empty": ({"prompt": "Hi", "completion": ""}, "completion: missing or empty"),
    "instruction empty": ({"instruction": " ", "output": "x"}, "instruction: nothing but white space"),
    "output null": ({"instruction": "x", "output": None}, "output: missing or empty"),
    "input a number": ({"instruction": "x", "input": 3, "output": "x"}, "input: text is expected"),
    "text empty": ({"text": ""}, "text: missing or empty"),
    "all cut": ({"messages": [_said("user", "x" * 999), TOLD]}, "no token of an answer is left"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_told_with_file_line_and_reason(name: str, tmp_path: Path) -> None:
    bad, said = BAD[name]
    good = next(row for row in ROWS.values() if set(row) <= set(bad) or set(bad) == set(row))
    if isinstance(bad.get("prompt"), str):
        good = {"prompt": "Hi", "completion": " 4"}
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, [good, bad])
    assert "rows.jsonl:2: " in str(caught.value)
    assert said in str(caught.value)
    kept = read(tmp_path, [good, bad], skip_bad=True)
    assert len(kept.train) == 1 and sum(kept.skipped.values()) == 1


def test_prompts_of_two_forms_in_one_file(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "x"}, ROWS["prompt-completion"]]
    with pytest.raises(MismatchError, match="some prompts are texts"):
        read(tmp_path, rows)


def test_a_template_that_refuses_is_a_bad_row(tmp_path: Path) -> None:
    from tests.core.chat_templates import shipped

    rows = [ROWS["messages"], {"messages": [_said("system", "S"), ASKED, TOLD]}]
    spec = DataSpec(source=write(tmp_path, rows), test_fraction=0.0)
    with pytest.raises(MismatchError, match=r"rows.jsonl:2: the model's chat template refuses it"):
        prepare(spec, "causal-lm", tokenizer(shipped("gemma")))
    spec = spec.model_copy(update={"skip_bad": True})
    assert len(prepare(spec, "causal-lm", tokenizer(shipped("gemma"))).train) == 1


def test_null_fields_of_a_column_store_are_absent(tmp_path: Path) -> None:
    """Parquet gives every message the fields of all, null where it has none."""
    from datasets import Dataset

    call = [{"function": {"name": "f"}}]
    messages = [{**ASKED, "tool_calls": None}, {**TOLD, "tool_calls": call}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"messages": [{**ASKED, "tool_calls": None}, {**TOLD, "tool_calls": None}]},
                       {"messages": messages}]).to_parquet(str(path))  # fmt: skip
    spec = DataSpec(source=str(path), test_fraction=0.0)
    assert len(prepare(spec, "causal-lm", tokenizer(CHATML)).train) == 2


def test_a_table_without_a_format_is_written_as_ever() -> None:
    assert "format" not in DataSpec().model_dump(by_alias=True)
    assert DataSpec(format="text").model_dump(by_alias=True)["format"] == "text"


def test_a_table_of_cells_spells_its_messages_in_json(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["messages"], [json.dumps([ASKED, TOLD])], ["not a list"]])
    spec = DataSpec(source=str(path), test_fraction=0.0, skip_bad=True)
    data = prepare(spec, "causal-lm", tokenizer(CHATML))
    assert texts(data) == texts(read(tmp_path, [ROWS["messages"]]))
    assert data.skipped == {"messages": 1}
