"""Which methods a weighted mean of tensors is exact for: the declaration, held to in float64."""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from fedft.core.adapters import peft
from fedft.core.adapters.tuners import REFUSED, TUNERS, canonical
from fedft.core.spec import LoraSpec

WIDTH, RANK = 16, 4
WEIGHTS = (0.5, 0.3, 0.2)
FITTING: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 24},
    "oft": {"oft_block_size": 4},
    "road": {"group_size": 8},
    "unilora": {"theta_d_length": 32},
    "vblora": {"num_vectors": 16, "vector_length": 4, "topk": 2},
    "waveft": {"n_frequency": 24},
}


def _in_float64(module: types.ModuleType) -> types.SimpleNamespace:
    """torch, as a module of peft sees it, with float32 meaning float64: no FFT is cut short."""
    return types.SimpleNamespace(**{**vars(module), "float32": torch.float64})


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What peft casts to float32 by itself stays in float64."""
    from peft.tuners.c3a import layer, utils

    for module in (layer, utils):
        monkeypatch.setattr(module, "torch", _in_float64(torch))


@contextmanager
def computed_in_float64() -> Iterator[None]:
    """New tensors, and what is made ``float()``, are float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def network(seed: int = 0) -> Any:
    """A two-block BERT in float64, with weights of a size at which norms matter."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
        )
        model = BertModel(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(10)
    return model.requires_grad_(False).eval()


def adapted(
    name: str, options: dict[str, Any], *, seed: int = 0, weights: int = 0
) -> tuple[nn.Module, list[str]]:
    """The network with a method in it, and the paths of its adapted layers."""
    from fedft.core.models import targets

    norms = TUNERS[name].layers == "norm"
    lora = LoraSpec(
        method=name,
        rank=RANK,
        target_modules=("output.LayerNorm",) if norms else ("query", "intermediate.dense"),
        options={
            **FITTING.get(name, {}),
            **options,
            **({"use_dora": False} if name == "lora" else {}),
        },
    )
    model = network(weights)
    paths = list(targets(model, lora))
    return peft.injected(model, lora, paths, seed).eval().double(), paths


def changes(wrapped: nn.Module, paths: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each adapted layer makes of its input."""
    base: Any = wrapped.get_submodule("base_model.model")
    with torch.no_grad(), computed_in_float64():
        return {path: base.get_submodule(path)(inputs[path]) for path in paths}


def gap(name: str, options: dict[str, Any] | None = None, common: str = "no tensor") -> float:
    """Largest relative distance between the averaged adapter's layers and the layers' average.

    Args:
        name: of the method.
        options: of it.
        common: in the name of the tensors that all sites share.
    """
    wrapped, paths = adapted(name, options or {})
    tensors = peft.trained(wrapped)
    start = {n: p.detach().clone() for n, p in tensors.items()}
    base: Any = wrapped.get_submodule("base_model.model")
    numbers = torch.Generator().manual_seed(1)

    def normal(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    widths = {p: _width(base.get_submodule(p)) for p in paths}
    inputs = {path: normal((5, width)) for path, width in widths.items()}
    shared = {n: normal(t.shape) for n, t in start.items()}
    sites = [
        {n: t + 0.5 * (shared[n] if common in n else normal(t.shape)) for n, t in start.items()}
        for _ in WEIGHTS
    ]
    mean = {n: sum(w * s[n] for w, s in zip(WEIGHTS, sites, strict=True)) for n in start}

    def of(adapter: Any) -> dict[str, Tensor]:
        for n, parameter in tensors.items():
            parameter.data = adapter[n]
        return changes(wrapped, paths, inputs)

    untouched, averaged, each = of(start), of(mean), [of(site) for site in sites]
    worst = 0.0
    for path in paths:
        wanted = sum(w * one[path] for w, one in zip(WEIGHTS, each, strict=True))
        assert isinstance(wanted, Tensor)
        moved = (wanted - untouched[path]).norm()
        assert moved > 1e-3, f"{name} does nothing to {path}"
        worst = max(worst, float((averaged[path] - wanted).norm() / moved))
    return worst


def _width(layer: nn.Module) -> int:
    base: Any = getattr(layer, "base_layer", layer)
    return int(base.in_features if isinstance(base, nn.Linear) else base.normalized_shape[0])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", TUNERS)
def test_the_mean_is_exact_where_it_is_declared_and_nowhere_else(name: str) -> None:
    """mean_k p_k f(theta_k)(x) = f(mean_k p_k theta_k)(x) for every adapted layer, or it is not."""
    found = gap(name)
    if TUNERS[name].exact:
        assert found < 1e-10
    else:
        assert found > 1e-3


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(n, o, v) for n, t in TUNERS.items() for o, v in t.inexact_with.items()],
)
def test_options_that_end_it(name: str, option: str, value: Any) -> None:
    assert TUNERS[name].exact
    assert gap(name, {option: value}) > 1e-3


