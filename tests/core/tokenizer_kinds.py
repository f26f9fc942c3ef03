"""Small tokenizers of every kind that transformers' models have, trained on a few sentences."""

# pyright: standard
import json
import random
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the", "old", "lazy", "dog", "jumps", "over", "a", "quick", "brown", "fox", "and", "sleeps",
    "near", "river", "stone", "user", "pad", "end",
]  # fmt: skip
_rng = random.Random(0)
CORPUS = [" ".join(_rng.choices(WORDS, k=10)) for _ in range(200)]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _fast(tokenizer: Tokenizer, **named: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _frame(tokenizer: Tokenizer, template: str, *names: str) -> None:
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_bpe(specials: list[str] = CHAT_TOKENS, **named: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind: control tokens are the first words of the vocabulary."""
    return _fast(_byte_level(specials), **({"eos_token": specials[0]} | named))


def whole_word_bpe() -> PreTrainedTokenizerFast:
    """Llama 3's kind: control tokens are added behind; words of the vocabulary need no merges."""
    plain = _byte_level([])
    plain.model.ignore_merges = True
    plain.add_special_tokens(["<|begin|>", "<|eot|>", "<|im_start|>", "<|im_end|>"])
    _frame(plain, "<|begin|> $A", "<|begin|>")
    return _fast(plain, bos_token="<|begin|>", eos_token="<|eot|>")


def metaspace_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's kind: bytes for what is unknown, a beginning, and padding that is the unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["▁".join(["", *c.split()]) for c in CORPUS], trainer)
    changed = json.loads(tokenizer.to_str())
    changed["added_tokens"] = changed["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(changed))
    _frame(tokenizer, "<s> $A", "<s>")
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "[ ] < > / | _"], trainer)
    _frame(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return _fast(
        tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def unigram() -> PreTrainedTokenizerFast:
    """T5's and XLM-R's kind: control tokens are words of the model, and wide letters made narrow."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "< > / | [ ] _"], trainer)
    _frame(tokenizer, "$A </s>", "</s>")
    return _fast(tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """Words between white space, so that a control token is a word like any other."""
    names = ["[PAD]", "[UNK]", "[CLS]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _frame(tokenizer, "[CLS] $A", "[CLS]")
    return _fast(tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def loose_bpe() -> PreTrainedTokenizerFast:
    """Control tokens that swallow the white space beside them, and an added word that is none."""
    plain = _byte_level(["<|endoftext|>"])
    plain.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, lstrip=True)])
    plain.add_special_tokens([AddedToken("<|im_start|>", normalized=True)])
    plain.add_tokens(["<think>", "  "])
    return _fast(plain, eos_token="<|endoftext|>")


KINDS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        byte_bpe, whole_word_bpe, metaspace_bpe, wordpiece, unigram, word_level, loose_bpe
    )
}  # fmt: skip
