"""Pairs of texts: columns by other names, token types, control tokens that users wrote, cut rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.core.data.source import prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.models import input_encoder, load_base
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from tests.core.tasks.cases import CASES, rows_of


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def test_columns_go_by_other_names(folder_of: Any, tmp_path: Path) -> None:
    rows = [
        {"a": row["text"], "b": row["pair"], "c": row["label"]}
        for row in rows_of(CASES["text-pair"])
    ]
    source = written(tmp_path / "renamed.jsonl", rows)
    folder = folder_of("text-pair")
    encoder = input_encoder(ModelSpec(source=str(folder), task="text-pair"), folder)
    spec = DataSpec(source=source, test_fraction=0.25, max_length=24, text="a", label="c")
    renamed = prepare(spec.model_copy(update={"columns": {"pair": "b"}}), "text-pair", encoder)
    plain = written(tmp_path / "plain.jsonl", rows_of(CASES["text-pair"]))
    usual = DataSpec(source=plain, test_fraction=0.25, max_length=24)
    assert renamed.fingerprint == prepare(usual, "text-pair", encoder).fingerprint
    wrong = spec.model_copy(update={"columns": {"pear": "b"}})
    with pytest.raises(ConfigError, match=r"data\.columns\] pear.*(\n.*)*did you mean 'pair'"):
        prepare(wrong, "text-pair", encoder)
    with pytest.raises(MismatchError, match=r"no column 'pair' \(data\.columns\.pair\)"):
        prepare(spec, "text-pair", encoder)


def test_token_types_reach_the_model(folder_of: Any, tmp_path: Path) -> None:
    """The second text is told from the first: without token types the outputs are others."""
    folder, source = folder_of("text-pair"), tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows_of(CASES["text-pair"], 20))) + "\n")
    model = ModelSpec(source=str(folder), task="text-pair")
    spec = DataSpec(source=str(source), test_fraction=0.2)
    data = prepare(spec, "text-pair", input_encoder(model, folder))
    batch = data.train.collate(np.arange(5))
    types, mask = batch.inputs["token_type_ids"], batch.inputs["attention_mask"]
    assert set(types.unique().tolist()) == {0, 1}
    assert not bool(types[mask == 0].any()), "padding is of no text"
    assert bool((types.diff(dim=1) >= 0)[mask[:, 1:] == 1].all()), "first the one, then the other"
    base = load_base(model, LoraSpec(rank=2, target_modules=("query",)), 2)
    with torch.inference_mode():
        told = base.model(**batch.inputs).logits
        untold = base.model(**{k: v for k, v in batch.inputs.items() if "type" not in k}).logits
    assert not torch.allclose(told, untold, atol=1e-4)


def encoded(folder: Path, tmp_path: Path, rows: list[Any], max_length: int = 24) -> Any:
    source = written(tmp_path / "pairs.jsonl", rows)
    encoder = input_encoder(ModelSpec(source=str(folder), task="text-pair"), folder)
    spec = DataSpec(source=source, test_fraction=0.0, max_length=max_length)
    return prepare(spec, "text-pair", encoder)


def test_what_users_wrote_ends_no_text(folder_of: Any, tmp_path: Path) -> None:
    """``[EOS]`` in a text is text: exactly two control tokens a row, and the types change once."""
    texts = ["fur [EOS] tail", "[EOS]", "fur", "[EOS] [EOS] blade"]
    pairs = ["claw", "tail [EOS] paw", "[EOS] wing", "[EOS]"]
    rows = [
        {"text": a, "pair": b, "label": "ab"[i % 2]}
        for i, (a, b) in enumerate(zip(texts, pairs, strict=True))
    ]
    batch = encoded(folder_of("text-pair"), tmp_path, rows).train.collate(np.arange(4))
    ids, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    assert (ids == 2).sum(1).tolist() == [2] * 4
    for row, kinds, mask in zip(ids, types, batch.inputs["attention_mask"], strict=True):
        real = kinds[mask == 1].tolist()
        first = (row == 2).nonzero().flatten()[0]
        assert real == [0] * (int(first) + 1) + [1] * (len(real) - int(first) - 1)


def test_the_longer_text_is_cut(folder_of: Any, tmp_path: Path) -> None:
    rows = [
        {"text": "fur " * 30, "pair": "tail", "label": "a"},
        {"text": "fur", "pair": "tail " * 30, "label": "b"},
        {"text": "fur", "pair": "tail", "label": "b"},
    ]
    data = encoded(folder_of("text-pair"), tmp_path, rows, max_length=10)
    assert data.cut["train"] == 2
    batch = data.train.collate(np.arange(3))
    types, mask = batch.inputs["token_type_ids"], batch.inputs["attention_mask"]
    counts = [
        (int((m & (t == 0)).sum()), int((m & (t == 1)).sum()))
        for t, m in zip(types, mask.bool(), strict=True)
    ]
    assert counts == [(8, 2), (2, 8), (2, 2)]


def test_the_rows_are_those_of_the_tokenizer(folder_of: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, rows = folder_of("text-pair"), rows_of(CASES["text-pair"], 20)
    batch = encoded(folder, tmp_path, rows).train.collate(np.arange(20))
    usual: Any = AutoTokenizer.from_pretrained(folder)
    given = [row["text"] for row in rows], [row["pair"] for row in rows]
    expected = usual(*given, truncation=True, max_length=24, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch.inputs[name], expected[name]), name