def test_the_same_measure_is_zero_for_lora_with_a_common_factor() -> None:
    assert gap("lora", common=".lora_A") < 1e-10
    assert gap("lora", common=".lora_B") < 1e-10
    assert gap("vera", common=".vera_lambda_d") < 1e-10


def frozen_state(wrapped: nn.Module) -> list[Tensor]:
    """Every tensor that a method added and does not train, saved or not, in the order of the model."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    learned = {id(p) for p in peft.trained(wrapped).values()}
    found: dict[int, Tensor] = {}

    def gather(thing: Any) -> None:
        if isinstance(thing, Tensor):
            if id(thing) not in learned:
                found.setdefault(id(thing), thing)
        elif isinstance(thing, nn.Module):
            if not isinstance(thing, BaseTuner | BaseTunerLayer | PeftModel):
                gather(vars(thing))
        elif isinstance(thing, dict):
            for key, value in thing.items():
                if key not in ("base_layer", "model", "base_model"):
                    gather(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                gather(value)

    for module in wrapped.modules():
        if isinstance(module, BaseTuner | BaseTunerLayer):
            parts = {n: v for n, v in vars(module).items() if n != "_modules"}
            gather(parts)
            gather({**module._modules})
    return list(found.values())


@pytest.mark.parametrize("name", TUNERS)
def test_what_is_frozen_comes_from_the_seed_or_is_declared_to_come_from_the_weights(
    name: str,
) -> None:
    """Two sites of one run make the same; of two bases they do, too, unless it says otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = frozen_state(adapted(name, {}, seed=3)[0])
        torch.manual_seed(2)
        two = frozen_state(adapted(name, {}, seed=3)[0])
        other = frozen_state(adapted(name, {}, seed=3, weights=1)[0])
    assert len(one) == len(two) and all(map(torch.equal, one, two))
    same = len(one) == len(other) and all(map(torch.equal, one, other))
    assert same == (not TUNERS[name].from_weights)


@pytest.mark.parametrize("name", ["vera", "shira", "fourierft", "tinylora", "unilora", "frod"])
def test_another_seed_freezes_other_tensors(name: str) -> None:
    one, two = (frozen_state(adapted(name, {}, seed=seed)[0]) for seed in (3, 4))
    assert not all(map(torch.equal, one, two))


def test_the_documentation_says_the_same() -> None:
    """docs/peft-methods.md: one row a method, and the reason of every refusal's method."""
    page = (Path(__file__).parents[2] / "docs" / "peft-methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+`) \|(?!.*exact\?).*\| ([^|]+) \|$", page, flags=re.MULTILINE)
    said = {n: verdict for names, verdict in rows for n in re.findall(r"`([^`]+)`", names)}
    assert said.keys() - {"rslora", "pissa", "olora", "hydralora"} == TUNERS.keys()
    for name, tuner in TUNERS.items():
        assert said[name].startswith("**yes**" if tuner.exact else "no"), name
        weighed = f"`{name}`" in page[page.index("`delora`, `frod`") :].split("every client")[0]
        assert weighed == tuner.from_weights, name
    refused = page[page.index("Refused, by name") :].split("\n\n")[1]
    prompts = {canonical(k.value) for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items() if _prompts(v)}
    assert set(re.findall(r"`([a-z-]+)`", refused)) == REFUSED.keys() | prompts


def _prompts(kind: Any) -> bool:
    return issubclass(kind, PromptLearningConfig)
