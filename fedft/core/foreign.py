"""Importing code from outside of fedft by name, and telling what was imported.

What goes wrong is told in terms of the name: whether there is no such module, whether it cannot be
imported and why, or what it has instead.
"""

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from functools import reduce
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from fedft.core.errors import ConfigError
from fedft.core.names import hint, near

_MOST_FILES = 2000


def imported(reference: str, noun: str) -> Any:
    """What ``package.module:Class`` stands for.

    A module that is not on the import path is looked for in the working directory, too, which is
    put at the end of the path.

    Args:
        reference: the name; whoever asks trusts it.
        noun: what an error calls what was looked for.

    Raises:
        ConfigError: there is no such module or name, or the module cannot be imported.
    """
    path, _, attribute = reference.partition(":")
    module = _module(path.strip(), reference, noun)
    attribute = attribute.split("[")[0].strip()  # an entry point may name extras behind it
    try:
        if not attribute:
            raise AttributeError
        return reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise ConfigError(
            f"no {noun} is {reference}: {_lacks(module, attribute)}",
            fix=_instead(module, path, attribute),
        ) from None


def _lacks(module: ModuleType, attribute: str) -> str:
    if not attribute:
        return "it names a module, and no class in it"
    return f"the module {module.__name__} has no {attribute}"


def _instead(module: ModuleType, path: str, attribute: str) -> str:
    if path == "__main__" or "<locals>" in attribute:
        return (
            "It was defined in a script or in a function. Move it into a module, or hand the class "
            "over from Python: allow=[TheClass]."
        )
    defined = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type | FunctionType) and value.__module__ == path
    }
    classes = [name for name, value in defined.items() if isinstance(value, type)]
    functions = near(attribute, defined) and not near(attribute, classes)
    own = classes if classes and not functions else list(defined)
    if not own:
        return f"{_file(module)} defines no class."
    if not attribute:
        return f"Write it as {path}:{own[0]}."
    return f"{hint(attribute, own)} It was looked for in {_file(module)}."


def _file(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def _module(path: str, reference: str, noun: str) -> ModuleType:
    _look_here_too(path)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if path == missing or path.startswith(f"{missing}."):
            raise ConfigError(
                f"no {noun} is {reference}: there is no module {missing}",
                fix=_where_to_look(missing),
            ) from None
        raise _broken(path, reference, noun, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(path, reference, noun, error) from error


def _broken(path: str, reference: str, noun: str, error: BaseException) -> ConfigError:
    said = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return ConfigError(
        f"the {noun} {reference} cannot be imported: {path} raised {said[:300]}",
        fix=f"Mend it until this works: python -c 'import {path}'.",
    )


def _look_here_too(path: str) -> None:
    """Whoever runs a command beside a module of their own means that one."""
    top = path.partition(".")[0]
    here = str(Path.cwd())
    try:
        known = importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        known = True  # importing it says what is wrong
    if not known and here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()


def _where_to_look(missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    folders: Iterable[str] | None = None
    if parent:
        folders = getattr(sys.modules.get(parent), "__path__", None) or []
    names = [module.name for module in pkgutil.iter_modules(folders)]
    found = near(last, names)
    dotted = [f"{parent}.{name}" if parent else name for name in found]
    if dotted:
        return f"Did you mean {' or '.join(dotted)}?"
    if parent:
        return f"{parent} has: {', '.join(sorted(names)[:20]) or 'no modules'}."
    return "Install the package that has it, or start from the folder that it lies in."


def definition_of(value: object) -> type | FunctionType:
    """What code from outside is found by: a class, a function, or the class of another object."""
    return value if isinstance(value, type | FunctionType) else type(value)


def source_of(value: object, distribution: str | None = None) -> dict[str, str | None]:
    """What a run records of code from outside: enough to notice that it is another one later.

    Args:
        value: a class, a function, or an object.
        distribution: name and version of the installed package, where it is known.

    Returns:
        ``class`` as ``module:Class``; ``package``, name and version of the installed package, None
        where it is of none; ``sha256`` over the Python files of its top-level package, or of its
        module alone, None where there is no file.
    """
    found = definition_of(value)
    top = found.__module__.partition(".")[0]
    return {
        "class": f"{found.__module__}:{found.__qualname__}",
        "package": distribution or _distribution(top),
        "sha256": _digest(top, found),
    }


def _distribution(top: str) -> str | None:
    try:
        names = metadata.packages_distributions().get(top, [])
        return f"{names[0]} {metadata.version(names[0])}" if names else None
    except Exception:  # another package's files are damaged; ours may still be found by hash
        return None


def _digest(top: str, found: type | FunctionType) -> str | None:
    folders = [Path(f) for f in getattr(sys.modules.get(top), "__path__", ())]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    if not files or len(files) > _MOST_FILES:
        try:
            files = [Path(inspect.getfile(found))]
        except (OSError, TypeError):
            return None
    total = hashlib.sha256()
    for file in files:
        root = next((f for f in folders if file.is_relative_to(f)), file.parent)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        total.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return total.hexdigest()
