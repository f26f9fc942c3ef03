"""What ``pip install fedft`` leaves out: the packages that a server and its clients can do without.

A package of an extra is imported where it is needed and nowhere else, inside :func:`extra`, so that
its absence is told in one sentence that names what to install.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from fedft.core.errors import EnvironmentFailure

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "simulation": ("ray", "flwr_datasets"),
    "data": ("datasets", "pyarrow"),
    "report": ("matplotlib",),
    "privacy": ("dp_accounting", "opacus"),
    "trackers": ("tensorboard",),
    "metrics": ("sklearn", "rouge_score", "sacrebleu"),
    "gguf": ("gguf",),
    "quantized": ("bitsandbytes",),
}
"""Extra → the modules that fedft imports of it. pyproject.toml has the packages."""


@contextmanager
def extra(name: str, purpose: str) -> Generator[None]:
    """Imports of what an extra installs.

    Args:
        name: of the extra, a key of :data:`EXTRAS`.
        purpose: what needs it, as a clause: "a report needs it".

    Raises:
        EnvironmentFailure: a module is missing, or is there and cannot be imported.
    """
    assert name in EXTRAS, name
    try:
        yield
    except ImportError as error:
        module = (error.name or EXTRAS[name][0]).partition(".")[0]
        if isinstance(error, ModuleNotFoundError):
            what = f"{module} is not installed, and {purpose}"
        else:
            first = (str(error).splitlines() or [""])[0]
            what = f"{module} cannot be imported, and {purpose}: {first}"
        raise EnvironmentFailure(what, fix=f"pip install 'fedft[{name}]'") from error


def installed(name: str) -> bool:
    """Whether all modules of an extra are there. Nothing is imported."""
    return all(_there(module) for module in EXTRAS[name])


def need(name: str, purpose: str) -> None:
    """Refuse early what would fail late: as :func:`extra`, without importing anything.

    Raises:
        EnvironmentFailure: a module of the extra is missing.
    """
    with extra(name, purpose):
        for module in EXTRAS[name]:
            if not _there(module):
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module that was made by hand and has no spec
        return True
