"""Adapters on disk are PEFT's: law 8, and rows 64 and 70 of the fault catalogue."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedft.core import models
from fedft.core.adapters.files import load_adapter, save_adapter
from fedft.core.errors import MismatchError, SecurityRefusal
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Delta, Factors

LORA = LoraSpec(rank=3, alpha=6)
IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])


def random_adapter(folder: Path, *, core: bool = False) -> Adapter:
    shapes = models.schema(ModelSpec(source=str(folder)), LORA, classes=3)
    generator = torch.Generator().manual_seed(1)
    initial = models.initial_adapter(shapes, LORA, 3, seed=0)
    factors = {
        m: Factors(
            f.A,
            torch.randn(f.B.shape, generator=generator) / 4,
            f.scale,
            torch.randn(3, 3, generator=generator) if core else None,
        )
        for m, f in initial.factors.items()
    }
    return initial.map_factors(factors)


def by_hand(folder: Path, adapter: Adapter, delta: Delta) -> torch.Tensor:
    """Logits of the base with the dense products added to its weights."""
    base = models.load_base(ModelSpec(source=str(folder)), LORA, 3)
    with torch.no_grad():
        for path, f in adapter.factors.items():
            base.adapted[path].weight += f.product()
            if path in delta:
                base.adapted[path].weight += delta[path].product()
        head = {n.removeprefix("base_model.model."): t for n, t in adapter.head.items()}
        base.model.load_state_dict(head, strict=False)
        return base.model(input_ids=IDS).logits


@pytest.mark.parametrize("case", ["plain", "core", "delta"])
def test_stock_peft_gives_our_logits(tiny_model: Path, tmp_path: Path, case: str) -> None:
    adapter = random_adapter(tiny_model, core=case == "core")
    first = next(iter(adapter.factors))
    shift = {first: Factors(torch.randn(2, 32) / 4, torch.randn(32, 2) / 4, 0.5)}
    delta = shift if case == "delta" else {}
    save_adapter(
        tmp_path, adapter, delta, task="classification", base=str(tiny_model), revision=None
    )
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.inference_mode():
        logits = stock(input_ids=IDS).logits
    expected = by_hand(tiny_model, adapter, delta)
    assert torch.allclose(logits, expected, atol=1e-5)
    # Control: without the adapter the logits are others.
    assert (
        not torch.allclose(by_hand(tiny_model, random_adapter(tiny_model), {}), expected, atol=1e-3)
        or case == "plain"
    )


def test_what_was_saved_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model)
    save_adapter(tmp_path, adapter, {}, task="classification", base="x", revision=None)
    back = load_adapter(tmp_path)
    assert back.tensors().keys() == adapter.tensors().keys()
    for name, tensor in adapter.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    for module, f in adapter.factors.items():
        assert back.factors[module].scale == f.scale


class _Sentinel:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sentinel-ran"),))


def test_a_pickle_is_refused_and_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_Sentinel(), tmp_path / "adapter_model.bin")
    with pytest.raises(SecurityRefusal, match="pickle"):
        load_adapter(tmp_path)
    assert not Path("sentinel-ran").exists()


def header(table: object, body: bytes = bytes(16)) -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(first: int, last: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(last - first) // 4], "data_offsets": [first, last]}


NAME = "base_model.model.q.lora_A.weight"
HOSTILE_FILES = {
    "truncated": header({NAME: tensor(0, 16)})[:-4],
    "trailing": header({NAME: tensor(0, 16)}, bytes(20)),
    "overlapping": header({NAME: tensor(0, 16), NAME.replace("_A", "_B"): tensor(8, 16)}),
    "beyond the end": header({NAME: tensor(0, 4 * 2**40)}),
    "an enormous header": (2**60).to_bytes(8, "little") + b"{}",
    "an object": header({NAME: tensor(0, 16, "OBJECT")}),
    "nested": header(json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("kind", [*HOSTILE_FILES, None])
def test_a_file_that_is_not_what_it_says_is_refused(
    tiny_model: Path, tmp_path: Path, kind: str | None
) -> None:
    """Row 41; a good file, the positive control, is read."""
    save_adapter(
        tmp_path, random_adapter(tiny_model), {}, task="classification", base="x", revision=None
    )
    if kind is None:
        load_adapter(tmp_path)
        return
    (tmp_path / "adapter_model.safetensors").write_bytes(HOSTILE_FILES[kind])
    before = psutil.Process().memory_info().rss
    with pytest.raises(MismatchError):
        load_adapter(tmp_path)
    assert psutil.Process().memory_info().rss - before < 10 * 2**20


def test_no_adapter_and_other_kinds_are_told(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="has no adapter_model"):
        load_adapter(tmp_path)
    adapter = random_adapter(tiny_model)
    save_adapter(tmp_path, adapter, {}, task="classification", base="x", revision=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(MismatchError, match="plain LoRA"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(MismatchError):
        load_adapter(tmp_path)
