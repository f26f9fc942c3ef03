"""Every field of every tuner's configuration: it is followed to the exported file, or refused.

The fields are those that peft declares. Values are made up from their types; one that peft itself
cannot take must be refused in words, by name, before anything starts.
"""

import types
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForSequenceClassification

from fedft.clients.engines.peft_engine import WholeEngine
from fedft.core import models
from fedft.core.adapters import Export, family_of, peft
from fedft.core.adapters.tuners import TUNERS, canonical
from fedft.core.errors import ConfigError, EnvironmentFailure
from fedft.core.models.start import drawn, frozen_tensors
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter

Outcome = Literal["followed", "refused"]
IDS = torch.arange(2, 14).reshape(2, 6)
FITTING: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 24},
    "road": {"group_size": 16},
    "unilora": {"theta_d_length": 64},
    "vblora": {"num_vectors": 16, "vector_length": 8, "topk": 2},
    "waveft": {"n_frequency": 24},
}
KINDS = {canonical(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
RUNNABLE = sorted(KINDS.keys() & TUNERS.keys())


def declared(kind: type[Any]) -> list[str]:
    return [f.name for f in fields(kind) if f.init]


def values(kind: type[Any], name: str) -> list[Any]:
    """One value or more that are not the default, of a type that the field may have."""
    field = next(f for f in fields(kind) if f.name == name)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    found: list[Any] = []

    def gather(hint: Any) -> None:
        if hint is bool:
            found.append(not default)
        elif hint is int:
            found.append(2 * default if isinstance(default, int) and default else 2)
        elif hint is float:
            found.append(default / 2 if isinstance(default, float) and default else 0.25)
        elif hint is str:
            found.append("text")
        elif get_origin(hint) is Literal:
            found.extend(v for v in get_args(hint) if v != default)
        elif get_origin(hint) in (Union, types.UnionType):
            for part in get_args(hint):
                gather(part)
        elif hint is dict or get_origin(hint) is dict:
            found.append({"0.*query": 2})
        elif get_origin(hint) is list:
            found.append([1, 2] if get_args(hint) == (int,) else ["query"])

    if name == "bias" and get_type_hints(kind)[name] is str:
        method = kind.__name__.removesuffix("Config").lower()
        return ["all", f"{method}_only"]
    gather(get_type_hints(kind)[name])
    return found or [{"0.*query": 2}]  # a configuration of its own: a table that is none


@pytest.fixture(autouse=True)
def uninitialised() -> Iterator[None]:
    """Memory that peft allocates and does not fill is NaN, so that it cannot pass for a start."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def outcome(
    method: str, options: dict[str, Any], model: ModelSpec, folder: Path, **more: Any
) -> Outcome:
    """What becomes of options: refused, or the exported adapter has the logits of the engine's."""
    norms = TUNERS[method].layers == "norm" if method in TUNERS else False
    try:
        lora = LoraSpec(
            **{
                "method": method,
                "rank": 4,
                "target_modules": ("LayerNorm",) if norms else ("query", "value"),
                "options": {**FITTING.get(method, {}), **options},
                **more,
            }
        )
        shapes = models.schema(model, lora, 3)
    except (ConfigError, EnvironmentFailure) as error:
        assert "[lora]" in error.what and "Traceback" not in error.what
        return "refused"
    config = peft.config_of(lora, list(shapes.modules), 0)
    for name, value in options.items():
        given = getattr(config, name)
        if name == "feedforward_modules":  # whose names become paths
            value = [path for path in shapes.modules if path.endswith("query")]
        assert (sorted(given) if isinstance(given, set) else given) == value, name
    initial = models.initial_adapter(shapes, lora, lora.rank, 0)
    try:
        start, _ = drawn(model, lora, initial, 0)
    except ConfigError as error:
        assert "not finite" in error.what
        return "refused"
    numbers = torch.Generator().manual_seed(0)
    adapter: Adapter = start.replaced(
        {n: t + 0.05 * torch.randn(t.shape, generator=numbers) for n, t in start.tensors().items()}
    )
    shapes = models.schema(model, lora, 3)
    made = Export(
        *(adapter, {}, model, lora, shapes.saved, {}, 3, 0, shapes.transposed),
        frozen=lambda: frozen_tensors(model, lora, 0),
    )
    family_of(lora).save(folder, made)
    base = models.load_base(model, lora, 3)
    engine = WholeEngine(base, lora, 0)
    engine.evaluate(adapter, {}, [])
    plain = AutoModelForSequenceClassification.from_pretrained(model.source, num_labels=3)
    with torch.inference_mode():
        untrained = plain(input_ids=IDS).logits
        stock: Any = PeftModel.from_pretrained(plain, str(folder))
        exported = stock.eval()(input_ids=IDS).logits
        own = engine._model(input_ids=IDS).logits
    torch.testing.assert_close(exported, own, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(exported, untrained, atol=1e-4)
    return "followed"


LORA: dict[str, list[Outcome]] = {
    "bias": ["refused", "followed"],
    "fan_in_fan_out": ["refused"],
    "lora_bias": ["followed"],
    "rank_pattern": ["followed"],
    "alpha_pattern": ["followed"],
    "use_dora": ["followed"],
}
"""Fields of LoraConfig that are passed on, and what becomes of each value; all others are refused."""


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", declared(LoraConfig))
def test_every_field_of_lora_is_followed_or_refused(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = ModelSpec(source=str(tiny_model))
    found = [
        outcome("lora", {name: value}, model, tmp_path / str(i))
        for i, value in enumerate(values(LoraConfig, name))
    ]
    if name == "init_lora_weights":
        return  # one by one, below
    assert found == LORA.get(name, ["refused"] * len(found))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (False, "followed"),
        ("gaussian", "followed"),
        ("orthogonal", "followed"),
        ("pissa", "refused"),
        ("pissa_niter_4", "refused"),
        ("olora", "refused"),
        ("mica", "refused"),
        ("eva", "refused"),
        ("corda", "refused"),
        ("lora_ga", "refused"),
        ("loftq", "refused"),
        ("no such start", "refused"),
    ],
)
def test_every_start_of_lora_is_followed_or_refused(
    value: Any, wanted: Outcome, tiny_model: Path, tmp_path: Path
) -> None:
    options = {"init_lora_weights": value}
    assert outcome("lora", options, ModelSpec(source=str(tiny_model)), tmp_path / "a") == wanted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", [m for m in RUNNABLE if m != "lora"])
def test_every_field_of_every_other_tuner_is_followed_or_refused(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = ModelSpec(source=str(tiny_model))
    kind = KINDS[method]
    own = {f.name for f in fields(PeftConfig)}
    tried = 0
    for name in declared(kind):
        for i, value in enumerate(values(kind, name)):
            found = outcome(method, {name: value}, model, tmp_path / f"{name}-{i}")
            print(method, name, repr(value), found)
            assert not (name in own and found == "followed"), name
            tried += 1
    assert tried >= len(declared(kind))
