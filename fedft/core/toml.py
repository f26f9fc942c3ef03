"""TOML files that users write: read, or refused with the place."""

import tomllib
from pathlib import Path
from typing import Any

from fedft.core.errors import ConfigError
from fedft.core.files import MIB, read_text

LARGEST_TOML = 16 * MIB
"""A parser of TOML takes half a minute for this much."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    return toml_table(read_text(path, LARGEST_TOML), str(path))


def toml_table(text: str, where: str) -> dict[str, Any]:
    """The tables of a text; ``where`` it is from is named by errors as in :func:`read_toml`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        why = str(error)
    except RecursionError:
        why = "it is nested too deep"
    except ValueError:
        why = "a number has too many digits"
    raise ConfigError(
        f"{where} is not valid TOML: {why}",
        fix="Correct it there; examples/ has configurations to start from.",
    )
