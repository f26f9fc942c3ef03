"""Vectors of texts: the loss written out, pooling, padding, ranks, evaluations in any batches, stock peft."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedft.clients.engines.hydra import HydraEngine
from fedft.clients.engines.loop import LoopEngine, PeftEngine
from fedft.core.adapters.files import save_adapter
from fedft.core.checkpoint import Head
from fedft.core.data.source import Data, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.metrics import METRICS, Tally
from fedft.core.models import initial_adapter, input_encoder, load_base
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.stock import stock_model
from fedft.core.tasks import task_of
from fedft.core.tasks.pooling import Embedding, pooling_of
from fedft.core.types import Adapter, LocalTraining, TrainPlan
from fedft.server.config_file import parse_config
from tests.core.tasks.cases import CASES, bert, llama, rows_of, t5

LORA = LoraSpec(rank=2, target_modules=("query", "value"))
NAME = "sentence-embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("bert"))


def spec_of(folder: Path, **embedding: Any) -> ModelSpec:
    return ModelSpec(
        source=str(folder), task=NAME, **({"embedding": embedding} if embedding else {})
    )


def data_of(folder: Path, tmp_path: Path, rows: list[Any] | None = None, **own: Any) -> Data:
    source = tmp_path / "rows.jsonl"
    rows = rows_of(CASES[NAME], 30) if rows is None else rows
    source.write_text("\n".join(map(json.dumps, rows)) + "\n")
    spec = DataSpec(source=str(source), **{"test_fraction": 0.0, "max_length": 24, **own})
    return prepare(spec, NAME, input_encoder(spec_of(folder), folder))


def engine_of(spec: ModelSpec, folder: Path) -> PeftEngine:
    base = load_base(spec, LORA, 0)
    base.model.double()
    return PeftEngine(base, LORA)


def started(engine: LoopEngine, spread: float = 0.3) -> Adapter:
    start = initial_adapter(engine.base.shapes, LORA, 2, seed=1)
    generator = torch.Generator().manual_seed(4)
    noise = {
        n: spread * torch.randn(t.shape, generator=generator) for n, t in start.tensors().items()
    }
    return start.replaced({n: (t + noise[n]).double() for n, t in start.tensors().items()})


def naive(vectors: list[list[Tensor]], scale: float = 20.0) -> Tensor:
    """The equation, one pair at a time: the loss of each row. vectors: k lists of n."""
    anchors, *others = vectors
    candidates = [v for column in others for v in column]

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())

    losses: list[Tensor] = []
    for i, anchor in enumerate(anchors):
        logits = [scale * cosine(anchor, other) for other in candidates]
        losses.append(torch.stack(logits).exp().sum().log() - logits[i])
    return torch.stack(losses)


@pytest.mark.parametrize("k", [2, 3])
def test_the_loss_and_its_gradient_are_those_of_the_equation(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(5, k, 7, generator=generator, dtype=torch.float64)
    mine, theirs = (raw.clone().requires_grad_() for _ in range(2))
    unit = torch.nn.functional.normalize(mine, dim=-1) * 20.0**0.5
    each = task_of(NAME).loss(unit, torch.arange(5), "none")
    wanted = naive([list(theirs[:, j]) for j in range(k)])
    assert torch.allclose(each, wanted, rtol=0, atol=1e-12)
    task_of(NAME).loss(unit, torch.arange(5), "mean").backward()
    wanted.mean().backward()
    assert mine.grad is not None and theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_the_loss_is_that_of_sentence_transformers() -> None:
    """Where it is installed: its MultipleNegativesRankingLoss on the same vectors."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    own = losses.MultipleNegativesRankingLoss(torch.nn.Identity())
    raw = torch.randn(6, 3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = own.compute_loss_from_embeddings([raw[:, j] for j in range(3)], None)
    unit = torch.nn.functional.normalize(raw, dim=-1) * 20.0**0.5
    found = task_of(NAME).loss(unit, torch.arange(6), "mean")
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_by_hand(pooling: Any, side: str) -> None:
    states = torch.arange(24.0, dtype=torch.float64).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]] if side == "left" else [[1] * 4, [1, 1, 0, 0]])
    found = Embedding(pooling, 4.0).vectors(states, mask)
    for row in range(2):
        real = states[row][mask[row] == 1]
        own = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[pooling]
        assert torch.allclose(found[row], 2 * own / own.norm(), rtol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_no_vector(pooling: str, folder: Path, tmp_path: Path) -> None:
    """Each row alone, and each among longer ones."""
    data = data_of(folder, tmp_path)
    engine = engine_of(spec_of(folder, pooling=pooling), folder)
    engine._load(started(engine), None)
    batch = data.train.collate(np.arange(12))
    assert not bool(batch.inputs["text.attention_mask"].all())
    with torch.inference_mode():
        whole = engine._outputs(batch)
        alone = [engine._outputs(data.train.collate(np.array([row]))) for row in range(12)]
    assert whole.shape == (12, 2, 32)
    assert torch.allclose(whole, torch.cat(alone), rtol=0, atol=1e-10)
    others = load_base(spec_of(folder, pooling="mean" if pooling != "mean" else "cls"), LORA, 0)
    others.model.double()
    with torch.inference_mode():
        plain = task_of(NAME).outputs(others.model, batch.inputs)
        same = task_of(NAME).outputs(load_base(spec_of(folder), LORA, 0).model, batch.inputs)
    assert not torch.allclose(whole, plain, atol=1e-3)
    assert same.dtype == torch.float32


def test_an_evaluation_does_not_depend_on_its_batches(folder: Path, tmp_path: Path) -> None:
    """Of 1, of 7 with a short one at the end, in another order, or all at once."""
    rows = rows_of(CASES[NAME], 30)
    rows = [{**row, "hard": rows[i - 4]["positive"]} for i, row in enumerate(rows)]
    data = data_of(folder, tmp_path, rows, columns={"negative": "hard"})
    engine = engine_of(spec_of(folder), folder)
    start = started(engine, 0.01)
    orders = [[np.arange(30)], np.split(np.arange(30), range(7, 30, 7)), np.arange(30)[:, None]]
    orders.append(np.split(np.arange(30)[::-1].copy(), range(11, 30, 11)))
    tallies = [engine.evaluate(start, {}, map(data.train.collate, cuts)) for cuts in orders]
    first = tallies[0]
    assert first.count == 30 and 0 < first.sums["correct"] < 30  # type: ignore[operator]
    for other in tallies[1:]:
        assert other.loss_sum == pytest.approx(first.loss_sum, rel=1e-10)
        assert other.sums["correct"] == first.sums["correct"]
        assert other.sums["reciprocal-ranks"] == pytest.approx(first.sums["reciprocal-ranks"])
    assert engine.evaluate(start, {}, []) == Tally()
    batch = data.train.collate(np.arange(30))
    engine._load(start, None)
    with torch.inference_mode():
        outputs = engine._outputs(batch)
    losses = naive([list(outputs[:, j]) for j in range(3)])
    assert first.loss_sum == pytest.approx(float(losses.sum()), rel=1e-9)


def test_ranks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows: nearest; second; the same positive as another row; and a tie, which is no success."""
    angles = [(0.0, 0.1), (1.0, 1.3), (2.0, 2.0), (2.2, 2.0), (4.0, 5.0)]
    outputs = torch.stack([torch.tensor([[np.cos(x), np.sin(x)] for x in pair]) for pair in angles])
    outputs[1, 0] = torch.tensor([np.cos(0.6), np.sin(0.6)])  # 0.5 from 0.1 and 0.7 from its own
    codes = torch.tensor([[0], [1], [2], [2], [4]])
    task = task_of(NAME)
    for size in (1, 2, 1024):
        monkeypatch.setattr("fedft.core.tasks.sentence_embeddings._AT_ONCE", size)
        tally = task.tally(outputs, codes)
        assert tally.sums["correct"] == 4  # 4.0 lies 1.0 from its own, and 2.0 from the next
        assert tally.sums["reciprocal-ranks"] == pytest.approx(4.5)
    assert METRICS["mrr"].value(tally) == pytest.approx(0.9)
    same = torch.ones(6, 2, 4) / 2
    collapsed = task.tally(same, torch.arange(6)[:, None])
    assert collapsed.sums["correct"] == 0
    assert collapsed.sums["reciprocal-ranks"] == pytest.approx(1.0)
    broken = task.tally(torch.full((3, 2, 4), float("nan")), torch.arange(3)[:, None])
    assert broken.sums["correct"] == 0


def test_one_pair_alone_teaches_nothing(folder: Path, tmp_path: Path) -> None:
    """The last batch of an epoch may have one row: no loss, no gradient, no failure."""
    data = data_of(folder, tmp_path)
    engine = engine_of(spec_of(folder), folder)
    start = started(engine)
    plan = TrainPlan(start, training=LocalTraining(lr=0.1, optimizer="sgd"), site="a")
    (alone,) = engine.train([plan], [[data.train.collate(np.array([3]))]])
    assert alone.metrics["loss"] == pytest.approx(0.0, abs=1e-9)
    for name, tensor in alone.adapter.tensors().items():
        assert torch.allclose(tensor.double(), start.tensors()[name], rtol=0, atol=1e-6)
    (two,) = engine.train([plan], [[data.train.collate(np.array([3, 4]))]])
    assert two.metrics["loss"] > 1e-3


@pytest.mark.parametrize("make", [bert, llama])
def test_stock_peft_gives_the_same_vectors(make: Any, tmp_path: Path) -> None:
    """An encoder with a pooler that nobody reads, and a decoder."""
    from peft import PeftModelForFeatureExtraction

    folder = make(tmp_path / "model")
    spec, lora = spec_of(folder), LORA if make is bert else LoraSpec(rank=2, target_modules="auto")
    base = load_base(spec, lora, 0)
    engine = PeftEngine(base, lora)
    assert not any("pooler" in path for path in load_base(spec, LoraSpec(), 0).adapted)
    generator = torch.Generator().manual_seed(0)
    start = initial_adapter(base.shapes, lora, 2, seed=1)
    start = start.replaced(
        {n: torch.randn(t.shape, generator=generator) for n, t in start.tensors().items()}
    )
    save_adapter(tmp_path / "export", start, {}, task=NAME, base="x", revision=None, head=Head())
    stock = stock_model(tmp_path / "export", spec, folder, 0, "fp32", None)
    assert isinstance(stock, PeftModelForFeatureExtraction)
    batch = data_of(folder, tmp_path).train.collate(np.arange(8))
    engine._load(start, None)
    with torch.inference_mode():
        mine, theirs = engine._outputs(batch), task_of(NAME).outputs(stock, batch.inputs)
        states = stock(
            input_ids=batch.inputs["text.input_ids"],
            attention_mask=batch.inputs["text.attention_mask"],
        ).last_hidden_state
    assert torch.allclose(mine, theirs, atol=1e-5)
    mask = batch.inputs["text.attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.allclose(mine[:, 0] / 20**0.5, mean, atol=1e-5)


def test_a_checkpoint_without_a_pooler(tmp_path: Path) -> None:
    from transformers import BertModel

    folder = bert(tmp_path / "model")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    assert load_base(spec_of(folder), LORA, 0).adapted


def test_other_families_train(folder: Path, tmp_path: Path) -> None:
    lora = LoraSpec(rank=2, target_modules=("query",), method="hydralora", heads=2)
    base = load_base(spec_of(folder), lora, 0)
    engine = HydraEngine(base, lora)
    batch = data_of(folder, tmp_path).train.collate(np.arange(8))
    start = initial_adapter(base.shapes, lora, 2, seed=1)
    (trained,) = engine.train([TrainPlan(start, site="a")], [[batch, batch]])
    assert trained.metrics["loss"] > 0 and trained.metrics["steps"] == 2


# ------------------------------------------------------------------ what a model's files say


def files(folder: Path, kinds: list[str], pooling: dict[str, Any]) -> Path:
    folder.mkdir()
    modules = [{"idx": i, "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
               for i, k in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, kind in enumerate(kinds):
        if kind == "Pooling":
            (folder / f"{i}_Pooling").mkdir()
            (folder / f"{i}_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({}, "mean"),
    ],
)
def test_pooling_as_sentence_transformers_says_it(
    told: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    folder = files(tmp_path / "m", ["Transformer", "Pooling", "Normalize"], told)
    assert pooling_of(folder) == wanted
    assert pooling_of(tmp_path) == "mean"


def test_what_we_do_not_do_is_said(folder: Path, tmp_path: Path) -> None:
    for i, (kinds, told, said) in enumerate(
        [
            (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "a module 'Dense'"),
            (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens"),
            (
                ["Transformer", "Pooling"],
                {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
                "cls and mean",
            ),
        ]
    ):
        with pytest.raises(MismatchError, match=said):
            pooling_of(files(tmp_path / str(i), kinds, told))
    with pytest.raises(MismatchError, match="takes an encoder or a decoder alone"):
        load_base(spec_of(t5(tmp_path / "t5")), LoraSpec(), 0)
    told = files(tmp_path / "told", ["Transformer", "Pooling", "Dense"], {})
    for file in folder.iterdir():
        (told / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MismatchError, match="a module 'Dense'"):
        load_base(spec_of(told), LORA, 0)
    assert load_base(spec_of(told, pooling="mean"), LORA, 0).adapted


def test_a_key_of_another_task_is_refused() -> None:
    table: dict[str, Any] = {"embedding": {"pooling": "cls"}}
    with pytest.raises(ConfigError, match="embedding belongs to tasks of embeddings"):
        parse_config({"model": table})
    assert parse_config({"model": {**table, "task": NAME}}).model.embedding is not None
    assert "embedding" not in ModelSpec().model_dump_json()
    own = ModelSpec(task=NAME, embedding={"scale": 5})  # type: ignore[arg-type]
    assert ModelSpec.model_validate_json(own.model_dump_json()) == own


def test_a_negative_is_read_where_it_is_named(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "negative": "steel"} for row in rows_of(CASES[NAME], 8)]
    assert (
        "negative.input_ids"
        not in data_of(folder, tmp_path, rows).train.collate(np.arange(2)).inputs
    )
    named: dict[str, Any] = {"columns": {"negative": "negative"}}
    batch = data_of(folder, tmp_path, rows, **named).train.collate(np.arange(2))
    assert batch.inputs["negative.input_ids"].shape == (2, 2)
    with pytest.raises(MismatchError, match=r"rows.jsonl:3: negative: missing or empty"):
        data_of(folder, tmp_path, [*rows[:2], {**rows[2], "negative": None}, *rows[3:]], **named)


def test_rows_with_one_positive_have_one_code(folder: Path, tmp_path: Path) -> None:
    pairs = zip("abcd", ["fur", "tail", "fur", "fur "], strict=True)
    rows = [{"text": text, "positive": positive} for text, positive in pairs]
    labels = data_of(folder, tmp_path, rows).train.collate(np.arange(4)).labels
    assert labels.tolist() == [[0], [1], [0], [0]]
