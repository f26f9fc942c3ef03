"""`[training]` beyond plain steps over tasks of several kinds, whole runs in both engines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.api import Run
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from tests.core.tasks.test_runs import table_of


def trained(table: dict[str, Any], folder: Path) -> Any:
    return Run(simulate(parse_config(table), folder).path).adapter("last").factors().tensors()


@pytest.mark.parametrize("name", ["token-classification", "text-pair", "seq2seq", "causal-lm"])
def test_steps_of_several_passes_and_softer_losses(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    found: list[Any] = []
    for cohort, rows, passes in ((1, 4, 1), (1, 2, 2), (3, 2, 2)):
        table = table_of(name, folder_of(name), tmp_path, cohort)
        table["training"] |= {
            "batch-size": rows,
            "accumulate": passes,
            "label-smoothing": 0.1,
            "schedule": "cosine",
        }
        if name in ("token-classification", "text-pair"):
            table["training"]["class-weights"] = "balanced"
        found.append(trained(table, tmp_path / f"{cohort}-{passes}"))
    for other in found[1:]:
        for key, tensor in found[0].items():
            assert torch.allclose(other[key], tensor, atol=2e-5), key
