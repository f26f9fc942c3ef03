"""Measuring by turns, so that what else happens on a machine happens to all contenders alike."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def take_turns(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """One value of each contender per repeat, all of them within each repeat."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            measured[name].append(run())
    return measured


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, largest and number of some values."""
    return {
        "median": round(statistics.median(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
        "n": len(values),
    }
