"""No float64 on a device that has none, such as Apple's ``mps``: shown on a stand-in for one.

The stand-in computes on the CPU, calls itself a device of its own, and refuses what such a device
refuses: float64, and an operation on tensors of two devices.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fedft.clients.block_similarity import compare
from fedft.clients.engines.base import Engine
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.hydra import HydraEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.peft_engine import WholeEngine
from fedft.core import models, precise
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Batch, LocalTraining, TrainPlan

DEVICE = torch.device("lazy")
"""A name that torch knows and that needs no driver; ``mps`` cannot be spoken of off a Mac."""


class Far(torch.Tensor):
    """A tensor on the stand-in."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "Far":
        if near.dtype == torch.float64:
            raise TypeError("this device has no float64")
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=DEVICE
        )
        made.near = near
        return made

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.near = value.near  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, there is such a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    far: list[Far] = []
    near: list[torch.Tensor] = []

    def fetched(x: Any) -> Any:
        if isinstance(x, Far):
            far.append(x)
            return x.near
        if isinstance(x, torch.Tensor) and x.ndim:
            near.append(x)
        return x

    args, kwargs = tree_map(fetched, args), tree_map(fetched, kwargs)
    name, out = str(func), bool(far)
    moves = "_to_copy" in name or "copy_" in name or "index" in name  # may read from the CPU
    if far and near and not moves:
        raise RuntimeError(f"{func}: tensors of two devices")
    if (to := kwargs.get("device")) is not None:
        out = torch.device(to).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if not out:
        return result
    known = {id(x.near): x for x in far}  # what was changed in place stays the tensor that it is

    def put(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Far):
            return x
        return known[id(x)] if id(x) in known else Far(x)

    return tree_map(put, result)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precise, "_WITHOUT", frozenset({"mps", DEVICE.type}))
    supported = [*torch.utils._foreach_utils._get_fused_kernels_supported_devices(), DEVICE.type]
    optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: supported)
    # What wraps a tensor cannot be made in inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(torch, DEVICE.type, torch.cpu, raising=False)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) asks the mode, too
    try:
        with Device():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def lora_of(kind: str) -> LoraSpec:
    special: dict[str, Any] = {
        "hydra": {"method": "hydralora", "heads": 2},
        "dora": {"method": "dora"},
        "ia3": {"method": "ia3"},
    }
    return LoraSpec(
        rank=2, alpha=4, dropout=0.1 if kind == "dropout" else 0.0, **special.get(kind, {})
    )


def engine_of(kind: str, folder: Path, where: str) -> Engine:
    lora = lora_of(kind)
    spec = ModelSpec(source=str(folder))
    base = models.load_base(spec, lora, 3, device=where, lean=kind == "lean")
    if kind in ("cohort", "lean", "recomputed"):
        return CohortEngine(base, lora, checkpointing=kind == "recomputed")
    if kind == "hydra":
        return HydraEngine(base, lora)
    return PeftEngine(base, lora) if kind in ("loop", "dropout") else WholeEngine(base, lora, 0)


def start(engine: Engine, kind: str) -> Adapter:
    return models.initial_adapter(engine.base.shapes, lora_of(kind), 2, seed=0)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(2, 20, (4, 6), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator)
        made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return made


def work(engine: Engine, kind: str, optimizer: str) -> tuple[Adapter, float]:
    """Two clients trained, and one of them scored."""
    training = LocalTraining(optimizer=optimizer, proximal_mu=0.1)  # type: ignore[arg-type]
    plans = [TrainPlan(start(engine, kind), site=name, training=training) for name in "ab"]
    first, _ = engine.train(plans, [batches(2), batches(3)])
    tally = engine.evaluate(first.adapter, {}, batches(2))
    return first.adapter, tally.loss_sum + first.metrics["loss"]


KINDS = ("loop", "dropout", "cohort", "recomputed", "lean", "hydra", "dora", "ia3")


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_trains_without_float64(kind: str, tiny_model: Path, device: None) -> None:
    adapter, loss = work(engine_of(kind, tiny_model, "lazy"), kind, "adamw")
    assert loss > 0
    moved = start(engine_of(kind, tiny_model, "cpu"), kind).tensors()
    assert any(not torch.equal(t, moved[n]) for n, t in adapter.tensors().items())
    assert all(
        type(t) is torch.Tensor and t.device.type == "cpu" for t in adapter.tensors().values()
    )


def test_the_numbers_are_those_of_the_cpu(tiny_model: Path, device: None) -> None:
    for kind in ("loop", "cohort"):
        far, loss = work(engine_of(kind, tiny_model, "lazy"), kind, "sgd")
        near, expected = work(engine_of(kind, tiny_model, "cpu"), kind, "sgd")
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, tensor in near.tensors().items():
            assert torch.allclose(far.tensors()[name], tensor, atol=1e-5), name


def test_blocks_are_compared_without_float64(tiny_model: Path, device: None) -> None:
    own = batches(2)
    answers = []
    for where in ("lazy", "cpu"):
        engine = engine_of("cohort", tiny_model, where)
        answers.append(compare(engine, start(engine, "cohort"), {}, own, "block-influence"))
    far, near = answers
    assert torch.allclose(far.similarity, near.similarity, atol=1e-4)
    assert torch.allclose(far.importance.cpu().double(), near.importance, atol=1e-4)


@pytest.mark.parametrize("kind", ["loop", "cohort"])
def test_the_stand_in_notices_float64(
    kind: str, tiny_model: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control: with sums in float64, as on other devices, both engines are refused."""
    engine = engine_of(kind, tiny_model, "lazy")
    monkeypatch.setattr(precise, "_WITHOUT", frozenset())
    with pytest.raises(TypeError, match="no float64"):
        work(engine, kind, "adamw")


def test_the_stand_in_notices_two_devices(device: None) -> None:
    """Positive control."""
    far = torch.ones(3).to(DEVICE)
    with pytest.raises(RuntimeError, match="two devices"):
        far + torch.ones(3)
    assert (far + far).sum().item() == 6


def test_only_what_has_no_float64_goes_without() -> None:
    known: dict[str, torch.dtype] = {
        "cpu": torch.float64,
        "cuda": torch.float64,
        "mps": torch.float32,
    }
    assert {name: precise.widest(torch.device(name)) for name in known} == known
    assert precise.widened(torch.ones(2)).dtype == torch.float64
