"""Encoders with decoders: the model's own shift and loss, both engines, stock peft, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.writing import Writing
from fedft.core.data.source import Data, load, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.models import geometry, initial_adapter, input_encoder, load_base
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec
from fedft.core.types import IGNORED, LocalTraining, TrainPlan
from tests.core.tasks.cases import CASES, VOCABULARY, rows_of, t5, tokenizer

SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 40, "dropout": 0.0, **SPECIAL,
}  # fmt: skip


def _saved(make: Callable[[], Any], folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    model.save_pretrained(folder)
    return tokenizer(folder, framed=True)


def bart(folder: Path) -> Path:
    from transformers import BartConfig, BartForConditionalGeneration

    own = {**SMALL, "bos_token_id": 1, "forced_eos_token_id": 2}
    return _saved(lambda: BartForConditionalGeneration(BartConfig(**own)), folder)


def bart_alone(folder: Path) -> Path:
    """As BART is published: without the bias that its language model has."""
    from transformers import BartConfig, BartModel

    return _saved(lambda: BartModel(BartConfig(**SMALL, bos_token_id=1)), folder)


def mt5(folder: Path) -> Path:
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=2,
        num_heads=2, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return _saved(lambda: MT5ForConditionalGeneration(config), folder)


def marian(folder: Path) -> Path:
    from transformers import MarianConfig, MarianMTModel

    own = {**SMALL, "decoder_start_token_id": 0, "decoder_vocab_size": len(VOCABULARY)}
    return _saved(lambda: MarianMTModel(MarianConfig(**own)), folder)


def pegasus(folder: Path) -> Path:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    own = {**SMALL, "decoder_start_token_id": 0}
    return _saved(lambda: PegasusForConditionalGeneration(PegasusConfig(**own)), folder)


def mbart(folder: Path) -> Path:
    """Its decoder begins with whatever a row ends in."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    return _saved(lambda: MBartForConditionalGeneration(MBartConfig(**SMALL)), folder)


KINDS = {"t5": t5, "mt5": mt5, "bart": bart, "marian": marian, "pegasus": pegasus, "mbart": mbart}
NAMES = {"t5": ("q", "k", "v", "o"), "mt5": ("q", "k", "v", "o", "wi_0", "wo")}
USUAL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


def lora_of(kind: str, **more: Any) -> LoraSpec:
    return LoraSpec(rank=2, target_modules=NAMES.get(kind, USUAL), **more)


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(source=str(folder), task="seq2seq")


def data_of(folder: Path, tmp_path: Path, rows: list[Any] | None = None, **own: Any) -> Data:
    source = tmp_path / "rows.jsonl"
    rows = rows_of(CASES["seq2seq"], 40) if rows is None else rows
    source.write_text("\n".join(map(json.dumps, rows)) + "\n")
    spec = DataSpec(source=str(source), **{"test_fraction": 0.2, "max_length": 24, **own})
    return prepare(spec, "seq2seq", input_encoder(spec_of(folder), folder))


def base_of(folder: Path, lora: LoraSpec, dtype: torch.dtype = torch.float64) -> Any:
    base = load_base(spec_of(folder), lora, 0)
    base.model.to(dtype)
    return base


