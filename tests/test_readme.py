"""The README's own rule is one, as it stands there."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedft.core.types import Adapter, ClientUpdate, Factors
from fedft.strategies import FedAvgLoRA, Strategy

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def rule() -> Strategy:
    section = README.read_text(encoding="utf-8").partition("## Your own rule")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    module = ModuleType("equal_lora")
    exec(compile(code[1], "equal_lora.py", "exec"), vars(module))
    return module.EqualLoRA()


def update(site: str, examples: int, value: float, modules: str) -> ClientUpdate:
    start = Adapter({m: Factors(torch.zeros(1, 2), torch.zeros(2, 1), 1.0) for m in modules})
    tensors = {name: torch.full_like(t, value) for name, t in start.tensors().items()}
    return ClientUpdate(site, examples, tensors, start)


def test_sites_weigh_the_same_and_only_where_they_hold_a_layer(rule: Strategy) -> None:
    updates = [update("a", 1, 1.0, "xy"), update("b", 9, 3.0, "x"), update("c", 0, 100.0, "xy")]
    start = update("s", 1, 0.0, "xy").start
    mean = rule.aggregate(rule.init(start), updates).adapter
    assert torch.equal(mean.factors["x"].A, torch.full((1, 2), 2.0))
    assert torch.equal(mean.factors["y"].B, torch.full((2, 1), 1.0))
    # Positive control: the rule beside it weighs by examples.
    weighted = FedAvgLoRA().aggregate(FedAvgLoRA().init(start), updates).adapter
    assert float(weighted.factors["x"].A[0, 0]) == pytest.approx(2.8)
    assert rule.name == "equal-lora"  # type: ignore[attr-defined]
