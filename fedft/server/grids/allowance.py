"""How often something may happen: so many times at once, and so many a second from then on."""

import time
from dataclasses import dataclass, field


@dataclass
class Allowance:
    """A bucket that fills at a rate, and from which one is taken each time.

    Args:
        burst: how many it holds.
        rate: how many come a second.
    """

    burst: float
    rate: float
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.burst, time.monotonic()

    def take(self) -> float:
        """Take one.

        Returns:
            Seconds until there would have been one, where there was none; else 0.
        """
        now = time.monotonic()
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self.rate
        self._left -= 1
        return 0.0
