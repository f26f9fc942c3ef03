"""Which examples of the repository a wheel carries. setup.py runs this file: it imports nothing of ours."""

from collections.abc import Iterator
from pathlib import Path

ELSEWHERE = frozenset({"feature-shift", "flower", "mixed-tasks"})
"""Examples of the repository alone: they need data that it prepares, or Flower's ``flwr run``."""


def shipped(root: Path) -> Iterator[Path]:
    """The files to hand out of a folder of examples, each in a folder with its ``config.toml``.

    Args:
        root: holds a folder an example.
    """
    for config in sorted(root.glob("*/config.toml")):
        if config.parent.name not in ELSEWHERE:
            for path in sorted(config.parent.rglob("*")):
                if path.is_file() and _kept(path.relative_to(config.parent)):
                    yield path


def _kept(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) or part.endswith(".egg-info") for part in path.parts)
    return path.parts[0] not in ("results", "build", "dist") and not hidden
