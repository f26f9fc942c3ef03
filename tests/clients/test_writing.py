"""Texts that are generated in an evaluation: greedy, whatever the model's files ask for, in every engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.hydra import HydraEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.peft_engine import WholeEngine
from fedft.clients.engines.writing import Writing
from fedft.core.data.source import Data, prepare
from fedft.core.metrics import METRICS, Metric, Predictions
from fedft.core.models import initial_adapter, input_encoder, load_base
from fedft.core.models.start import drawn
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.tasks import TASKS, task_of
from fedft.core.tasks.asked import after_prompts
from fedft.core.tasks.causal_lm import CausalLM
from fedft.core.types import IGNORED, Adapter, Batch
from tests.core.tasks.cases import CASES, llama, rows_of

LORA = LoraSpec(rank=2, target_modules=("q_proj", "v_proj"))


class Written(CausalLM):
    """Judged by its texts, too."""

    name = "written-lm"
    metrics = (METRICS["perplexity"], METRICS["exact-match"])


@pytest.fixture(autouse=True)
def judged() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, Written.name, Written())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"))


def data_of(folder: Path, tmp_path: Path, count: int = 24) -> Data:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows_of(CASES["causal-lm"], count))) + "\n")
    spec = DataSpec(source=str(source), test_fraction=0.5, max_length=24)
    return prepare(spec, "written-lm", input_encoder(_model(folder), folder))


def _model(folder: Path) -> ModelSpec:
    return ModelSpec(source=str(folder), task="written-lm")


def moved(start: Adapter) -> Adapter:
    """An adapter that changes what is written."""
    generator = torch.Generator().manual_seed(3)
    return start.replaced(
        {n: t + torch.randn(t.shape, generator=generator) for n, t in start.tensors().items()}
    )


def naive(model: Any, row: Tensor, ends: set[int], limit: int, pad: int) -> list[int]:
    """One row, no cache, no padding: the likeliest token each time."""
    ids, written = row.clone(), []
    with torch.no_grad():
        while len(written) < limit:
            token = int(model(input_ids=ids[None]).logits[0, -1].argmax())
            if token in ends:
                break
            written.append(token)
            ids = torch.cat([ids, torch.tensor([token])])
    return written


def prompts(batch: Batch) -> list[Tensor]:
    return [
        ids[: int((labels != IGNORED).nonzero()[0])]
        for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True)
    ]


def test_every_engine_writes_what_one_row_at_a_time_gives(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder, tmp_path)
    batch = data.test.collate(np.arange(len(data.test)))
    assert not bool(batch.inputs["attention_mask"].all()), "nothing is padded"
    base = load_base(_model(folder), LORA, 0)
    base.new_tokens = 8
    start = moved(initial_adapter(base.shapes, LORA, 2, seed=1))
    cohort = CohortEngine(base, LORA)
    seen: list[list[tuple[str, str]]] = []
    real = Writing.texts

    def noted(self: Writing, batch: Batch, *, whole: bool = True) -> list[tuple[str, str]]:
        seen.append(real(self, batch, whole=whole))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writing, "texts", noted)
        mine = cohort.evaluate(start, {}, [batch])
        other = load_base(_model(folder), LORA, 0)
        other.new_tokens = 8
        loop = PeftEngine(other, LORA)
        theirs = loop.evaluate(start, {}, [batch])
        blocks = loop.evaluate(start, {}, [batch], layers=(1,))
        again = CohortEngine(base, LORA).evaluate(start, {}, [batch], layers=(1,))
        with other.holding((1,)):
            short = [naive(other.model, row, {2}, 8, 0) for row in prompts(batch)]
    assert mine.sums == theirs.sums and mine.count == theirs.count
    assert blocks.sums == again.sums
    tokenizer: Any = base.encoder.tokenizer
    loop.evaluate(start, {}, [])
    written = [naive(other.model, row, {2}, 8, 0) for row in prompts(batch)]
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]
    assert [said for said, _ in seen[0]] == [said for said, _ in seen[1]] == texts
    assert len(set(texts)) > 3, "the model says the same of everything"
    cut = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in short]
    assert [said for said, _ in seen[2]] == [said for said, _ in seen[3]] == cut != texts


def test_all_families_write(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder, tmp_path)
    batch = data.test.collate(np.arange(6))
    for method, heads in (("hydralora", 2), ("dora", None)):
        lora = LoraSpec(rank=2, target_modules=LORA.target_modules, method=method, heads=heads)
        base = load_base(_model(folder), lora, 0)
        base.new_tokens = 3
        start = initial_adapter(base.shapes, lora, 2, 1)
        if method == "dora":
            start, _ = drawn(_model(folder), lora, start, 1)
        engine = WholeEngine(base, lora, 1) if method == "dora" else HydraEngine(base, lora)
        assert engine.evaluate(start, {}, [batch]).sums["texts"] == 6


def test_what_the_models_files_ask_for_is_not_done(folder: Path, tmp_path: Path) -> None:
    """Beams, sampling, penalties and a shortest length would all change the texts."""
    data = data_of(folder, tmp_path)
    batch = data.test.collate(np.arange(len(data.test)))
    base = load_base(_model(folder), LORA, 0)
    base.new_tokens = 6
    plain = Writing(base).texts(batch)
    own: Any = base.model.generation_config
    own.update(num_beams=3, do_sample=True, temperature=9.0, repetition_penalty=5.0, min_length=30)
    assert Writing(base).texts(batch) == plain
    assert base.model.generation_config is own, "what the model came with was not put back"


def test_a_text_ends_at_the_end_of_text(folder: Path, tmp_path: Path) -> None:
    """A model that copies the wanted answers is right about all of them."""
    data = data_of(folder, tmp_path)
    batch = data.test.collate(np.arange(len(data.test)))
    base = load_base(_model(folder), LORA, 0)
    asked = task_of("written-lm").asked(batch, 0)
    answers = [list(row) for row in asked.wanted]
    assert all(row[-1] == 2 for row in answers), "an answer does not end"

    def copied(**given: Any) -> Tensor:
        found = given["input_ids"]
        width = max(map(len, answers)) + 2
        tail = torch.full((len(answers), width), 4)
        for row, answer in enumerate(answers):
            tail[row, : len(answer)] = torch.tensor(answer)
        return torch.cat([found, tail], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.model, "generate", copied)
        tally = Writing(base).tally(batch, whole=True)
    assert tally.sums == {"exact": len(answers), "texts": len(answers)}


def test_the_last_answer_is_asked_for() -> None:
    """By hand: two answers in a row, a row with none, one that begins with its answer."""
    x = IGNORED
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [7, 8, 9, 0, 0]])
    labels = torch.tensor([[x, 6, x, 8, 9], [x, x, x, x, x], [4, 5, x, x, x], [x, x, 9, x, x]])
    mask = (ids != 0).long()
    asked = after_prompts(Batch({"input_ids": ids, "attention_mask": mask}, labels), 0)
    assert asked.inputs["input_ids"].tolist() == [[5, 6, 7], [0, 7, 8]]
    assert asked.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert (asked.wanted, asked.ahead) == ([[8, 9], [9]], 3)


def test_texts_reach_metrics_over_texts_alone() -> None:
    task = task_of("written-lm")
    assert task.needs_texts and not task_of("causal-lm").needs_texts
    assert dict(task.read([("a b", "a b "), ("c", "d")]).sums) == {"exact": 1, "texts": 2}

    class Length(Metric):
        """The mean length of a text, by import path."""

        name, higher = "length", True

        def tally(self, found: Predictions) -> Any:
            raise AssertionError("a metric over tokens got texts")

        def value(self, tally: Any) -> float:
            return 0.0

    class Both(CausalLM):
        metrics = (Length(), METRICS["exact-match"])

    assert Both().read([("a", "a")]).sums["exact"] == 1
