"""What is measured of a round, as its line has it: the readings of meters, and what pruning says."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from fedft.core.meters.drift import DriftReading
from fedft.core.meters.heads import HeadsReading
from fedft.core.meters.lag import LagReading
from fedft.core.meters.readings import OverallBias


class Compared(TypedDict):
    """What the blocks of the model were chosen by.

    Attributes:
        by: who measured it: ``sites``.
        round: in which it was measured.
        similarity: of every two blocks, from 0 to 1; a matrix by rows.
        importance: of each block.
    """

    by: str
    round: int
    similarity: list[list[float]]
    importance: list[float]


class Pruned(TypedDict):
    """Which part of the model clients held.

    Attributes:
        held: client → its blocks, or halves of blocks.
        measured: where a comparison was made.
        groups: size of a submodel → its groups of blocks, where ``selection = "cka"``.
    """

    held: dict[str, Sequence[int]]
    measured: NotRequired[Compared]
    groups: NotRequired[dict[str, Sequence[Sequence[int]]]]


class Figures(TypedDict, total=False):
    """What the meters say of a round, each under its own key; None where a rule does not define it.

    Attributes:
        bias: of the aggregation.
        lag: of the start of the next round.
        drift: of the clients.
        heads: of HydraLoRA.
        spectrum: module → singular values of the update, descending; ``[rounds] spectrum``.
        pruning: of layer-pruned clients.
        meters: what further meters say, by their keys.
        meter_errors: key of a meter that failed → why.
    """

    bias: OverallBias
    lag: LagReading
    drift: DriftReading
    heads: HeadsReading
    spectrum: dict[str, list[float]]
    pruning: Pruned
    meters: dict[str, object]
    meter_errors: dict[str, str]
