"""The scripts of examples/feature-shift, without a download."""

import hashlib
import importlib
import io
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from fedft.core.errors import EnvironmentFailure, IntegrityError, MismatchError
from fedft.server.config_file import load_config

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "feature-shift"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the example; its plain name is forgotten afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in {*loaded, "vit"}:
        sys.modules.pop(name, None)


def test_variants_of_an_emoji_are_one_family(script):
    prepare = script("prepare")
    woman, man = "1F469-200D-1F4BB", "1F468-200D-1F4BB"
    assert prepare.family_of(woman) == prepare.family_of(man) == "1f9d1-1f4bb"
    assert prepare.family_of("1F3C3-200D-2640-FE0F-200D-27A1-FE0F") == prepare.family_of("1F3C3")
    assert prepare.family_of("1F34E") != prepare.family_of("1F34F")
    assert prepare.code_of("0023-FE0F-20E3") == "0023-20e3"


def test_the_split_takes_whole_families_of_every_class(script):
    prepare = script("prepare")
    emoji = [
        prepare.Emoji(f"{label}{i}-{twin}", label, f"{label}{i}")
        for label in prepare.CLASSES
        for i in range(8)
        for twin in "ab"
    ]
    test = prepare.test_families(emoji, 0.25, seed=0)
    assert all(sum(f.startswith(label) for f in test) == 2 for label in prepare.CLASSES)
    assert test == prepare.test_families(emoji[::-1], 0.25, seed=0)
    assert test != prepare.test_families(emoji, 0.25, seed=1)


def test_sites_of_a_style_are_skewed_by_label(script):
    prepare = script("prepare")
    labels = ["x", "y"] * 500
    owners = prepare.skewed_sites(labels, 5, 0.5, seed=0)
    assert set(owners) == set(range(5))
    counts = {
        label: Counter(o for o, own in zip(owners, labels, strict=True) if own == label)
        for label in "xy"
    }
    assert counts["x"].most_common(1)[0][1] > 200, "alpha = 0.5 is no even split"
    assert counts["x"] != counts["y"]
    assert prepare.skewed_sites(labels, 5, 0.5, seed=1) != owners


def test_a_package_with_another_hash_is_refused(script, tmp_path, monkeypatch):
    prepare = script("prepare")
    (tmp_path / prepare.RESVG.file).write_bytes(b"something else")
    with pytest.raises(IntegrityError, match="expected ff51acbb"):
        prepare.RESVG.fetch(tmp_path)
    known = replace(prepare.RESVG, sha256=hashlib.sha256(b"something else").hexdigest())
    monkeypatch.setenv("PATH", "")  # no client: what is there needs none
    assert known.fetch(tmp_path) == tmp_path / known.file
    (tmp_path / known.file).unlink()
    with pytest.raises(EnvironmentFailure, match="npm is not installed"):
        known.fetch(tmp_path)


def test_pictures_lie_on_white(script):
    prepare = script("prepare")
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(buffer, "PNG")
    small = Image.open(io.BytesIO(prepare._png(buffer.getvalue(), 14)))
    assert (small.mode, small.size, small.getcolors()) == ("RGB", (14, 14), [(196, (255,) * 3)])


def test_the_transformer_survives_the_way_through_onnx(script, tmp_path):
    vit = script("vit")
    torch.manual_seed(0)
    model = vit._empty(vit.NATIVE_PIXELS, ("0", "1"))
    torch.nn.init.normal_(model.dinov2.embeddings.position_embeddings)
    for name, scale in model.named_parameters():
        if "lambda1" in name:  # as the configuration makes it, a permutation of blocks would pass
            torch.nn.init.normal_(scale)
    file = tmp_path / "vit.onnx"
    file.write_bytes(_as_onnx(vit, model))
    native = vit.read(file)
    same = {n: torch.equal(t, model.state_dict()[n]) for n, t in native.state_dict().items()}
    assert [n for n, equal in same.items() if not equal and "mask" not in n] == [
        "classifier.weight"
    ]
    small = vit.at_size(native, 28, ("a", "b", "c"))
    image = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        features = [m.dinov2(image).last_hidden_state for m in (native, small)]
        assert small(image).logits.tolist() == [[0, 0, 0]]
    torch.testing.assert_close(*features)
    graph = vit._parsed(file)
    del graph.graph.initializer[5]
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(MismatchError, match="not the ViT-S/14"):
        vit.read(file)


def _as_onnx(vit: ModuleType, model: torch.nn.Module) -> bytes:
    """As PyTorch exports it: linear weights transposed, anonymous and named by the node."""
    parsed = vit._parsed(_Empty())
    graph = parsed.graph
    old = {new: name for name, new in vit._RENAMED.items()}

    def add(name: str, tensor: torch.Tensor) -> None:
        array = tensor.detach().contiguous().numpy()
        graph.initializer.add(
            name=name, dims=array.shape, data_type=1, raw_data=array.astype("<f4").tobytes()
        )

    for name, tensor in model.state_dict().items():
        path = name
        for new, original in old.items():
            path = path.replace(new, original)
        if name.endswith("position_embeddings"):
            add("onnx::Reshape_2", tensor[:, 1:])
            add("onnx::Concat_1", tensor[:, :1])
        elif name.startswith("dinov2.encoder") and tensor.ndim == 2:
            node = "/" + path.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph.node.add(name=f"{node}/MatMul", input=["x", f"onnx::MatMul_{name}"])
            add(f"onnx::MatMul_{name}", tensor.T)
        elif name.startswith("dinov2.") and "mask_token" not in name:
            add(path, tensor)
    add("decoder.bias", torch.zeros(3))
    return parsed.SerializeToString()


class _Empty:
    """A file without bytes."""

    def read_bytes(self) -> bytes:
        return b""


def test_every_part_of_the_grid_is_a_valid_configuration(script):
    run = script("run")
    for part in run.PARTS:
        for rule in part.rules:
            named = [s for s in part.settings if s.startswith("strategy=")]
            settings = [*part.settings, *([] if named else [f"strategy.name={rule}"])]
            config = load_config(FOLDER / "config.toml", settings)
            assert config.strategy.name == rule
            assert config.rounds.per_round == config.fleet.clients == config.rounds.needed
    assert config.fleet.clients == 1 and config.data.partition.kind == "iid"


def test_the_table_has_a_column_a_style_and_pairs_by_seed(script):
    run = script("run")
    fedit, fair = run.PARTS[0].rules["fedavg-lora"], run.PARTS[0].rules["lora-fair"]
    results = {
        fedit: {0: {"a": 0.50, "b": 0.30}, 1: {"a": 0.60, "b": 0.40}},
        fair: {0: {"a": 0.52, "b": 0.30}, 1: {"a": 0.62, "b": 0.40}},
    }
    lines = run.markdown(results).splitlines()
    assert lines[0] == "| Rule | a | b | average | Δ to FedAvg-LoRA |"
    assert lines[2].startswith(f"| {fedit} | 55.00 | 35.00 | 45.00 ± ")
    assert lines[2].endswith("| — |")
    assert lines[3].endswith("| +1.00 ± 0.00 |")
