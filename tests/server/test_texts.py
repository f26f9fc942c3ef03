"""What a run says and keeps of how texts became rows: cuts, special tokens, the tokenizer."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel
from transformers import AutoTokenizer

from fedft.api import Run
from fedft.core.data.source import load
from fedft.core.tasks import task_of
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.run import fork, resume, simulate
from fedft.trackers import Tracker
from tests.core.tokenizer_kinds import byte_bpe

Table = Callable[..., dict[str, Any]]


class Notes(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        """See :class:`fedft.trackers.Tracker`."""
        self.kept.append(text)


def naive_cut(model: Path, texts: list[str], limit: int) -> int:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return sum(len(ids) > limit for ids in tokenizer(texts)["input_ids"])


def test_cut_rows_are_shown_before_and_recorded_after(
    tiny_table: Table, tiny_model: Path, tmp_path: Path
) -> None:
    table = tiny_table(data={"max-length": 5}, rounds={"count": 1})
    config = parse_config(table)
    raw = load(config.data, "classification", seed=config.seed)
    expected = {
        name: naive_cut(tiny_model, list(rows.values["text"]), 5)
        for name, rows in (("train", raw.train), ("test", raw.test))
    }
    assert expected["train"] > 0 < expected["test"]
    cost = forecast(config)
    assert cost["data"]["cut"] == expected
    assert (cost["data"]["train"], cost["data"]["test"]) == (len(raw.train), len(raw.test))
    words = f"{expected['train']} of {len(raw.train)} training rows and {expected['test']} of"
    assert re.search(f"note +{words}", as_text(config, cost))
    notes = Notes()
    run = simulate(config, tmp_path / "run", trackers=[notes])
    assert run.environment()["cut"] == expected
    assert any(words in note and "data.max-length = 5" in note for note in notes.kept), notes.kept

    whole = parse_config(tiny_table(rounds={"count": 1}))  # control: nothing to say
    assert "and cut there" not in as_text(whole, forecast(whole))
    simulate(whole, tmp_path / "whole", trackers=[silent := Notes()])
    assert not any("cut" in note for note in silent.kept)


def test_a_model_without_an_end_of_text_is_told(tiny_table: Table, tmp_path: Path) -> None:
    data = tmp_path / "qa.jsonl"
    lines = [{"prompt": f"dog {i}", "answer": "the fox"} for i in range(24)]
    data.write_text("\n".join(map(json.dumps, lines)))
    size: dict[str, Any] = {
        "vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    for end in (None, "<|im_end|>"):
        model = tmp_path / f"model-{end}"
        tr.LlamaForCausalLM(tr.LlamaConfig(**size)).save_pretrained(model)
        tokenizer = byte_bpe(eos_token=end) if end else byte_bpe()
        if end is None:
            tokenizer.eos_token = None
        tokenizer.save_pretrained(model)
        table = tiny_table(
            model={"source": str(model), "task": "causal-lm"},
            lora={"target-modules": "all-linear"},
            data={"source": str(data), "partition": {"kind": "iid"}},
            fleet={"clients": 2},
            rounds={"count": 1, "per-round": 2},
        )
        notes = Notes()
        run = simulate(parse_config(table), tmp_path / f"run-{end}", trackers=[notes])
        told = run.environment()["special_tokens"]["end"]
        assert told == (None if end is None else tokenizer.eos_token_id)
        assert any("no end-of-text token" in note for note in notes.kept) == (end is None)
        rows, counted = (run.summary()[key] for key in ("verified", "final"))
        assert (rows["rows"], set(counted)) == (4, {"loss", "perplexity"}), "rows, not tokens"


def test_the_export_scores_in_stock_peft_what_the_run_says(
    tiny_table: Table, tiny_data: Path, tmp_path: Path
) -> None:
    """A decoder with padding of its own that its configuration does not know, in both engines."""
    model = tmp_path / "model"
    tokenizer = byte_bpe(["<|endoftext|>", "<pad>"], pad_token="<pad>")
    size: dict[str, Any] = {
        "vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tr.GPTNeoXModel(tr.GPTNeoXConfig(**size)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for cohort in (1, 4):
        table = tiny_table(
            model={"source": str(model)},
            lora={"target-modules": "all-linear"},
            engine={"cohort": cohort, "precision": "fp32"},
            rounds={"count": 2},
        )
        config = parse_config(table)
        run = Run(simulate(config, tmp_path / f"run-{cohort}").path)
        folder = run.adapter("last").save_pretrained(tmp_path / f"adapter-{cohort}")

        usual: Any = AutoTokenizer.from_pretrained(folder)
        base = tr.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
        base.config.pad_token_id = usual.pad_token_id
        stock: Any = PeftModel.from_pretrained(base, folder).eval()
        test = load(config.data, "classification", seed=config.seed).test
        batch = usual(list(test.values["text"]), padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            logits = stock(**batch).logits
            base.config.pad_token_id = base.config.eos_token_id  # what was done before
            wrong = stock(**batch).logits
        labels, task = torch.tensor(test.labels), task_of("classification")
        expected = task.scores(task.tally(logits, labels))
        assert run.metrics["final"] == pytest.approx(expected, abs=1e-4)
        assert not torch.allclose(wrong, logits, atol=1e-2), "control: it matters"


def test_the_tokenizer_is_kept_and_follows_a_fork(tiny_table: Table, tmp_path: Path) -> None:
    run = Run(simulate(parse_config(tiny_table(rounds={"count": 1})), tmp_path / "run").path)
    kept = run.directory / "tokenizer"
    found: Any = AutoTokenizer.from_pretrained(kept)
    assert found.pad_token == "[PAD]"
    target = fork(tmp_path / "run", tmp_path / "fork", parse_config(tiny_table()))
    assert Run(resume(target).path).adapter("last").tokenizer == target / "tokenizer"
    exported = run.adapter("last").save_pretrained(tmp_path / "adapter")
    names = {path.name for path in exported.iterdir()}
    assert names == {path.name for path in kept.iterdir()} | {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "fedft.json",
    }
