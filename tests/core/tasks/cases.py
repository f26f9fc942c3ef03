"""What each task needs for its laws: rows, a small model, and rows that are wrong. One entry a task."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORDS = {
    "animal": "fur tail paw bark claw wing",
    "tool": "steel handle blade cut drill grip",
    "plant": "leaf root seed bloom stem green",
}
COMMON = "the a of with small large old that has"
VOCABULARY = ["[PAD]", "[UNK]", "[EOS]", *COMMON.split(), *" ".join(WORDS.values()).split()]

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One task.

    Attributes:
        model: writes a small model into a folder.
        row: makes a row of the data.
        bad: reason → (a row that is wrong, what the message says of it).
        lora: of the model.
        kind: of the partition.
    """

    model: Callable[[Path], Path]
    row: Callable[[random.Random, int], Row]
    bad: Mapping[str, tuple[Row, str]]
    lora: tuple[str, ...] = ("query", "value")
    kind: str = "dirichlet"


def rows_of(case: Case, count: int = 48, seed: int = 0) -> list[Row]:
    """Rows of a task, of uneven length."""
    rng = random.Random(seed)
    return [case.row(rng, i) for i in range(count)]


# ------------------------------------------------------------------------------------- models


def tokenizer(folder: Path, *, framed: bool) -> Path:
    """Words to ids, with padding and an end of text; ``framed`` puts that around each text of a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(VOCABULARY)}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        own.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", pair="$A [EOS] $B:1 [EOS]:1", special_tokens=[("[EOS]", 2)]
        )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    types = ["token_type_ids"] if framed else []
    inputs = ["input_ids", *types, "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=inputs, **named)
    fast.save_pretrained(folder)
    return folder


def _written(model: Any, folder: Path) -> Path:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(10)  # at the usual scale a random network is almost constant
    model.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """Two blocks."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
    return tokenizer(_written(model, folder), framed=True)


def llama(folder: Path) -> Path:
    """Two blocks, with a layer of words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return tokenizer(_written(model, folder), framed=False)


def t5(folder: Path) -> Path:
    """Two blocks in the encoder, and two in the decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    return tokenizer(_written(model, folder), framed=True)


