"""Laws of every family of adapters, and what a new one costs: a file on each side and a row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedft.clients.engines import ENGINES
from fedft.core import models
from fedft.core.adapters import FAMILIES, PEFT, Export, Family, family_of
from fedft.core.errors import ConfigError
from fedft.core.models.start import frozen_tensors
from fedft.core.spec import LoraSpec, ModelSpec

TABLES: dict[str, dict[str, Any]] = {
    "lora": {},
    "hydralora": {"method": "hydralora", "heads": 3},
    "peft": {"method": "ia3"},
}
"""Family → a `[lora]` table of it: a row each."""

ALL = [pytest.param(family, id=family.name) for family in (*FAMILIES, PEFT)]


def lora_of(family: Family) -> LoraSpec:
    return LoraSpec.model_validate({"rank": 2, "target-modules": ["query"], **TABLES[family.name]})


def test_every_family_has_an_engine_and_a_row_here() -> None:
    names = {family.name for family in (*FAMILIES, PEFT)}
    assert names == ENGINES.keys() == TABLES.keys()


@pytest.mark.parametrize("family", ALL)
def test_a_table_means_its_family_and_is_accepted_by_it(family: Family) -> None:
    lora = lora_of(family)
    assert family_of(lora) is family
    family.check(lora)


def test_what_a_family_cannot_be_is_refused_by_name() -> None:
    for table, word in (
        ({"method": "hydralora"}, "heads"),
        ({"method": "hydralora", "heads": 2, "options": {"x": 1}}, "options"),
        ({"method": "no-such-method"}, "no-such-method"),
    ):
        lora = LoraSpec.model_validate(table)
        with pytest.raises(ConfigError, match=word):
            family_of(lora).check(lora)


@pytest.mark.parametrize("family", ALL)
def test_the_start_is_a_function_of_the_seed_and_has_the_shapes(
    family: Family, tiny_model: Path
) -> None:
    spec, lora = ModelSpec(source=str(tiny_model)), lora_of(family)
    shapes = models.schema(spec, lora, 3)
    first, again, other = (
        models.initial_adapter(shapes, lora, lora.rank, seed).tensors() for seed in (0, 0, 1)
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for name, shape in shapes.tensors.items():
        assert tuple(first[name].shape) == tuple(shape)


@pytest.mark.parametrize("family", ALL)
def test_what_is_saved_is_found_again(family: Family, tiny_model: Path, tmp_path: Path) -> None:
    spec, lora = ModelSpec(source=str(tiny_model)), lora_of(family)
    shapes = models.schema(spec, lora, 3)
    start = models.initial_adapter(shapes, lora, lora.rank, 0)
    numbers = torch.Generator().manual_seed(1)
    adapter = start.replaced(
        {name: torch.randn(t.shape, generator=numbers) for name, t in start.tensors().items()}
    )
    made = Export(
        *(adapter, {}, spec, lora, shapes.saved, {}, 3, 0, shapes.transposed),
        frozen=lambda: frozen_tensors(spec, lora, 0),
    )
    family.save(tmp_path / "adapter", made)
    name = "adapter_model" if family.stock else "mixture"
    found = load_file(tmp_path / "adapter" / f"{name}.safetensors")
    assert found.keys() >= adapter.tensors().keys()
    for key, tensor in adapter.tensors().items():
        assert torch.equal(found[key], tensor)
