"""What stands between clients' replies and the aggregation rule: one collector a file."""

from fedft.server.collect.base import Collector
from fedft.server.collect.plain import Plain
from fedft.server.federation import Federation

__all__ = ["Collector", "Plain", "collector_of"]


def collector_of(federation: Federation) -> Collector:
    """The collector of a run: that of plain replies, until there is a second one to choose."""
    return Plain()
