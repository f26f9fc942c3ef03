"""What a checkpoint lacks is the head, whatever it is called; what no head is, is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedft.core import models
from fedft.core.checkpoint import Head, head_of
from fedft.core.errors import MismatchError
from fedft.core.spec import LoraSpec, ModelSpec
from tests.zoo.builders import KINDS, Kind, build

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of the zoo, made once."""
    place = tmp_path_factory.mktemp("zoo")

    def get(name: str) -> Path:
        folder = place / name
        return folder if folder.exists() else build(kind(name), folder)

    return get


def kind(name: str) -> Kind:
    return next(k for k in KINDS if str(k) == name)


def spec_of(folder: Path, task: Any = "classification") -> ModelSpec:
    return ModelSpec(source=str(folder), task=task)


def loader_says(
    name: str, folder: Path, classes: int = 3
) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The naive twin: what stock transformers reports as missing, and the weights that it gives."""
    import transformers

    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
    }[kind(name).task]
    model, info = auto.from_pretrained(
        folder, num_labels=classes, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return set(info["missing_keys"]), dict(model.named_parameters())


ALL = sorted(
    str(k) for k in KINDS if k.task != "causal-lm" and k.type not in ("led", "dinov3_vit", "xmod")
)
SOME = (
    "bert-classification",
    "distilbert-classification",
    "xlnet-classification",
    "t5-classification",
    "clip-image-classification",
)


def agrees_with_the_loader(name: str, folder: Path) -> None:
    task = kind(name).task
    head = head_of(spec_of(folder, task), folder, 3)
    missing, parameters = loader_says(name, folder)
    assert missing & parameters.keys() <= set(head.parameters)
    assert set(head.parameters) <= parameters.keys()
    outputs = set(head.parameters) - missing
    assert all(
        n.split(".")[0] in ("classifier", "score") or 3 in parameters[n].shape for n in outputs
    )
    covered = {n for n in parameters if head.holds(n)}
    assert covered == set(head.parameters), "a module of the head holds what is pretrained"


@pytest.mark.parametrize("name", SOME)
def test_the_head_is_what_the_loader_misses(name: str, zoo: Callable[[str], Path]) -> None:
    agrees_with_the_loader(name, zoo(name))


@pytest.mark.zoo
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in ALL if name not in SOME])
def test_every_head_is_what_the_loader_misses(name: str, zoo: Callable[[str], Path]) -> None:
    agrees_with_the_loader(name, zoo(name))


def copied(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    known = {n: t.clone() for n, t in load_file(target / WEIGHTS).items()}
    change(known)
    save_file(known, target / WEIGHTS, {"format": "pt"})
    return target


def test_a_layer_that_the_checkpoint_has_is_no_head_though_its_name_ends_like_one(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    """DistilBERT's pre_classifier, trained before; peft takes it for the head by its name's end."""

    def trained(known: dict[str, torch.Tensor]) -> None:
        known["pre_classifier.weight"] = torch.randn(32, 32)
        known["pre_classifier.bias"] = torch.randn(32)

    bare = zoo("distilbert-classification")
    folder = copied(bare, tmp_path / "m", trained)
    head = head_of(spec_of(folder), folder, 3)
    assert head.modules == head.outputs == ("classifier",)
    assert set(head.beside) == {"pre_classifier.weight", "pre_classifier.bias"}
    control = head_of(spec_of(bare), bare, 3)
    assert set(control.modules) == {"pre_classifier", "classifier"} and not control.beside
    held = models.frozen_values(spec_of(folder), 3, head)
    stored = load_file(folder / WEIGHTS)
    assert held.keys() == set(head.beside)
    assert all(torch.equal(held[n], stored[n]) for n in held)


def test_a_head_of_other_classes_is_new_and_one_of_as_many_too(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its numbers belong to classes of another data set, also where there are equally many."""
    for classes in (3, 7):

        def trained(known: dict[str, torch.Tensor], classes: int = classes) -> None:
            known["classifier.weight"] = torch.randn(classes, 32)
            known["classifier.bias"] = torch.randn(classes)

        folder = copied(zoo("bert-classification"), tmp_path / str(classes), trained)
        head = head_of(spec_of(folder), folder, 3)
        assert set(head.parameters) >= {"classifier.weight", "classifier.bias"}
        assert "bert.pooler.dense" in head.modules or "bert.pooler" in head.modules