def vit(folder: Path) -> Path:
    """One block."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------- rows


def _words(rng: random.Random, label: str) -> list[str]:
    words = rng.sample(WORDS[label].split(), 2) + rng.sample(COMMON.split(), rng.randint(1, 5))
    rng.shuffle(words)
    return words


def _labelled(rng: random.Random, i: int) -> Row:
    label = list(WORDS)[i % 3]
    return {"text": " ".join(_words(rng, label)), "label": label}


def _paired(rng: random.Random, i: int) -> Row:
    first = rng.choice(list(WORDS))
    second = first if i % 2 else rng.choice([w for w in WORDS if w != first])
    texts = (" ".join(_words(rng, kind)) for kind in (first, second))
    return {**dict(zip(("text", "pair"), texts, strict=True)), "label": ("other", "same")[i % 2]}


def _asked(rng: random.Random, i: int) -> Row:
    label = list(WORDS)[i % 3]
    return {"prompt": " ".join(_words(rng, label)), "answer": " ".join(_words(rng, label))}


def _turned(rng: random.Random, i: int) -> Row:
    words = _words(rng, list(WORDS)[i % 3])
    return {"text": " ".join(words), "target": " ".join(words[::-1][: rng.randint(1, 4)])}


def _related(rng: random.Random, i: int) -> Row:
    words = _words(rng, list(WORDS)[i % 3])
    other = [*rng.sample(words, 2), rng.choice(COMMON.split())]
    return {"text": " ".join(words), "positive": " ".join(other)}


def _preferred(rng: random.Random, i: int) -> Row:
    label = list(WORDS)[i % 3]
    other = rng.choice([w for w in WORDS if w != label])
    prompt, chosen, rejected = (" ".join(_words(rng, kind)) for kind in (label, label, other))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _image(rng: random.Random, i: int) -> Row:
    shade = 60 + 120 * (i % 2) + rng.randint(0, 20)
    return {"image": [[[shade, 255 - shade, i]] * 8] * 8, "label": str(i % 2)}


def _tagged(rng: random.Random, i: int) -> Row:
    words = _words(rng, list(WORDS)[i % 3])
    kinds = {w: kind for kind, own in WORDS.items() for w in own.split()}
    tags, before = list[str](), None
    for kind in map(kinds.get, words):
        tags.append("O" if kind is None else f"{'I' if kind == before else 'B'}-{kind}")
        before = kind
    return {"tokens": words, "tags": tags}


def _several(rng: random.Random, i: int) -> Row:
    own = [label for k, label in enumerate(WORDS) if i >> k & 1]
    words = [w for label in own for w in rng.sample(WORDS[label].split(), 2)]
    return {"text": " ".join(["the", *words]), "labels": own}


def _measured(rng: random.Random, i: int) -> Row:
    words = _words(rng, list(WORDS)[i % 3])
    return {"text": " ".join(words), "target": -100 if i == 5 else float(i % 3)}


_EMPTY_TEXT = ({"text": " ", "label": "tool"}, "text: nothing but white space")
_NO_LABEL = ({"text": "fur", "label": None}, "label: missing or empty")

CASES: dict[str, Case] = {
    "classification": Case(bert, _labelled, {"empty": _EMPTY_TEXT, "label": _NO_LABEL}),
    "causal-lm": Case(
        llama,
        _asked,
        {
            "empty answer": ({"prompt": "fur", "answer": ""}, "answer: missing or empty"),
            "all cut": (
                {"prompt": "fur " * 40, "answer": "tail"},
                "no token of the answer is left",
            ),
            "number": ({"prompt": 3, "answer": "tail"}, "prompt: text is expected, got int"),
        },
        lora=("q_proj", "v_proj"),
        kind="iid",
    ),
    "image-classification": Case(
        vit,
        _image,
        {
            "no image": ({"image": "gone.png", "label": "0"}, "image: not a readable image"),
            "ragged": ({"image": [[1, 2], [3]], "label": "0"}, "image: not a readable image"),
        },
        lora=("q_proj", "v_proj"),
    ),
    "text-pair": Case(
        bert,
        _paired,
        {
            "missing pair": ({"text": "fur", "label": "same"}, "pair: missing or empty"),
            "a list": (
                {"text": "fur", "pair": ["tail"], "label": "same"},
                "pair: text is expected, got list",
            ),
            "label": ({"text": "fur", "pair": "tail", "label": None}, "label: missing or empty"),
        },
    ),
    "seq2seq": Case(
        t5,
        _turned,
        {
            "no target": ({"text": "fur"}, "target: missing or empty"),
            "empty target": ({"text": "fur", "target": " "}, "target: nothing but white space"),
            "a list": (
                {"text": ["fur"], "target": "tail"},
                "text: text is expected, got list",
            ),
        },
        lora=("q", "v"),
        kind="iid",
    ),
    "preference": Case(
        llama,
        _preferred,
        {
            "missing pair": ({"prompt": "fur", "chosen": "tail"}, "rejected: missing or empty"),
            "missing prompt": (
                {"prompt": None, "chosen": "tail", "rejected": "leaf"},
                "prompt: missing or empty",
            ),
            "alike": (
                {"prompt": "fur", "chosen": "tail", "rejected": "tail"},
                "rejected: chosen and rejected are the same",
            ),
            "empty answer": (
                {"prompt": "fur", "chosen": "", "rejected": "leaf"},
                "chosen: missing or empty",
            ),
            "unknown role": (
                {
                    "prompt": [{"role": "gpt", "content": "fur"}],
                    "chosen": [{"role": "assistant", "content": "tail"}],
                    "rejected": [{"role": "assistant", "content": "leaf"}],
                },
                "prompt: message 1: its role is 'gpt'; roles are system, user, assistant",
            ),
            "all cut": (
                {"prompt": "fur " * 40, "chosen": "tail", "rejected": "leaf"},
                "no token of the answer is left",
            ),
            "cut alike": (
                {"prompt": "fur", "chosen": "tail " * 40 + "leaf", "rejected": "tail " * 40},
                "in data.max-length = 24 both answers are the same tokens",
            ),
        },
        lora=("q_proj", "v_proj"),
        kind="iid",
    ),
    "token-classification": Case(
        bert,
        _tagged,
        {
            "ragged": (
                {"tokens": ["fur", "the"], "tags": ["O"]},
                "tags: 1 for 2 words: there must be one for each",
            ),
            "no list": (
                {"tokens": "fur", "tags": ["O"]},
                "tokens: a list of words is expected, got str (in a cell of CSV",
            ),
            "no words": ({"tokens": [], "tags": []}, "tokens: no word at all"),
            "an empty word": (
                {"tokens": ["fur", " "], "tags": ["O", "O"]},
                "tokens: word 2: nothing but white space",
            ),
            "a number": (
                {"tokens": ["fur", 3], "tags": ["O", "O"]},
                "tokens: word 2: text is expected, got int",
            ),
            "half a character": (
                {"tokens": ["\ud800"], "tags": ["O"]},
                "tokens: word 1: not a valid Unicode text",
            ),
            "missing": ({"tokens": None, "tags": ["O"]}, "tokens: missing or empty"),
            "tags": (
                {"tokens": ["fur"], "tags": "O"},
                "tags: a list of labels is expected, got str",
            ),
            "a tag": ({"tokens": ["fur"], "tags": [[]]}, "tags: text or an integer is expected"),
            "no tag": ({"tokens": ["fur"], "tags": [None]}, "tags: missing or empty"),
        },
    ),
    "multi-label": Case(
        bert,
        _several,
        {
            "missing": ({"text": "fur", "labels": None}, "labels: missing or empty"),
            "empty cell": ({"text": "fur", "labels": ""}, "labels: missing or empty"),
            "no list": (
                {"text": "fur", "labels": "tool"},
                "labels: a list of labels is expected, got str",
            ),
            "broken JSON": (
                {"text": "fur", "labels": '["tool"'},
                "labels: a list of labels is expected, got str",
            ),
            "twice": (
                {"text": "fur", "labels": ["tool", "tool"]},
                "labels: 'tool' stands there twice",
            ),
            "a label": ({"text": "fur", "labels": ["tool", None]}, "labels: missing or empty"),
            "empty text": ({"text": "", "labels": ["tool"]}, "text: missing or empty"),
        },
    ),
    "regression": Case(
        bert,
        _measured,
        {
            "word": (
                {"text": "fur", "target": "much"},
                "target: a number is expected, got str",
            ),
            "missing": ({"text": "fur", "target": None}, "target: missing or empty"),
            "NaN": ({"text": "fur", "target": float("nan")}, "target: missing or empty"),
            "infinite": (
                {"text": "fur", "target": float("inf")},
                "target: a finite number is expected, got an infinite one",
            ),
            "spelt infinite": ({"text": "fur", "target": "inf"}, "target: a number is expected"),
            "boolean": ({"text": "fur", "target": True}, "target: a number is expected, got bool"),
            "huge": ({"text": "fur", "target": 1e30}, "target: larger than 1e+18"),
            "huge integer": ({"text": "fur", "target": 10**400}, "target: larger than 1e+18"),
        },
        kind="iid",
    ),
    "sentence-embeddings": Case(
        bert,
        _related,
        {
            "missing pair": ({"text": "fur"}, "positive: missing or empty"),
            "empty pair": ({"text": "fur", "positive": " "}, "positive: nothing but white space"),
            "a number": ({"text": 3, "positive": "fur"}, "text: text is expected, got int"),
        },
        kind="iid",
    ),
    # Tasks of the tests alone.
    "topics": Case(
        bert, _several, {"labels": ({"text": "fur", "labels": None}, "labels: missing")}, kind="iid"
    ),
}
