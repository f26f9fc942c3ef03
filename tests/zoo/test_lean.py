"""A base that loads the blocks it is asked for equals the whole one that leaves the others out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.core import models
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.server.config_file import parse_config
from fedft.server.pruning import pruning_of
from tests.zoo.builders import KINDS, VOCABULARY, Kind, build

LORA = LoraSpec(rank=1)
BUILT = [
    k
    for k in KINDS
    if k.name not in ("led", "dinov3_vit") and (k.saved, k.task) != ("Seq2SeqLM", "causal-lm")
]
SOME = (
    "modernbert-classification",
    "gpt_oss-causal-lm",
    "lfm2-causal-lm",
    "beit-image-classification",
)
"""Whose blocks differ by their index, and one of images."""

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    place = tmp_path_factory.mktemp("lean")

    def get(kind: Kind) -> Path:
        folder = place / str(kind)
        return folder if folder.exists() else build(kind, folder)

    return get


def inputs_of(kind: Kind) -> dict[str, torch.Tensor]:
    generator = torch.manual_seed(0)
    if kind.task == "image-classification":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, VOCABULARY - 90, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def lean_equals_whole(kind: Kind, folder: Path) -> bool:
    """Whether this kind can be held in part; if so, each part gives the same bits."""
    spec = ModelSpec(source=str(folder), task=kind.task)  # pyright: ignore
    try:
        shapes = models.schema(spec, LORA, 3)
        lean = models.load_base(spec, LORA, 3, lean=True)
    except MismatchError:
        return False
    whole = models.load_base(spec, LORA, 3)
    heads = {n: t for n, t in lean.model.state_dict().items() if lean.head.holds(n)}
    whole.model.load_state_dict(heads, strict=False)
    if not shapes.separable:
        with pytest.raises(MismatchError, match="can be left out"), whole.holding((0,)):
            pass
        return False
    inputs, seen = inputs_of(kind), []
    for part in ((0,), (1,), (0, 1), (0,)):
        with torch.inference_mode(), whole.holding(part):
            a = whole.model(**inputs).logits
        with torch.inference_mode(), lean.holding(part):
            b = lean.model(**inputs).logits
        torch.testing.assert_close(a, b, atol=0, rtol=0)
        seen.append(a)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]), "both blocks give the same: nothing was compared"
    return True


@pytest.mark.parametrize("kind", [k for k in BUILT if str(k) in SOME], ids=str)
def test_a_few_lean_models_equal_the_whole(kind: Kind, folder_of: Any) -> None:
    assert lean_equals_whole(kind, folder_of(kind))


@pytest.mark.zoo
@pytest.mark.parametrize("kind", [k for k in BUILT if str(k) not in SOME], ids=str)
def test_a_lean_model_equals_the_whole_or_is_refused(kind: Kind, folder_of: Any) -> None:
    lean_equals_whole(kind, folder_of(kind))


PART = {"fleet": {"clients": 4, "model-shares": [0.5, 1.0]}, "pruning": {"selection": "first"}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin-image-classification", "one list of equal transformer blocks"),
        ("albert-classification", "one list of equal transformer blocks"),
        ("mamba-causal-lm", "one list of equal transformer blocks"),
        ("mpnet-classification", "can be left out"),
        ("gpt_neox-causal-lm", "can be left out"),
        ("modernbert-classification", None),
    ],
)
def test_what_cannot_be_held_in_part_is_refused_by_name_before_anything_starts(
    name: str, words: str | None, folder_of: Any, tiny_table: Any
) -> None:
    kind = next(k for k in KINDS if str(k) == name)
    folder = folder_of(kind)
    model = {"source": str(folder), "task": kind.task}
    table = tiny_table(model=model, lora={"rank": 2}, **PART)
    if kind.task == "causal-lm":
        table["data"] = {"source": "qa.jsonl"}
    config = parse_config(table)
    shapes = models.schema(config.model, config.lora, 3)
    geometry = models.geometry(config.model, folder)
    if words is None:
        pruning, _ = pruning_of(config, shapes, geometry)
        assert pruning is not None
        return
    with pytest.raises(ConfigError, match=words) as caught:
        pruning_of(config, shapes, geometry)
    assert name in caught.value.what and caught.value.fix


AUTO = [
    ("bert-classification", {"query", "value"}),
    ("llama-causal-lm", {"q_proj", "v_proj"}),
    ("gpt2-causal-lm", {"c_attn"}),
    ("t5-classification", {"q", "v"}),
    ("opt-causal-lm", {"q_proj", "v_proj"}),
]


@pytest.mark.parametrize(("name", "wanted"), AUTO)
def test_auto_is_pefts_own_choice(name: str, wanted: set[str], folder_of: Any) -> None:
    """The naive twin is stock peft, told nothing about targets."""
    import transformers
    from peft import LoraConfig, get_peft_model

    kind = next(k for k in KINDS if str(k) == name)
    folder = folder_of(kind)
    spec = ModelSpec(source=str(folder), task=kind.task)  # pyright: ignore
    shapes = models.schema(spec, LORA, 3)
    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[kind.task]
    task = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}[kind.task]
    stock = get_peft_model(auto.from_pretrained(folder), LoraConfig(r=1, task_type=task))  # pyright: ignore
    theirs = {
        n.removeprefix("base_model.model.")
        for n, m in stock.named_modules()
        if hasattr(m, "lora_A")
    }
    assert shapes.modules.keys() == theirs
    assert {path.rsplit(".", 1)[-1] for path in theirs} == wanted


def test_all_linear_leaves_out_what_has_rank_one(folder_of: Any) -> None:
    """ESM's contact head gives one number; Mamba's out_proj runs past an adapter."""
    esm = next(k for k in KINDS if k.type == "esm")
    spec = ModelSpec(source=str(folder_of(esm)))
    every = LoraSpec(rank=2, target_modules="all-linear")
    shapes = models.schema(spec, every, 3)
    assert not any("contact_head" in path for path in shapes.modules)
    named = models.schema(spec, LoraSpec(rank=1, target_modules=("regression",)), 3)
    assert list(named.modules) == ["esm.contact_head.regression"]  # who asks for it gets it
    mamba = next(k for k in KINDS if k.type == "mamba")
    spec = ModelSpec(source=str(folder_of(mamba)), task="causal-lm")
    assert not any(p.endswith("out_proj") for p in models.schema(spec, every, 0).modules)
