"""How long a round of real clients may take where nobody says: as long as the slowest would need.

A round without a deadline waits for ever for a client that hangs while its heartbeat goes on. The
default is that of a slow laptop on a slow line:

    seconds = 60 + examples * passes * FLOPs / 5e9 + bytes / 125,000

with the 6 * parameters * tokens FLOPs of a step on one example (Kaplan et al., 2020,
arXiv:2001.08361, section 2.1), every row as long as `[data] max-length` allows, and the bytes of
the plan and of the reply to it. A round is given what its largest client needs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedft.core import models
from fedft.core.memory import Geometry
from fedft.core.tasks import task_of

if TYPE_CHECKING:
    from fedft.server.config import RunConfig


@dataclass(frozen=True)
class Pace:
    """The slowest client that a round waits for.

    Attributes:
        flops: of training on one example of this model once.
        flops_per_s: that it does.
        bytes_per_s: of its connection.
        least_s: seconds that everybody is given.
    """

    flops: float
    flops_per_s: float = 5e9
    bytes_per_s: float = 125_000.0
    least_s: float = 60.0

    @property
    def example_s(self) -> float:
        """Seconds for one example."""
        return self.flops / self.flops_per_s

    def sentence(self) -> str:
        """The formula, for people."""
        return (
            f"{self.least_s:.0f} s + {self.example_s:.2g} s for each example and pass of its "
            f"largest client + the time for its bytes at {8e-6 * self.bytes_per_s:g} Mbit/s"
        )

    def seconds(self, examples: int, size: int) -> float:
        """What it needs.

        Args:
            examples: to train on, passes counted.
            size: bytes in both directions.
        """
        return self.least_s + examples * self.example_s + size / self.bytes_per_s


def pace_of(config: "RunConfig", shapes: models.Schema, geometry: Geometry | None) -> Pace:
    """That of a run's model."""
    patches = 0 if geometry is None else geometry.patches
    tokens = patches or config.data.max_length
    return Pace(flops=6.0 * shapes.parameters * tokens * task_of(config.model.task).each)
