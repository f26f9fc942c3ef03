"""What the meters write into a round's line. Definitions: :mod:`fedft.core.meters`.

Apart from the meters themselves, because whoever reads a line need not load what measures.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class LayerBias(TypedDict):
    """One layer's bias. ``None`` where a norm it divides by is zero.

    Attributes:
        relative: ||dW - M|| / ||dW||.
        cosine: of the angle between dW and M.
        norm_ratio: ||M|| / ||dW||.
        forgotten: the part of ``relative`` along what sites were not sent, from -``relative`` to
            ``relative``; zero where they were sent all.
    """

    relative: float | None
    cosine: float | None
    norm_ratio: float | None
    forgotten: float | None


class Bias(LayerBias):
    """The bias over all layers.

    Attributes:
        layers: module → its own.
    """

    layers: dict[str, LayerBias]


class Lag(TypedDict):
    """What the round boundary does to the state of training.

    Attributes:
        function_jump: ||W_start(next round) - (W + dW)|| / ||dW||, root-mean-square over the sites
            by p_k: how far the function a site resumes from is off what the sites asked for.
            Equals the relative bias where every site starts from the server's state; differs where
            a site gets a truncation of it.
        dead_start: mean over sites by p_k of ||grad_A|| / ||grad_B|| on the first batch, as they
            report it. Zero where B = 0, since A then has no gradient.
        displacement: ||theta_start(next) - theta_bar|| / ||theta_bar||, theta the factors of all
            layers end to end and theta_bar their mean over the sites. None for mixed ranks, where
            the two have no common coordinates.
    """

    function_jump: float | None
    dead_start: float | None
    displacement: float | None


class Drift(TypedDict):
    """How far the sites moved, in squared Frobenius norm over the factors they sent.

    Attributes:
        total: sum_k p_k ||theta_k - theta_start||^2.
        between: sum_k p_k ||theta_k - theta_bar||^2, the part on which they disagree. The rest of
            the total is their common movement. None for mixed ranks.
    """

    total: float | None
    between: float | None


class Heads(TypedDict):
    """HydraLoRA's heads after the round.

    Attributes:
        used: how many are not zero.
        cosine: mean cosine between every two of these, each taken over all layers; None for one.
    """

    used: int
    cosine: float | None


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

    bias: Bias
    lag: Lag
    drift: Drift
    heads: Heads
    spectrum: dict[str, list[float]]
    pruning: Pruned
    meters: dict[str, object]
    meter_errors: dict[str, str]
