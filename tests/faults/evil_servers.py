"""A real ``fedft serve`` with one lie in its own process; everything else is what it does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedft.core.training import LocalTraining
from fedft.server import serve as serving
from fedft.server.config import RunConfig
from fedft.server.identity import Address
from fedft.server.serve import Hosting


def strips_the_noise(changes: Mapping[str, Any]) -> None:
    """The plans that leave have other settings than the run that the server says it is."""
    honest = LocalTraining.to_fields
    LocalTraining.to_fields = lambda self: {**honest(self), **changes}  # type: ignore[method-assign]


def asks_about(data: Mapping[str, Any], classes: tuple[str, ...]) -> None:
    """The task that clients are told has other columns and classes."""
    honest = serving.sites_task

    def lying(setting: Any) -> Any:
        task = honest(setting)
        other = task.data.model_copy(update=dict(data))
        return task.model_copy(update={"data": other, "classes": classes or task.classes})

    serving.sites_task = lying


def lie(
    how: Callable[..., None],
    about: tuple[Any, ...],
    config: RunConfig,
    run_dir: Path,
    hosting: Hosting,
) -> None:
    """What a process of its own runs."""
    how(*about)
    serving.serve(config, run_dir, Address(), hosting=hosting)
