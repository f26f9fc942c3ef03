"""The Python reference: a page a package, each module by its docstrings, and the command line."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

from fedft.cli import cli

ROOT = Path(__file__).resolve().parents[2]
_GENERATED = re.compile(r"_pb2(_grpc)?$")


def packages() -> Iterator[tuple[str, list[str]]]:
    """Every package of fedft with its modules, itself first, by their dotted names."""
    root = ROOT / "fedft"
    for init in sorted(root.rglob("__init__.py"), key=lambda path: path.parent.parts):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        stems = sorted(path.stem for path in init.parent.glob("*.py") if path != init)
        modules = [f"{name}.{stem}" for stem in stems if not _GENERATED.search(stem)]
        yield name, [name, *(m for m in modules if not m.endswith("__main__"))]


def python_page(name: str, modules: list[str]) -> str:
    """What mkdocstrings makes a package's page of."""
    blocks = "\n\n".join(f"::: {module}" for module in modules)
    return f"# {name}\n\n{blocks}\n"


def commands_page() -> str:
    """`fedft --help` and that of every command."""
    group: Any = typer.main.get_command(cli)
    parts = ["# Command line\n\nWhat `fedft COMMAND --help` says, all on one page.\n"]
    parts += [f"\n## {title}\n\n{body}" for title, body in _sections(group, "fedft")]
    return "".join(parts)


def _sections(command: Any, path: str) -> Iterator[tuple[str, str]]:
    about = " ".join((command.help or "").split())
    rows = [_row(option) for option in command.params if not option.hidden]
    table = "| argument or option | default | |\n|---|---|---|\n" + "".join(rows) if rows else ""
    yield path, f"{about}\n\n{table}"
    for name in sorted(getattr(command, "commands", {})):
        yield from _sections(command.commands[name], f"{path} {name}")


def _row(option: Any) -> str:
    argument = isinstance(option, click.Argument) or option.param_type_name == "argument"
    names = [option.human_readable_name] if argument else [*option.opts, *option.secondary_opts]
    default = option.default
    shown = "" if default is None or callable(default) or default in (False, [], ()) else default
    text = (getattr(option, "help", None) or "").replace("|", "\\|")
    label = ", ".join(f"`{name}`" for name in names)
    needed = "required" if option.required else (f"`{shown}`" if shown != "" else "")
    return f"| {label} | {needed} | {' '.join(text.split())} |\n"
