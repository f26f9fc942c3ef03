"""Who is told of a run: one file a tracker, and a row here.

To add one, write a file with a subclass of :class:`~fedft.trackers.base.Tracker` and give it a name
in :data:`TRACKERS`; the laws of ``tests/trackers`` then hold for it. A run tells those that
``[track] trackers`` names, and those that a call from Python hands over. The run directory is always
told, and first: see :mod:`fedft.trackers.run_directory`.
"""

from collections.abc import Mapping

from fedft.core.errors import ConfigError
from fedft.core.names import hint
from fedft.trackers.base import Start, Tracker, numbers
from fedft.trackers.tensorboard import TensorBoard

__all__ = ["TRACKERS", "Start", "Tracker", "found", "numbers"]

TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard}
"""What ``[track] trackers`` may name. A file here imports what it tells only when it is used."""


def found(name: str) -> type[Tracker]:
    """The tracker of a name.

    Raises:
        ConfigError: there is none; names that are near are told.
    """
    if name not in TRACKERS:
        raise ConfigError(f"no tracker is called {name[:80]!r}", fix=hint(name[:100], [*TRACKERS]))
    return TRACKERS[name]
