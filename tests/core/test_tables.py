"""Tables that stay in their file."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fedft.core import models, tables
from fedft.core.models import Base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.tables import Table, find, output_of

WORDS, WIDTH = 20_000, 64
LORA = LoraSpec(rank=2, target_modules=("q_proj", "v_proj"))
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's maps")


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    found = [re.search(r"^Rss: +(\d+) kB", p, re.MULTILINE) for p in parts if str(path) in p]
    return sum(1024 * int(size[1]) for size in found if size)


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Tensor]:
    g = torch.Generator().manual_seed(0)
    words = torch.randn(WORDS, WIDTH, generator=g)
    save_file(
        {"a": torch.zeros(3), "words.weight": words, "z": torch.ones(5)}, tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors", words


@pytest.mark.parametrize("window", [1, 1000, 1 << 20])
def test_rows_are_those_of_the_table(
    file: tuple[Path, Tensor], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "WINDOW", window)
    path, words = file
    table = Table(path, "words.weight")
    ids = torch.tensor([[0, WORDS - 1, 17], [17, 2000, 0]])
    assert torch.equal(table.rows(ids), words[ids])
    assert table.rows(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, WIDTH)
    assert torch.equal(table.weight, words)


@linux
def test_what_has_been_looked_at_is_handed_back(file: tuple[Path, Tensor]) -> None:
    path, words = file
    table = Table(path, "words.weight")
    assert resident(path) == 0
    assert torch.equal(table.weight, words)
    assert resident(path) >= words.nbytes
    half = WORDS // 2
    table.release(0, half)
    assert resident(path) < words.nbytes * 0.52  # less where huge pages reached into that half
    table.release(half, WORDS + 1)
    table.rows(torch.arange(0, WORDS, 7))
    assert resident(path) < 2**16  # a page beside the table may be shared with its neighbour


def test_a_table_is_found_by_its_path_and_dtype(file: tuple[Path, Tensor]) -> None:
    folder = file[0].parent
    assert find(folder, "words.weight", torch.float32) is not None
    assert find(folder, "model.words.weight", torch.float32) is not None
    assert find(folder, "words.weight", torch.bfloat16) is None
    assert find(folder, "swords.weight", torch.float32) is None


# ------------------------------------------------------------------------------- in a base


def saved(folder: Path, kind: str, **sizes: Any) -> ModelSpec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SIZES, "tie_word_embeddings": True, **sizes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelSpec(source=str(folder), task="causal-lm")


def layers(base: Base) -> tuple[Any, Any]:
    model: LlamaForCausalLM = base.model  # type: ignore[assignment]
    return model.get_input_embeddings(), model.get_output_embeddings()


@linux
@pytest.mark.parametrize("tied", [True, False])
def test_a_lean_base_leaves_its_words_in_the_file(tmp_path: Path, tied: bool) -> None:
    spec = saved(tmp_path, "llama", tie_word_embeddings=tied)
    other = ModelSpec(source=str(shutil.copytree(tmp_path, tmp_path / "other")), task=spec.task)
    lean = models.load_base(spec, LORA, 0, lean=True)
    whole = models.load_base(other, LORA, 0)
    words, output = layers(lean)
    assert (words.weight is output.weight) == tied
    assert lean.output is not None
    assert lean.output.table is not None
    assert whole.output is not None
    assert whole.output.table is None
    ids = torch.tensor([[3, 999, 2, 3]])
    with torch.inference_mode(), lean.holding((1,)), whole.holding((1,)):
        states = lean.model.get_submodule("model")(ids).last_hidden_state
        assert resident(tmp_path / "model.safetensors") < words.weight.nbytes / 2
        assert torch.equal(states, whole.model.get_submodule("model")(ids).last_hidden_state)
        assert torch.equal(lean.model(ids).logits, whole.model(ids).logits)


def test_words_in_another_dtype_are_in_memory(tmp_path: Path) -> None:
    base = models.load_base(saved(tmp_path, "llama"), LORA, 0, lean=True, precision="bf16")
    assert base.output is not None
    assert base.output.table is None
    assert "forward" not in vars(layers(base)[0])


def test_a_table_whose_logits_are_scaled_is_in_memory(tmp_path: Path) -> None:
    """Its rows are all needed at once: twice in memory would be worse than once."""
    base = models.load_base(saved(tmp_path, "cohere"), LORA, 0, lean=True)
    assert base.output is None
    assert "forward" not in vars(layers(base)[0])


KINDS = {"llama": True, "gpt2": True, "gemma2": False, "granite": False, "cohere": False}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_does_to_its_logits_is_known_before_it_is_loaded(
    tmp_path: Path, kind: str
) -> None:
    spec = saved(tmp_path, kind, **({"logits_scaling": 3.0} if kind == "granite" else {}))
    geometry = models.geometry(spec, tmp_path)
    assert geometry.sliced == KINDS[kind]
    assert (output_of(AutoModelForCausalLM.from_pretrained(tmp_path)) is not None) == KINDS[kind]
    assert geometry.in_file == {"fp32": WORDS * WIDTH if KINDS[kind] else 0, "bf16": 0}


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_a_model_that_knows_no_sdpa_has_its_own_attention(
    tmp_path: Path, kind: str, attention: str
) -> None:
    """Gemma 2 caps its attention's logits, which SDPA cannot do."""
    base = models.load_base(saved(tmp_path, kind), LoraSpec(target_modules=["q_proj"]), 0)
    assert base.model.config._attn_implementation == attention
