"""Which token pads and which ends an answer, for every way in which a checkpoint can disagree."""

# pyright: standard
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedft.core.errors import MismatchError
from fedft.core.text import tokens
from fedft.core.text.special_tokens import TextEncoder, special_tokens, text_encoder
from tests.core.tokenizer_kinds import CHATML, KINDS, byte_bpe, metaspace_bpe, whole_word_bpe


def saved(
    folder: Path, tokenizer: Any, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> Path:
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": len(tokenizer), **config}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def names(encoder: TextEncoder, *ids: int | None) -> list[str]:
    return [str(encoder.tokenizer.convert_ids_to_tokens(i)) for i in ids]


PADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("configured", [None, 0, 2, 40])
def test_the_tokenizers_own_padding_wins(tmp_path: Path, task: str, configured: int | None) -> None:
    """Whatever the configuration says: nothing, another control token, or a piece of text."""
    tokenizer = byte_bpe(PADDED, pad_token="<pad>")
    encoder = text_encoder(
        saved(tmp_path, tokenizer, {"pad_token_id": configured}), pools=task == "classification"
    )
    assert encoder.special.pad == 3 == encoder.tokenizer.pad_token_id


def pads(folder: Path, tokenizer: Any, task: str = "classification", **config: Any) -> str:
    encoder = text_encoder(saved(folder, tokenizer, config), pools=task == "classification")
    assert encoder.tokenizer.pad_token_id == encoder.special.pad
    return names(encoder, encoder.special.pad)[0]


def test_without_its_own_the_configuration_says(tmp_path: Path) -> None:
    tokenizer = whole_word_bpe()
    configured = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for task in ("classification", "causal-lm"):
        assert pads(tmp_path, tokenizer, task, pad_token_id=configured) == "<|im_start|>"


def test_a_configuration_that_pads_with_text_is_not_followed(tmp_path: Path) -> None:
    tokenizer = whole_word_bpe()
    assert pads(tmp_path, tokenizer, pad_token_id=70) == "<|eot|>"
    assert pads(tmp_path, tokenizer, "causal-lm", pad_token_id=70) == "<|eot|>"
    text = "the dog, ! A"
    again = text_encoder(tmp_path, pools=False).plain.encode([text]).rows[0]
    assert again == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_padding_token_that_nobody_declared_is_found(tmp_path: Path) -> None:
    assert pads(tmp_path, byte_bpe(PADDED)) == "<pad>"


def test_padding_outside_the_embedding_is_none(tmp_path: Path) -> None:
    """Added to a tokenizer, and the model not resized."""
    tokenizer = byte_bpe()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for task in ("classification", "causal-lm"):
        assert pads(tmp_path, tokenizer, task, vocab_size=rows) == "<|endoftext|>"


def test_the_end_of_text_pads_where_the_tokenizer_does_not_write_it(tmp_path: Path) -> None:
    assert pads(tmp_path, byte_bpe(pad_token="<|endoftext|>")) == "<|endoftext|>"


def test_where_it_does_another_control_token_pads(tmp_path: Path) -> None:
    tokenizer = KINDS["unigram"]()
    tokenizer.pad_token = "</s>"
    assert pads(tmp_path, tokenizer) == "<pad>"
    # A language model's rows end in it, and the mask alone says what is padding.
    assert pads(tmp_path, tokenizer, "causal-lm") == "</s>"


def test_what_stands_for_the_unknown_is_no_padding(tmp_path: Path) -> None:
    tokenizer = KINDS["wordpiece"]()
    tokenizer.pad_token = "[UNK]"
    assert pads(tmp_path, tokenizer) == "[PAD]"
    # With bytes for the unknown, the token for it is never written.
    assert pads(tmp_path / "bytes", metaspace_bpe()) == "<unk>"


def only(folder: Path, **config: Any) -> TextEncoder:
    """A tokenizer with one control token, which it writes in each row."""
    tokenizer = byte_bpe(["</s>"], pad_token="</s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    return text_encoder(saved(folder, tokenizer, config), pools=True)


def test_a_spare_row_of_the_embedding_pads_where_no_token_can(tmp_path: Path) -> None:
    encoder = only(tmp_path, vocab_size=400)
    assert names(encoder, encoder.special.pad) == ["<pad>"] and encoder.special.pad < 400
    row = encoder.plain.encode(["the <pad> dog"], special=True).rows[0]
    assert encoder.special.pad not in row
    again = AutoTokenizer.from_pretrained(folder := written(encoder, tmp_path / "out"))
    assert again.pad_token_id == encoder.special.pad, folder


def written(encoder: TextEncoder, folder: Path) -> Path:
    folder.mkdir()
    for name, content in encoder.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_a_decoder_without_any_is_refused_and_an_encoder_is_not(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no token that could pad rows"):
        only(tmp_path / "llama")
    assert only(tmp_path / "bert", model_type="bert").special.pad == 0


def test_the_load_of_the_model_finds_the_same_decision(tmp_path: Path) -> None:
    encoder = only(tmp_path, vocab_size=400)
    assert special_tokens(tmp_path, pools=True) == encoder.special
    only(tmp_path, vocab_size=500, pad_token_id=7)  # other files in the same place
    assert special_tokens(tmp_path / "nothing", pools=True) is None


# The end of text


@pytest.mark.parametrize("where", ["config", "generation"])
def test_any_of_a_list_ends_and_the_tokenizers_is_appended(tmp_path: Path, where: str) -> None:
    tokenizer = whole_word_bpe()
    eot, other, text = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"), 50
    listed = {"eos_token_id": [other, eot, text]}
    config, generation = (listed, None) if where == "config" else ({}, listed)
    special = text_encoder(saved(tmp_path, tokenizer, config, generation), pools=False).special
    assert special.end == eot
    assert special.ends == {eot, other}, "a piece of text ends nothing, whatever a file says"


def test_without_an_end_of_its_own_the_configuration_says(tmp_path: Path) -> None:
    tokenizer = KINDS["wordpiece"]()
    sep, cls = tokenizer.sep_token_id, tokenizer.cls_token_id
    for configured, expected in ((sep, sep), (cls, sep), (None, sep), (70, sep)):
        folder = saved(tmp_path / str(configured), tokenizer, {"eos_token_id": configured})
        assert text_encoder(folder, pools=False).special.end == expected
    bare = KINDS["word_level"]()
    assert text_encoder(saved(tmp_path / "bare", bare, {}), pools=False).special.end is None


def learned(encoder: Any, answer: str, limit: int = 100) -> list[int]:
    got = tokens.answered(["the dog"], [answer], encoder, limit).examples
    assert got.answers is not None
    return got.ids[got.answers[0] :].tolist()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "word_level"])
def test_every_answer_ends_once_whatever_it_ends_in(kind: str, tmp_path: Path) -> None:
    """An unknown or an added character, a control token written out, white space."""
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens(["é"])
    encoder = text_encoder(saved(tmp_path, tokenizer, {}), pools=False)
    end = encoder.special.end
    named = str(tokenizer.convert_ids_to_tokens(end))
    for answer in ("dog", "dog 犬", "dogé", "é", f"dog{named}", named, "dog ", "the dog\n"):
        row = learned(encoder, answer)
        assert row[-1] == end and row.count(end) == 1 and len(row) > 1, answer
    no_end = KINDS["word_level"]()
    assert learned(no_end, "dog zebra")[-1] == no_end.unk_token_id, "control: nothing to append"


TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "a template that writes no end": (CHATML.replace("<|im_end|>", ""), "<|endoftext|>"),
    "one that ends in words": (CHATML.replace("<|im_end|>", " END"), "<|endoftext|>"),
    "one without a generation prompt": (CHATML.partition("{% if add")[0], "<|im_end|>"),
    "two ends": (CHATML.replace("<|im_end|>\n", "<|im_end|>\n<|endoftext|>"), "<|endoftext|>"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_own_end_of_turn_is_enough(template: str, tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template, name = TEMPLATES[template]
    encoder = text_encoder(saved(tmp_path, tokenizer, {}), pools=False)
    expected = tokenizer.convert_tokens_to_ids(name)
    for answer in ("dog", "é", "dog<|im_end|>", "<|im_end|>\n<|im_start|>user\nx"):
        row = learned(encoder, answer)
        assert row[-1] == expected and row.count(expected) == 1, (answer, row)
        shown = tokenizer.decode(row)
        assert answer in shown, "what the user wrote is all there"


def test_a_cut_answer_has_no_end_and_is_counted(tmp_path: Path) -> None:
    encoder = text_encoder(saved(tmp_path, byte_bpe(), {}), pools=False)
    whole = learned(encoder, "dog fox stone")
    prompt = tokens.answered(["the dog"], ["x"], encoder, 100).examples.answers
    assert prompt is not None
    full = int(prompt[0]) + len(whole)
    for limit in range(full - 3, full + 2):
        row = learned(encoder, "dog fox stone", limit)
        cut = tokens.answered(["the dog"], ["dog fox stone"], encoder, limit).cut.tolist()
        assert cut == [limit < full]
        assert (row[-1] == encoder.special.end) == (limit >= full)
