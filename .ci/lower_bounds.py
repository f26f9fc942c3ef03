"""Prints the oldest version of every package that pyproject.toml asks for, as constraints for pip.

    python .ci/lower_bounds.py > constraints-lower.txt

Torch is left out: it stays at the version of constraints.txt. So are the tools of `dev` and `docs`,
and `quantized`, which needs CUDA.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = ("dev", "docs", "quantized")


def bounds(project: dict[str, object]) -> Iterator[str]:
    """``name==version`` for every requirement of a `[project]` table.

    Raises:
        SystemExit: one has no lower bound.
    """
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(e for name, e in extras.items() if name not in LEFT_OUT)]
    for requirement in (line for lines in lists for line in lines):
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?(?:.*?>=\s*([\w.]+))?", requirement)
        name, least = match[1], match[2]
        if name in ("fedft", "torch") or (least is None and requirement == f"{name}[simulation]"):
            continue  # our own extras; what another line bounds
        if least is None:
            raise SystemExit(f"{requirement} has no lower bound")
        yield f"{name}=={least}"


if __name__ == "__main__":
    with (Path(__file__).resolve().parents[1] / "pyproject.toml").open("rb") as file:
        print("\n".join(bounds(tomllib.load(file)["project"])))
