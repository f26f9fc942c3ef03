"""Tasks that fedft does not have, each as one would add it: what the seam has to carry."""

import re
from pathlib import Path
from typing import Any

from fedft.core.tasks import Task


def _recipe() -> type[Task]:
    """The task of ``docs/extending.md``, as it is printed there."""
    section = PAGE.read_text("utf-8").split("## A new task", 1)[1].split("\n## ", 1)[0]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code[1], str(PAGE), "exec"), namespace)
    return namespace["MultiLabel"]


PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
MultiLabel = _recipe()


OTHERS: dict[str, Task] = {task.name: task for task in (MultiLabel(),)}
