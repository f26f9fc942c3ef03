"""Results as data: one JSON file a benchmark, with the machine it ran on."""

import json
from pathlib import Path
from typing import Any

from fedft.core.rundir import surroundings

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: the result, the versions and the processor."""
    around = surroundings()
    about = {
        key: around[key]
        for key in ("python", "versions", "platform", "cpu", "git")
        if key in around
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "environment": about}, indent=1) + "\n", encoding="utf-8")
    return path
