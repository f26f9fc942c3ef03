"""The tests' own tasks, and a small model for each kind."""

from pathlib import Path
from typing import Any

import pytest

from fedft.core.tasks import TASKS
from tests.core.tasks.cases import CASES
from tests.core.tasks.other_tasks import OTHERS


@pytest.fixture(scope="module", autouse=True)
def others() -> Any:
    """The tests' own tasks are known for as long as these tests run: a row each, as one would add it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, task in OTHERS.items():
            patch.setitem(TASKS, name, task)
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[Any, Path] = {}

    def folder(name: str) -> Path:
        make = CASES[name].model
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp(make.__name__))
        return made[make]

    return folder
