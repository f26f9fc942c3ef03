"""Who is told of a run: one file a tracker and a row here, or a class of another package.

To add one, write a file with a subclass of :class:`~fedft.trackers.base.Tracker` and give it a name
in :data:`TRACKERS`; the laws of ``tests/trackers`` then hold for it. A run tells those that
``[track] trackers`` names, and those that a call from Python hands over. The run directory is always
told, and first: see :mod:`fedft.trackers.run_directory`.
"""

from collections.abc import Mapping
from typing import cast

from fedft.core.plugins import Registry, Trust, subclass_of
from fedft.trackers.base import Start, Tracker, numbers
from fedft.trackers.tensorboard import TensorBoard

__all__ = ["REGISTRY", "TRACKERS", "Start", "Tracker", "found", "numbers"]

TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard}
"""What ``[track] trackers`` may name. A file here imports what it tells only when it is used."""

# What is asked for is a class, and a protocol is none that could be made: hence the cast.
_TRACKER = cast(type[Tracker], Tracker)

REGISTRY: Registry[type[Tracker]] = Registry(
    "trackers", "tracker", TRACKERS, subclass_of(_TRACKER, "fedft.trackers.Tracker")
)
"""Every tracker's class by name."""


def found(name: str, trust: Trust | None = None) -> type[Tracker]:
    """The tracker of a name.

    Args:
        name: one of ours, a registered one, or ``package.module:Class``.
        trust: what may be imported for it; None for what the process trusts.

    Raises:
        ConfigError: there is none; names that are near are told.
        SecurityRefusal: it would have to be imported, and nobody trusted asked for it.
    """
    return REGISTRY.find(name, trust).value
