"""What the server keeps of a round's replies: as little as its rule and the meters ask for."""

from collections.abc import Iterable, Sequence

from fedft.core import meters
from fedft.core.folding import Folded
from fedft.core.types import Adapter, ClientUpdate
from fedft.strategies import Strategy


class Intake:
    """The usable replies of a round, taken in one by one.

    Each is folded. A rule that goes by their mean is given that mean, and the replies are let go
    of: the memory of a round does not grow with its sites then. Other rules (those that stack
    factors, compare sites or take medians) are given all of them.

    Args:
        strategy: the rule.
        kinds: the meters; None takes the default ones.

    Attributes:
        folded: what the rule and the meters read: no more than one of them needs.
        panel: the meters of the round.
    """

    def __init__(
        self, strategy: Strategy, kinds: Sequence[type[meters.Meter]] | None = None
    ) -> None:
        self.panel = meters.Panel(meters.chosen(meters.DEFAULT) if kinds is None else kinds)
        self.folded = Folded(
            strategy.personal,
            products=self.panel.needs("products"),
            squares=self.panel.needs("each"),
        )
        self._strategy = strategy
        self._kept: list[ClientUpdate] = []

    def __len__(self) -> int:
        """How many replies were taken in."""
        return len(self.folded.sites)

    def add(self, updates: Iterable[ClientUpdate]) -> "Intake":
        """Take replies in, in an order that has nothing to do with when they arrived."""
        for update in updates:
            self.folded.add(update)
            self.panel.add(update)
            if not self._strategy.uses_mean_only:
                self._kept.append(update)
        return self

    def replies(self, start: Adapter) -> list[ClientUpdate]:
        """What the rule is given.

        Args:
            start: the adapter of the server, from which the sites started.
        """
        if self._strategy.uses_mean_only and len(self) > 0:
            return [self.folded.mean_update(start)]
        return self._kept