def started(base: Any, lora: LoraSpec, seed: int = 5) -> Any:
    start = initial_adapter(base.shapes, lora, 2, seed=1)
    generator = torch.Generator().manual_seed(seed)
    return start.replaced(
        {
            n: t.double() + 0.05 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
            for n, t in start.tensors().items()
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own(kind: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    """transformers shifts the labels itself, and takes the mean over all tokens of the batch."""
    folder = kinds[kind]
    batch = data_of(folder, tmp_path).train.collate(np.arange(9))
    labels = batch.labels
    assert bool((labels == IGNORED).any()), "no target is padded"
    assert torch.equal(labels, batch.inputs["labels"])
    lora = lora_of(kind)
    engine = PeftEngine(base_of(folder, lora), lora)
    read = {k: v for k, v in batch.inputs.items() if k in ("input_ids", "attention_mask")}
    start = started(engine.base, lora)
    tally = engine.evaluate(start, {}, [batch])
    with torch.inference_mode():
        own = engine.base.model(**read, labels=labels)
    right = (own.logits.argmax(-1) == labels) & (labels != IGNORED)
    assert tally.count == int((labels != IGNORED).sum())
    assert tally.loss_sum / tally.count == pytest.approx(float(own.loss), rel=1e-9)
    assert tally.sums["correct"] == int(right.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_and_decoder_are_adapted(kind: str, kinds: dict[str, Path]) -> None:
    """Cross-attention too: of every kind of layer there is one in the decoder that reads the encoder."""
    lora = lora_of(kind)
    paths = list(base_of(kinds[kind], lora).adapted)
    assert any("encoder." in p and "decoder." not in p for p in paths)
    assert any("EncDecAttention" in p or "encoder_attn" in p for p in paths)
    auto = base_of(kinds[kind], LoraSpec(rank=2)).adapted
    assert any("EncDecAttention" in p or "encoder_attn" in p for p in auto)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_agree(
    kind: str, dropout: float, kinds: dict[str, Path], tmp_path: Path
) -> None:
    """In float64, with batches of uneven rows, and sources and targets of uneven and of equal length."""
    folder, lora = kinds[kind], lora_of(kind, dropout=dropout)
    data = data_of(folder, tmp_path)
    loop, cohort = (engine(base_of(folder, lora), lora) for engine in (PeftEngine, CohortEngine))
    training = LocalTraining(lr=0.05, optimizer="sgd", clip_norm=None)
    plans = [
        TrainPlan(started(loop.base, lora, k), training=training, site=f"client-{k}")
        for k in range(3)
    ]
    same = data.train.subset(np.flatnonzero(data.train.target.lengths == 4)[:3])
    equal = same.collate(np.arange(len(same)))
    wide = equal.inputs["input_ids"][:, :4]
    level = {**equal.inputs, "input_ids": wide, "attention_mask": torch.ones_like(wide)}
    cuts = [[(0, 4), (4, 6)], [(6, 11)], [(11, 12), (12, 19)]]
    batches = [[data.train.collate(np.arange(a, b)) for a, b in own] for own in cuts]
    batches[1].append(type(equal)(level, equal.labels))
    together = cohort.train(plans, batches)
    for k, trained in enumerate(together):
        (alone,) = loop.train([plans[k]], [batches[k]])
        assert trained.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-8)
        before = plans[k].start.tensors()
        for key, tensor in alone.adapter.tensors().items():
            assert torch.allclose(trained.adapter.tensors()[key], tensor, rtol=0, atol=1e-7), key
            assert float((tensor - before[key]).norm()) > 0, f"{key} did not learn"
        mine, theirs = (e.evaluate(plans[k].start, {}, batches[k]) for e in (cohort, loop))
        assert mine.count == theirs.count > 0 and mine.sums == theirs.sums
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_likeliest(
    kind: str, kinds: dict[str, Path], tmp_path: Path
) -> None:
    """Row by row, without a cache and without padding, from the start that the model trains with."""
    folder, lora = kinds[kind], lora_of(kind)
    batch = data_of(folder, tmp_path).test.collate(np.arange(8))
    base = base_of(folder, lora)
    base.new_tokens = 6
    found = Writing(base).texts(batch)
    model, encoder = base.model, base.encoder
    for row, (said, wanted) in enumerate(found):
        real = batch.inputs["attention_mask"][row] == 1
        ids = batch.inputs["input_ids"][row][real][None]
        first = model.prepare_decoder_input_ids_from_labels(torch.tensor([[3, 2]]))[0, 0]
        if kind == "mbart":
            first = torch.tensor(SPECIAL["decoder_start_token_id"])
        written: list[int] = []
        while len(written) < 6:
            with torch.no_grad():
                so_far = torch.tensor([[int(first), *written]])
                token = int(model(input_ids=ids, decoder_input_ids=so_far).logits[0, -1].argmax())
            if token == 2:
                break
            written.append(token)
        assert said == encoder.tokenizer.decode(written, skip_special_tokens=True).strip()
        label = batch.labels[row]
        ids_wanted = label[label != IGNORED]
        assert wanted == encoder.tokenizer.decode(ids_wanted, skip_special_tokens=True)
        assert wanted


def test_a_checkpoint_without_the_bias_of_its_words(tmp_path: Path) -> None:
    folder = bart_alone(tmp_path / "bart")
    batch = data_of(folder, tmp_path).train.collate(np.arange(4))
    lora = lora_of("bart")
    engine = PeftEngine(base_of(folder, lora, torch.float32), lora)
    assert engine.evaluate(initial_adapter(engine.base.shapes, lora, 2, 1), {}, [batch]).count > 0


def test_a_prefix_is_put_before_each_text(kinds: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of(CASES["seq2seq"], 20)
    plain = data_of(kinds["t5"], tmp_path, rows)
    prefixed = data_of(kinds["t5"], tmp_path, rows, prefix="the fur ")
    by_hand = data_of(
        kinds["t5"], tmp_path, [{**row, "text": f"the fur {row['text']}"} for row in rows]
    )
    assert prefixed.fingerprint == by_hand.fingerprint != plain.fingerprint
    assert "prefix" not in DataSpec().model_dump_json()
    told = DataSpec(prefix="the fur ")
    assert DataSpec.model_validate_json(told.model_dump_json()) == told
    with pytest.raises(ConfigError, match="image-classification reads no column 'text'"):
        load(DataSpec(prefix="a "), "image-classification")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join([json.dumps({"prompt": "fur", "answer": "tail"})] * 4))
    with pytest.raises(ConfigError, match="these rows have no column 'text'"):
        load(DataSpec(prefix="a ", source=str(asked)), "causal-lm")


def test_targets_are_cut_and_end_all_the_same(kinds: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"text": "fur", "target": "tail " * 30},
        {"text": "fur " * 30, "target": "tail"},
        {"text": "fur", "target": "tail"},
    ]
    data = data_of(kinds["t5"], tmp_path, rows, max_length=6, test_fraction=0.0)
    assert data.cut["train"] == 2
    batch = data.train.collate(np.arange(3))
    assert (batch.labels == 2).sum(1).tolist() == [1, 1, 1]
    assert (batch.labels != IGNORED).sum(1).tolist() == [6, 2, 2]
    with pytest.raises(MismatchError, match=r"rows.jsonl:1: .*\n?.*no token of the target is left"):
        data_of(kinds["t5"], tmp_path, rows, max_length=1)


def test_a_tokenizer_that_ends_nothing(tmp_path: Path) -> None:
    """An end of text is put behind the target, within the limit: the model learns where to stop."""
    folder = tokenizer(t5(tmp_path / "t5"), framed=False)
    rows = [{"text": "fur", "target": "tail " * 9}, {"text": "fur", "target": "tail"}] * 2
    batch = data_of(folder, tmp_path, rows, max_length=4, test_fraction=0.0).train.collate(
        np.arange(2)
    )
    tail = VOCABULARY.index("tail")
    assert batch.labels.tolist() == [[tail] * 3 + [2], [tail, 2, IGNORED, IGNORED]]
    assert batch.inputs["input_ids"].tolist() == [[VOCABULARY.index("fur")]] * 2


def test_what_users_wrote_ends_no_target(kinds: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "fur [EOS] tail", "target": "[EOS] tail [EOS] paw"}] * 3
    batch = data_of(kinds["t5"], tmp_path, rows, test_fraction=0.0).train.collate(np.arange(1))
    for ids in (batch.labels, batch.inputs["input_ids"]):
        assert (ids == 2).sum().item() == 1 and ids[0, -1] == 2


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_no_block_of_two_stacks_is_left_out(kind: str, kinds: dict[str, Path]) -> None:
    """Refused with the model's name; and memory is told to be unknown, not reckoned wrongly."""
    spec, lora = spec_of(kinds[kind]), lora_of(kind)
    assert geometry(spec, kinds[kind]) is None
    with pytest.raises(MismatchError, match="memory budgets and pruning know models of"):
        load_base(spec, lora, 0, lean=True)
    base = base_of(kinds[kind], lora)
    left_out = pytest.raises(MismatchError, match="ForConditionalGeneration can be left out")
    with left_out, base.holding((0,)):
        pass
    with pytest.raises(MismatchError, match="cannot be told from its other layers"):
        PeftEngine(base, lora, checkpointing=True)


def test_layers_count_in_both_stacks(kinds: dict[str, Path]) -> None:
    paths = base_of(kinds["t5"], lora_of("t5", layers=(1,))).adapted
    assert {p.split(".")[0] for p in paths} == {"encoder", "decoder"}
    assert all(".block.1." in p for p in paths)