def test_a_norm_of_the_head_starts_at_one(zoo: Callable[[str], Path]) -> None:
    name = "modernbert-classification"
    folder = zoo(name)
    shapes = models.schema(spec_of(folder), LoraSpec(rank=2), 3)
    initial = models.initial_adapter(shapes, LoraSpec(rank=2), 2, seed=0)
    norms = [t for n, t in initial.head.items() if n.endswith("norm.weight")]
    assert all(bool((t == 1).all()) for t in norms)
    weights = [t for n, t in initial.head.items() if t.ndim > 1]
    assert weights and all(0.01 < float(t.std()) < 0.03 for t in weights)
    again = models.initial_adapter(shapes, LoraSpec(rank=2), 2, seed=1)
    assert any(not torch.equal(t, again.head[n]) for n, t in initial.head.items())


def test_lora_never_lands_on_the_head(zoo: Callable[[str], Path]) -> None:
    for name in SOME:
        folder, task = zoo(name), kind(name).task
        for wanted in ("auto", "all-linear"):
            shapes = models.schema(
                spec_of(folder, task), LoraSpec(rank=2, target_modules=wanted), 3
            )
            assert shapes.modules and not any(map(shapes.saved.holds, shapes.modules))


LACKING: dict[str, str] = {
    "a block": "encoder.layer.1.",
    "the words": "word_embeddings",
    "half a layer": "layer.0.attention.self.query.bias",
    "a norm in a block": "layer.1.output.LayerNorm",
}


@pytest.mark.parametrize("what", LACKING)
def test_what_no_head_is_may_not_be_missing(
    what: str, zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    def torn(known: dict[str, torch.Tensor]) -> None:
        gone = [name for name in known if LACKING[what] in name]
        assert gone
        for name in gone:
            del known[name]

    folder = copied(zoo("bert-classification"), tmp_path / "m", torn)
    with pytest.raises(MismatchError, match="would make them up at random"):
        head_of(spec_of(folder), folder, 3)


def test_a_language_model_has_no_head_and_may_lack_nothing(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = zoo("llama-causal-lm")
    assert head_of(spec_of(folder, "causal-lm"), folder, 0) == Head()
    torn = copied(folder, tmp_path / "m", lambda known: known.pop("lm_head.weight"))
    with pytest.raises(MismatchError, match=r"lm_head\.weight"):
        head_of(spec_of(torn, "causal-lm"), torn, 0)


def test_words_that_are_tied_to_the_output_are_not_missing(zoo: Callable[[str], Path]) -> None:
    folder = zoo("llama-with-tied-words-causal-lm")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    assert head_of(spec_of(folder, "causal-lm"), folder, 0) == Head()


def test_a_checkpoint_that_changed_is_read_again(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    """The answer is remembered by the files' size and time."""
    folder = copied(zoo("bert-with-a-pooler-classification"), tmp_path / "m", len)
    assert head_of(spec_of(folder), folder, 3).modules == ("classifier",)

    def without_pooler(known: dict[str, torch.Tensor]) -> None:
        for name in [n for n in known if n.startswith("pooler")]:
            del known[name]

    target = copied(folder, tmp_path / "n", without_pooler)
    (folder / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes())
    assert len(head_of(spec_of(folder), folder, 3).modules) == 2


class Net(nn.Module):
    """A network of whose parts any may be new."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.adapter_of_task = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.pre_classifier = nn.Linear(2, 2)
        self.classifier = nn.Linear(2, 3)


def named(*tops: str) -> list[str]:
    return [n for n, _ in Net().named_parameters() if n.startswith(tops)]


@pytest.mark.parametrize(
    ("new", "modules", "beside"),
    [
        (("classifier",), ("classifier",), ("pre_classifier.weight", "pre_classifier.bias")),
        (("pre_classifier", "classifier"), ("pre_classifier", "classifier"), ()),
        (
            ("adapter_of_task",),
            ("adapter_of_task",),
            (
                "pre_classifier.weight",
                "pre_classifier.bias",
                "classifier.weight",
                "classifier.bias",
            ),
        ),
        (("adapter_of_task.1",), ("adapter_of_task.1",), None),
        (("body.1", "classifier"), ("body.1", "classifier"), None),
        ((), (), ()),
    ],
)
def test_the_largest_modules_that_are_all_new(
    new: tuple[str, ...], modules: tuple[str, ...], beside: tuple[str, ...] | None
) -> None:
    """By hand, on a network of five parts."""
    parameters = named(*new) if new else []
    head = Head.of(Net(), parameters)
    assert head.modules == modules
    assert set(head.parameters) == set(parameters)
    if beside is not None:
        assert set(head.beside) == set(beside)
    assert all(head.holds(name) for name in parameters)


def test_a_config_of_another_architecture_is_told(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(zoo("bert-classification"), tmp_path / "m", len)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(MismatchError):
        head_of(spec_of(folder), folder, 3)
