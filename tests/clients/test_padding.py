"""A row's answer is that of the row alone, in the plain loop, in a cohort, and in stock PEFT.

Models of several families with tokenizers whose padding agrees with the configuration, differs from
it, is missing, is the end of text that every row ends in, or the token for the unknown.
"""

# pyright: standard
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from peft import PeftModel
from torch import Tensor

from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import models
from fedft.core.adapters.files import save_adapter
from fedft.core.examples import TokenExamples
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.tasks import task_of
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import Adapter, Factors, LocalTraining, TrainPlan
from tests.core.tokenizer_kinds import KINDS, byte_bpe

LORA = LoraSpec(rank=2, alpha=4, target_modules="all-linear")
TEXTS = [
    "the dog", "a quick brown fox jumps over the old stone", "river", "zebra 犬", "dog 犬 犬",
    "the dog </s>", "fox [SEP] [PAD]", "the <|endoftext|>", "end <pad>", "the old lazy dog 犬",
    "near", "the <unk> <unk>",
]  # fmt: skip
SIZE: dict[str, Any] = {
    "vocab_size": 420, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
SAVED: dict[str, Callable[[], Any]] = {
    "llama": lambda: tr.LlamaModel(tr.LlamaConfig(**SIZE)),
    "qwen2": lambda: tr.Qwen2Model(tr.Qwen2Config(**SIZE, num_key_value_heads=1)),
    "neox": lambda: tr.GPTNeoXModel(tr.GPTNeoXConfig(**SIZE)),
    "gpt2": lambda: tr.GPT2Model(
        tr.GPT2Config(vocab_size=420, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ),
    "bloom": lambda: tr.BloomModel(
        tr.BloomConfig(vocab_size=420, hidden_size=16, n_layer=2, n_head=2)
    ),
    "bert": lambda: tr.BertModel(tr.BertConfig(**SIZE)),
    "roberta": lambda: tr.RobertaModel(tr.RobertaConfig(**SIZE, pad_token_id=1)),
}


def wordpiece(pad: str | None) -> Any:
    tokenizer = KINDS["wordpiece"]()
    tokenizer.pad_token = pad
    return tokenizer


def closing(pad: str | None) -> Any:
    tokenizer = KINDS["unigram"]()
    tokenizer.pad_token = pad
    tokenizer.padding_side = "left"
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "own pad": lambda: byte_bpe(
        ["<|endoftext|>", "</s>", "<|im_end|>", "<pad>"], pad_token="<pad>"
    ),
    "no pad": lambda: byte_bpe(),
    "pad is eos": lambda: byte_bpe(pad_token="<|endoftext|>"),
    "pad is the end of each row": lambda: closing("</s>"),
    "pad is the unknown": lambda: wordpiece("[UNK]"),
    "pad is the separator": lambda: wordpiece("[SEP]"),
    "bert's": lambda: wordpiece("[PAD]"),
    "one control token, in each row": lambda: framed(),
}


def framed() -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_bpe(["</s>"], pad_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    return tokenizer


def saved(folder: Path, model: str, tokenizer: str, configured: int | None) -> ModelSpec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SAVED[model]()
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(8)
    network.save_pretrained(folder)
    TOKENIZERS[tokenizer]().save_pretrained(folder)
    if model != "roberta":  # counts positions from its padding: that is part of the network
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": configured}))
    return ModelSpec(source=str(folder))


def adapter_of(spec: ModelSpec) -> Adapter:
    initial = models.initial_adapter(models.schema(spec, LORA, 3), LORA, 2, seed=0)
    generator = torch.Generator().manual_seed(1)
    return Adapter(
        {
            m: Factors(f.A, torch.randn(f.B.shape, generator=generator) / 8, f.scale)
            for m, f in initial.factors.items()
        },
        {n: torch.randn(t.shape, generator=generator) for n, t in initial.head.items()},
    )


def stock(spec: ModelSpec, encoder: TextEncoder, folder: Path) -> tuple[Any, Any]:
    """What the README tells a user to do."""
    about: dict[str, Any] = {"base": spec.source, "revision": None, "task": spec.task}
    save_adapter(folder, adapter_of(spec), {}, **about)
    for name, content in encoder.files().items():
        (folder / name).write_bytes(content)
    tokenizer = tr.AutoTokenizer.from_pretrained(folder)
    base = tr.AutoModelForSequenceClassification.from_pretrained(spec.source, num_labels=3)
    base.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, PeftModel.from_pretrained(base, folder).eval()


def alone(model: Any, examples: TokenExamples) -> Tensor:
    """Each row by itself, without padding, read at its last token where the head reads one."""
    config = model.base_model.model.config
    pad, config.pad_token_id = config.pad_token_id, None
    try:
        rows = np.split(examples.ids.astype(np.int64), examples.offsets[1:-1])
        return torch.cat([model(input_ids=torch.from_numpy(row)[None]).logits for row in rows])
    finally:
        config.pad_token_id = pad


EVERY = [("llama", tokenizer, 3) for tokenizer in TOKENIZERS]
FAMILIES = [
    (model, tokenizer, configured)
    for model in SAVED
    for tokenizer, configured in (("bert's", None), ("own pad", 0), ("pad is the unknown", None))
    if model != "bert" or tokenizer == "bert's"
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft, of GPT-2's layers
@pytest.mark.parametrize(("model", "tokenizer", "configured"), EVERY + FAMILIES)
def test_a_row_has_one_answer(
    tmp_path: Path, model: str, tokenizer: str, configured: int | None
) -> None:
    spec = saved(tmp_path / "model", model, tokenizer, configured)
    encoder = models.input_encoder(spec, tmp_path / "model")
    labels = np.arange(len(TEXTS)) % 3
    examples = tokens.labelled(TEXTS, labels, encoder, 40).examples
    adapter, every = adapter_of(spec), np.arange(len(TEXTS))
    batch = examples.collate(every)

    loop = PeftEngine(models.load_base(spec, LORA, 3), LORA)
    loop._load(adapter, None)
    with torch.inference_mode():
        got = loop._outputs(batch)
        expected_model = stock(spec, encoder, tmp_path / "adapter")
        expected = alone(expected_model[1], examples)
        assert torch.allclose(got, expected, atol=1e-4), "in the plain loop"

        # Stock PEFT, with the exported tokenizer: on our rows, and on texts that it can be told.
        usual, peft = expected_model
        assert torch.allclose(peft(**batch.inputs).logits, expected, atol=1e-4)
        ordinary = [i for i, text in enumerate(TEXTS) if not set("<[") & set(text)]
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 40}
        asked = usual([TEXTS[i] for i in ordinary], return_tensors="pt", **options)
        asked.pop("token_type_ids", None)
        assert torch.allclose(peft(**asked).logits, expected[ordinary], atol=1e-4)

    task = task_of("classification")
    score = task.scores(task.tally(expected, batch.labels))
    cohort = CohortEngine(models.load_base(spec, LORA, 3), LORA)
    batches = [examples.collate(part) for part in np.array_split(every, 4)]
    found = task.scores(cohort.evaluate(adapter, {}, batches))
    assert found == pytest.approx(score, abs=1e-4), "in a cohort"

    # Four sites with rows of different lengths in one pass, and one after the other.
    plans = [TrainPlan(adapter, training=LocalTraining(lr=1e-2), site=f"s{i}") for i in range(4)]
    own = [[b] for b in batches]
    together, apart = cohort.train(plans, own), loop.train(plans, own)
    for a, b in zip(together, apart, strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], abs=1e-4)


def test_xlnet_is_padded_before_its_rows(tmp_path: Path) -> None:
    """Its head reads the last column, whatever stands there."""
    config = tr.XLNetConfig(vocab_size=420, d_model=16, n_layer=2, n_head=2, d_inner=24)
    SAVED["xlnet"] = lambda: tr.XLNetForSequenceClassification(config)
    spec = saved(tmp_path / "model", "xlnet", "bert's", 0)
    encoder = models.input_encoder(spec, tmp_path / "model")
    examples = tokens.labelled(TEXTS, np.zeros(len(TEXTS), np.int64), encoder, 40).examples
    assert examples.side == "left" == encoder.tokenizer.padding_side
    model = models.load_base(spec, LORA, 2).model
    batch = examples.collate(np.arange(len(TEXTS)))
    with torch.inference_mode():
        together = model(**batch.inputs).logits
        rows = np.split(examples.ids.astype(np.int64), examples.offsets[1:-1])
        single = torch.cat([model(input_ids=torch.from_numpy(r)[None]).logits for r in rows])
    assert torch.allclose(together, single, atol=1e-4)
    from fedft.clients.engines.unpadded import join

    halves = [examples.collate(part) for part in np.array_split(np.arange(len(TEXTS)), 3)]
    step = join(halves, task_of("classification"), examples.pad_id, packs=False, side="left")
    assert torch.equal(step.inputs["input_ids"], batch.inputs["input_ids"])
    assert torch.equal(step.inputs["attention_mask"], batch.inputs["attention_mask"])
