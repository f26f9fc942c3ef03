"""The task that a client joined, kept: a server that asks for another one is asked why.

What a client says of itself (how many rows it has, that they fit) depends on the task. A server that
could change the task from one connection to the next could ask about the rows again and again.
A kit is of one run, so that a site has one task.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedft.core.errors import SecurityRefusal
from fedft.core.files import disk, write_file
from fedft.core.link.codes import coded
from fedft.core.spec import TaskSpec


@dataclass
class Agreement:
    """The first task of a site, from then on.

    Args:
        path: where it is kept; None keeps it for as long as this process runs.
    """

    path: Path | None = None
    _first: dict[str, Any] | None = field(default=None, init=False)

    def check(self, run: str, task: TaskSpec, *, keep: bool = True) -> None:
        """Agree to the first task; refuse another one. Comes before any look at the data.

        Args:
            run: its name.
            task: as the server says it.
            keep: on disk.

        Raises:
            SecurityRefusal: with the word ``changed``.
        """
        new = {"run": run, **_about(task)}
        first = self._first or self._stored()
        if first is None:
            first = new
            if keep and self.path is not None:
                with disk(f"create {self.path.parent}"):
                    self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                kept = {**new, "task": json.loads(task.model_dump_json())}
                write_file(self.path, json.dumps(kept, indent=1).encode() + b"\n")
        if changed := [key for key, value in new.items() if first.get(key) != value]:
            where = f"; if you know why, delete {self.path}" if self.path is not None else ""
            raise coded(
                SecurityRefusal(
                    f"the server asks for another task than the one joined before: it has another "
                    f"{', '.join(key.replace('_', ' ') for key in changed)}",
                    fix=f"Ask whoever runs the server{where}.",
                ),
                "changed",
            )
        self._first = first

    def task(self) -> tuple[str, TaskSpec] | None:
        """The run and its task as they were joined; None before that."""
        kept = self._stored()
        return None if kept is None else (str(kept["run"]), TaskSpec.model_validate(kept["task"]))

    def _stored(self) -> dict[str, Any] | None:
        if self.path is None:
            return None
        with disk(f"read {self.path}"):
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        try:
            found: dict[str, Any] | None = json.loads(text) if text else None
            if found is not None:
                TaskSpec.model_validate(found["task"])
        except (ValueError, KeyError, TypeError) as error:
            raise coded(
                SecurityRefusal(
                    f"{self.path} is damaged: it says which task this client has joined",
                    fix="Delete it to agree to the server's task anew.",
                ),
                "changed",
            ) from error
        return found


def _about(task: TaskSpec) -> dict[str, Any]:
    """What decides which rows count, and how they are divided."""
    return {
        "kind_of_task": task.model.task,
        "classes": list(task.classes),
        "max_length": task.data.max_length,
        "holdout": task.data.holdout,
        "seed": task.seed,
    }
