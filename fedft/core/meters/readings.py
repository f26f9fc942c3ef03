"""What the bias reads, apart from what measures it: whoever reads a line need not load torch."""

from typing import TypedDict


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


class OverallBias(LayerBias):
    """The bias over all layers.

    Attributes:
        layers: module → its own.
    """

    layers: dict[str, LayerBias]
