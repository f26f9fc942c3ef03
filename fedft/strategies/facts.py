"""What a rule may know of the run that it is used in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run, see :meth:`fedft.strategies.base.Strategy.of_run`.

    Attributes:
        seed: run seed.
        clients: registered clients; None where a rule is used by itself, and those that take part
            in a round count as all.
        per_round: clients sampled each round; None likewise.
        classes: of the data; 0 where there are none.
    """

    seed: int = 0
    clients: int | None = None
    per_round: int | None = None
    classes: int = 0
